"""On a board, between its port 2200 and its SSH server: connections go on through the network namespace ``road``.

    python3 - < road.py

What the emulator passes on ends here, and another connection begins, from the board's kernel to the board's kernel
across a veth pair that lab/network.py makes slow, far and lossy. The emulator's own TCP is left out of
it: decision 32 says what was seen with packets missing there. An end is passed on as an end, a reset as a reset.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct

#: Port and address of this side and of the far one.
HERE, SERVER = ("0.0.0.0", 2200), ("10.9.0.1", 22)
NAMESPACE, CLONE_NEWNET = "/run/netns/road", 0x40000000
#: What is read ahead of the slow side, about what a small router holds.
BUFFER_BYTES = 32 * 1024
RESET = struct.pack("ii", 1, 0)


async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while piece := await source.read(BUFFER_BYTES):
        target.write(piece)
        await target.drain()
    target.write_eof()


async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    far = socket.socket()
    far.setblocking(False)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    try:
        await asyncio.get_running_loop().sock_connect(far, SERVER)
    except OSError:  # no SSH server, or not yet
        far.close()
        writer.transport.abort()
        return
    far_reader, far_writer = await asyncio.open_connection(sock=far, limit=BUFFER_BYTES)
    for one in (writer, far_writer):
        one.transport.set_write_buffer_limits(BUFFER_BYTES)
    try:
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))
    except OSError:
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    finally:
        for one in (writer, far_writer):
            one.transport.abort()


async def serve(listener: socket.socket) -> None:
    server = await asyncio.start_server(connect, sock=listener, limit=BUFFER_BYTES)
    await server.serve_forever()


def to_background() -> None:
    if os.fork():
        os._exit(0)
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)


def enter_namespace() -> None:
    """What is connected from here on is in the namespace; what was made before stays where it is."""
    if ctypes.CDLL(None, use_errno=True).setns(os.open(NAMESPACE, os.O_RDONLY), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), NAMESPACE)


listening = socket.create_server(HERE)
enter_namespace()
to_background()
asyncio.run(serve(listening))
