"""What a disk may hold after a power cut: a model of a file system that keeps only what was synced for certain.

A recording is a list of events: names set and removed, bytes written, syncs. After the first N of them the power goes.
What is certain to be there then is what POSIX promises and no more:

* bytes and length of a file, once that file was synced after they were written;
* a name in a folder, once that folder was synced after the name was made, removed or renamed over;
* a rename moves in one step; one from a folder to another is certain once both are synced.

Everything else is there or not, each for itself, but what happened to one name stays in its order. ``WAYS`` are the
ways in which the rest may come out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Path relative to the model's root -> bytes of a file, target of a link, None for a folder.
Tree = dict[str, bytes | str | None]


@dataclass(eq=False)
class Node:
    """A file, link or folder. ``content`` and ``names`` are as programs see them now; ``base`` as at the start."""

    kind: str
    base: bytes = b""
    target: str = ""
    content: bytearray = field(default_factory=bytearray)
    names: dict[str, Node] = field(default_factory=dict)


#: A name in a folder.
Key = tuple[Node, str]


@dataclass(frozen=True)
class Named:
    """Names that come to mean other nodes, or none, in one step."""

    names: tuple[tuple[Key, Node | None], ...]


@dataclass(frozen=True)
class Written:
    """Bytes of a file from ``offset`` on."""

    node: Node
    offset: int
    data: bytes


@dataclass(frozen=True)
class Cut:
    """A file's new length."""

    node: Node
    size: int


@dataclass(frozen=True)
class Synced:
    """A file or folder that is now certain; None: all of them."""

    node: Node | None


@dataclass(frozen=True)
class Said:
    """Bytes that left the process for its host: what was promised."""

    data: bytes


Event = Named | Written | Cut | Synced | Said


class Disk:
    """A folder and everything that happened in it since. What lies there at the start is certain."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self.top = _read(root)
        self._at_first = {id(node): (node, dict(node.names)) for node in _folders(self.top)}

    def tree(self) -> Tree:
        """As programs see it now."""
        return _tree(self.top, lambda node: node.names, lambda node: bytes(node.content))

    # -- what happens ------------------------------------------------------------------------------------------

    def name(self, *names: tuple[Key, Node | None]) -> None:
        for (folder, name), node in names:
            if node is None:
                folder.names.pop(name, None)
            else:
                folder.names[name] = node
        self.events.append(Named(names))

    def write(self, node: Node, offset: int, data: bytes) -> None:
        _write(node.content, offset, data)
        self.events.append(Written(node, offset, data))

    def cut(self, node: Node, size: int) -> None:
        if size != len(node.content):
            _resize(node.content, size)
            self.events.append(Cut(node, size))

    def sync(self, node: Node | None) -> None:
        self.events.append(Synced(node))

    def say(self, data: bytes) -> None:
        self.events.append(Said(data))

    # -- what is left ------------------------------------------------------------------------------------------

    def after(self, count: int, way: Way, rng: random.Random) -> Tree:
        """What the disk may hold when the power goes after ``count`` events."""
        events = self.events[:count]
        synced = _last_syncs(events)
        names = {key: dict(names) for key, (_, names) in self._at_first.items()}
        for event in _surviving(events, synced, way.names, rng):
            for (folder, name), node in event.names:
                entries = names.setdefault(id(folder), {})
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        changes: dict[int, list[tuple[bool, Written | Cut]]] = {}
        for number, event in enumerate(events):
            if isinstance(event, (Written, Cut)):
                certain = _is_certain(number, [event.node], synced)
                changes.setdefault(id(event.node), []).append((certain, event))

        def content(node: Node) -> bytes:
            found = bytearray(node.base)
            for certain, change in changes.get(id(node), []):
                (_apply if certain else way.data)(found, change, rng)
            return bytes(found)

        return _tree(self.top, lambda node: names.get(id(node), {}), content)


def _last_syncs(events: Sequence[Event]) -> Mapping[Node | None, int]:
    return {event.node: number for number, event in enumerate(events) if isinstance(event, Synced)}


def _is_certain(number: int, nodes: Sequence[Node], synced: Mapping[Node | None, int]) -> bool:
    return all(max(synced.get(node, -1), synced.get(None, -1)) > number for node in nodes)


def _surviving(
    events: Sequence[Event], synced: Mapping[Node | None, int], chance: float, rng: random.Random
) -> list[Named]:
    """The changes of names that are on the disk: those that are certain, and of the others about ``chance``."""
    changes = [(number, event) for number, event in enumerate(events) if isinstance(event, Named)]
    forced, keys = set(), set()
    for number, event in reversed(changes):
        # What happened to a name before something certain happened to it is certain as well.
        mine = {key for key, _ in event.names}
        if _is_certain(number, [folder for folder, _ in mine], synced) or mine & keys:
            forced.add(number)
            keys |= mine
    kept, stopped = [], set()
    for number, event in changes:
        mine = {key for key, _ in event.names}
        if number in forced or (not mine & stopped and rng.random() < chance):
            kept.append(event)
        else:
            stopped |= mine
    return kept


# -- what becomes of unsynced bytes ------------------------------------------------------------------------------------


def _apply(content: bytearray, change: Written | Cut, rng: random.Random) -> None:
    if isinstance(change, Cut):
        _resize(content, change.size)
    else:
        _write(content, change.offset, change.data)


def _drop(content: bytearray, change: Written | Cut, rng: random.Random) -> None:
    pass


def _only_length(content: bytearray, change: Written | Cut, rng: random.Random) -> None:
    """The length reached the disk and the bytes did not, so zeros are read."""
    size = change.size if isinstance(change, Cut) else max(len(content), change.offset + len(change.data))
    _resize(content, size)


def _some(content: bytearray, change: Written | Cut, rng: random.Random) -> None:
    """Any of these, or the first part of the bytes only."""
    if isinstance(change, Written) and rng.random() < 0.4:
        kept = rng.randrange(len(change.data) + 1)
        (_only_length if rng.random() < 0.5 else _drop)(content, change, rng)
        _write(content, change.offset, change.data[:kept])
        return
    rng.choice((_apply, _drop, _only_length))(content, change, rng)


@dataclass(frozen=True)
class Way:
    """How what was not synced comes out: how likely a name's change is there, and what becomes of bytes."""

    what: str
    names: float
    data: Callable[[bytearray, Written | Cut, random.Random], None]


WAYS = {
    "dropped": Way("nothing that was not synced", 0.0, _drop),
    "survived": Way("everything", 1.0, _apply),
    "empty": Way("names, but no bytes and no lengths", 1.0, _drop),
    "zeros": Way("names and lengths, but no bytes", 1.0, _only_length),
    "random": Way("any part of it", 0.5, _some),
}


# -- trees -------------------------------------------------------------------------------------------------------------


def key_of(tree: Tree) -> bytes:
    """The same for trees that are the same."""
    digest = hashlib.sha256()
    for path, content in sorted(tree.items()):
        data = content if isinstance(content, bytes) else repr(content).encode()
        digest.update(f"{path!r} {type(content).__name__} {len(data)} ".encode() + data)
    return digest.digest()


def put_down(tree: Tree, folder: Path) -> None:
    """Make ``tree`` in an empty or missing ``folder``."""
    folder.mkdir(exist_ok=True)
    for name, content in sorted(tree.items()):  # a folder comes before what is in it
        path = folder / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


def tree_of(folder: Path) -> Tree:
    """What ``folder`` holds."""
    return _tree(_read(folder), lambda node: node.names, lambda node: bytes(node.content))


def _read(path: Path) -> Node:
    if path.is_symlink():
        return Node("link", target=str(path.readlink()))
    if path.is_dir():
        return Node("folder", names={entry.name: _read(entry) for entry in path.iterdir()})
    data = path.read_bytes()
    return Node("file", base=data, content=bytearray(data))


def _folders(node: Node) -> list[Node]:
    return [node, *(inner for child in node.names.values() for inner in _folders(child))]


def _tree(top: Node, names: Callable[[Node], Mapping[str, Node]], content: Callable[[Node], bytes]) -> Tree:
    found: Tree = {}

    def walk(node: Node, prefix: str) -> None:
        for name, child in names(node).items():
            path = prefix + name
            if child.kind == "folder":
                found[path] = None
                walk(child, path + "/")
            else:
                found[path] = child.target if child.kind == "link" else content(child)

    walk(top, "")
    return found


def _write(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        _resize(content, offset)
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))
