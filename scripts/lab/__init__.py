"""The device lab: emulated aarch64 boards with Debian, on this machine and without its root. Standard library only.

packages.py   Debian's packages for arm64, fetched and unpacked
initrd.py     the archive that a board's kernel starts from
image.py      the card that every board begins with, built once
boards.py     the kinds of board, and the folders that boards live in
emulator.py   starting, cutting the power of, and stopping a board
network.py    latency, loss and bandwidth between this machine and a board
"""
