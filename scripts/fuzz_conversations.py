"""Conversations with a receiver that no host has: what scripts/fuzz_receiver.py tries, from a seed and a number.

They begin as what a host says, made from the receiver's own table of requests and the installer's: a new request is
among them without a word here, as long as its fields have the types of others. Then something is wrong with them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mutations

from edge_infer.bundle import Bundle
from edge_infer.deploy import installer, receiver
from edge_infer.deploy.installer import AFTER_INSTALL_BEGIN
from edge_infer.deploy.receiver import AFTER_BEGIN
from edge_infer.manifest import MANIFEST_NAME, seal

#: All requests, and those that need none before them.
FIELDS = {**receiver.FIELDS, **installer.FIELDS}
ALONE = [op for op in FIELDS if op not in ("begin", "install-begin", *AFTER_BEGIN, *AFTER_INSTALL_BEGIN)]
#: What stands for a wheel.
WHEEL = b"no wheel"

#: Numbers that are no count of anything. Where a number of seconds is meant, those that are valid are short.
ODD_NUMBERS = (
    *(True, False, 0, -1, 1, 2, -(2**63), 2**31, 2**63 - 1, 2**63, 2**64, 10**400, int("9" * 4300), -int("9" * 4300)),
    *(0.0, -0.0, 0.001, 1.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")),
)
#: Names of files and models that are none, and texts.
ODD_TEXTS = (
    *("", ".", "..", "/", "x", "..x", "x/../y", "../escaped", "../../escaped", "a/b", "/proc/x/y", "~", "~0"),
    *(".hidden", "-x", "x" * 100, "x" * 101, "x" * 300, "x" * 5000, "a\x00b", "a\nb", "a\rb", "\x00", "\x1b[2J"),
    *("\u00e9", "e\u0301", "\U0001f600", "\ud800", "\udcff", "\u202e", "con", "NUL", MANIFEST_NAME, "weights.bin/"),
    *("manifest.json.", "lock", "x.edge", "/dev/null", "/dev/full", "{}", "%s%n", "$(touch x)", "0" * 64, "f" * 64),
)  # fmt: skip
ODD_OTHERS = (None, [], {}, [[]] * 50, {"op": "status"}, [1, "x"], [None])
#: Pieces of text that JSON readers stumble on.
ODD_JSON = (
    *("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "9" * 4300, "9" * 5000, "0x10", "01", "1.", "'x'"),
    *('"\\ud800"', '"\\u0000"', '"\\x"', '"unended', "[" * 2_000, "[" * 200_000, '{"a":' * 100_000),
    *("[" * 900 + "]" * 900, "[1,]", "{,}", '{"a":1,"a":2}', "/*x*/1", "tru", "", "\ufeff1"),
)  # fmt: skip


@dataclass
class Said:
    """One request as it is sent: a line, or ``text`` instead of it, and bytes after it."""

    request: dict[str, Any]
    body: bytes = b""
    text: bytes | None = None

    def to_bytes(self) -> bytes:
        line = json.dumps(self.request).encode() + b"\n" if self.text is None else self.text
        return line + self.body


@dataclass
class Case:
    """A conversation: what is sent, what was planted in the store, and whether the host then goes silent."""

    family: str
    data: bytes
    plant: Callable[[Path], None] = field(default=lambda store: None)
    planted: str = ""
    silent: bool = False


class Host:
    """Says what a host says to push ``bundle`` to a device that has ``old``. ``deltas`` make some of its files."""

    def __init__(self, bundle: Bundle, old: Bundle, deltas: dict[str, bytes], python: str) -> None:
        self.bundle, self.deltas = bundle, deltas
        self.values: dict[str, Any] = {
            "manifest": bundle.manifest.to_bytes().decode(),
            "python": python,
            "who": "somebody@somewhere",
            "name": bundle.manifest.name,
            "base": old.digest,
            "wait_s": 0.0,
            "timeout_s": 20.0,
            "keep": 2,
            "runs": 1,
            "store": None,
            "requirements": "x==1",
            "engines": ["onnxruntime"],
            "files": [["pip-1-py3-none-any.whl", len(WHEEL), hashlib.sha256(WHEEL).hexdigest()]],
            "imports": ["json"],
            "install_s": 20.0,
        }

    def request(self, op: str, **values: Any) -> Said:
        """A valid one: each field with a known value, or else the plainest of its types."""
        fields = {name: self.values.get(name, plainest(kinds)) for name, kinds in FIELDS[op].items()}
        return Said({"op": op, "store": None, **fields, **values})

    def push(self, rng: random.Random) -> list[Said]:
        files = [self.file(name, rng) for name in self.bundle.manifest.files]
        without_bytes = [op for op in AFTER_BEGIN if "size" not in FIELDS[op] and op != "finish"]
        inner = [self.request(op) for op in without_bytes if rng.random() < 0.3]
        return [self.request("begin"), *inner, *files, self.request("finish")]

    def file(self, name: str, rng: random.Random) -> Said:
        """A file, or what makes it of an older one."""
        op, body = "file", self.bundle.file(name).read_bytes()
        if name in self.deltas and rng.random() < 0.4:
            op, body = "delta", self.deltas[name]
        said = self.request(op, name=name, offset=0, size=len(body))
        said.body = body
        return said

    def installation(self) -> list[Said]:
        said = [self.request(op) for op in ("install-begin", *AFTER_INSTALL_BEGIN)]
        said[1] = self.request("wheel", name=self.values["files"][0][0], offset=0, size=len(WHEEL))
        said[1].body = WHEEL
        return said

    def conversation(self, rng: random.Random) -> list[Said]:
        """A push, an installation, or some of the requests that stand alone."""
        kind = rng.random()
        if kind < 0.6:
            return self.push(rng)
        if kind < 0.7:
            return self.installation()
        return [self.request(rng.choice(ALONE)) for _ in range(rng.choice((1, 1, 2, 4)))]


def plainest(kinds: Sequence[type]) -> Any:
    for kind, value in ((type(None), None), (bool, False), (int, 1), (float, 1.0), (str, "x")):
        if kind in kinds:
            return value
    return {kind: kind() for kind in (list, dict)}.get(kinds[0])


# -- what is wrong -----------------------------------------------------------------------------------------------------


def valid(host: Host, rng: random.Random) -> Case:
    """Nothing, so that it is known what the others would have been."""
    return Case("valid", join(host.conversation(rng)))


def fields(host: Host, rng: random.Random) -> Case:
    """Fields replaced, removed, doubled or added."""
    said = host.conversation(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        one = rng.choice(said)
        name = rng.choice([*one.request, "more"])
        kind = rng.randrange(8)
        if kind == 0:
            one.request.pop(name, None)
        elif kind == 1:
            one.text = double(one.request, name, rng)
        elif kind == 2:
            one.text = with_text(one.request, name, rng.choice(ODD_JSON))
        else:
            one.request[name] = odd_value(name, one.request.get(name), rng)
    return Case("fields", join(said))


def odd_value(name: str, now: Any, rng: random.Random) -> Any:
    """Mostly of the type that is there."""
    if name == "store":  # where the host wants it; here that must not be this machine's own folders
        return rng.choice([text for text in (*ODD_TEXTS, *ODD_NUMBERS[:8], []) if not str(text).startswith("/")])
    if rng.random() < 0.15:
        return rng.choice((*ODD_NUMBERS, *ODD_TEXTS, *ODD_OTHERS))
    if isinstance(now, list):
        return odd_list(now, rng)
    numbers = isinstance(now, (int, float)) and not isinstance(now, bool)
    value = rng.choice(ODD_NUMBERS if numbers else ODD_TEXTS)
    if name == "size" and isinstance(now, int) and rng.random() < 0.5:
        return max(0, now + rng.choice((-1, 1, -now, 1000)))
    return value


def odd_list(now: list[Any], rng: random.Random) -> list[Any]:
    """Its items replaced, repeated or gone, or an item of an item replaced."""
    copy = json.loads(json.dumps(now))
    place = rng.randrange(len(copy) + 1)
    kind = rng.randrange(4)
    if kind == 0:
        return [*copy, *copy]
    if kind == 1 or place == len(copy):
        return [*copy, rng.choice((*ODD_NUMBERS, *ODD_TEXTS, *ODD_OTHERS))]
    if kind == 2 and isinstance(copy[place], list):
        copy[place][rng.randrange(len(copy[place]))] = rng.choice((*ODD_NUMBERS, *ODD_TEXTS))
        return copy
    del copy[place]
    return copy


def double(request: dict[str, Any], name: str, rng: random.Random) -> bytes:
    text = json.dumps(request)
    return (text[:-1] + f", {json.dumps(name)}: {json.dumps(odd_value(name, request.get(name), rng))}}}\n").encode()


def with_text(request: dict[str, Any], name: str, text: str) -> bytes:
    """A value that ``json.dumps`` would not write."""
    rest = {key: value for key, value in request.items() if key != name}
    return f"{json.dumps(rest)[:-1]}, {json.dumps(name)}: {text}}}\n".encode("utf-8", "surrogatepass")


def order(host: Host, rng: random.Random) -> Case:
    """Requests left out, said twice, exchanged, from another conversation, or of an unknown name."""
    said = host.push(rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(said))
        kind = rng.randrange(6)
        if kind == 0:
            del said[place]
        elif kind == 1:
            said.insert(place, said[rng.randrange(len(said))])
        elif kind == 2:
            rng.shuffle(said)
        elif kind == 3:
            said.insert(place, host.request(rng.choice(list(FIELDS))))
        elif kind == 4:
            said[place] = Said({**said[place].request, "op": rng.choice((*ODD_TEXTS, *ODD_OTHERS, *FIELDS))})
        else:
            said += host.conversation(rng)
        if not said:
            break
    return Case("order", join(said))


def texts(host: Host, rng: random.Random) -> Case:
    """Bytes flipped, cut, put in or copied, in lines and in the bytes of files."""
    said = host.conversation(rng)
    for one in rng.sample(said, min(len(said), rng.choice((1, 1, 2)))):
        kind = rng.randrange(4)
        if kind == 0:
            one.text = damaged_line(one, rng)
        elif kind == 1:
            one.body = mutations.damage(one.body, rng)
        elif kind == 2:
            one.text = rng.choice(ODD_JSON).encode("utf-8", "surrogatepass") + rng.choice((b"\n", b""))
        else:
            one.text = rng.randbytes(rng.choice((1, 10, 1000, 100_000))) + b"\n"
    return Case("texts", join(said))


def damaged_line(said: Said, rng: random.Random) -> bytes:
    """The name of the store and the commands that a host may have run stay as they are."""
    safe = {key: value for key, value in said.request.items() if key not in ("store", "health")}
    rest = {key: value for key, value in said.request.items() if key in ("store", "health")}
    line = mutations.damage(json.dumps(safe)[:-1].encode(), rng)
    return line + (b", " + json.dumps(rest)[1:].encode() if rest else b"}") + b"\n"


def cut(host: Host, rng: random.Random) -> Case:
    """It ends somewhere; in the one half of them the host is silent then and keeps the line open."""
    data = join(host.conversation(rng))
    return Case("cut", data[: rng.randrange(len(data))], silent=rng.random() < 0.1)


def large(host: Host, rng: random.Random) -> Case:
    """Megabytes: without a line's end, of blanks, in one text, nested, of small values, or as a manifest."""
    size = rng.choice((2**20, 4 * 2**20, 17 * 2**20, 40 * 2**20))
    kind = rng.randrange(8)
    if kind == 0:
        data = rng.choice((b"x", b" ", b"\x00", b"[", b'{"a":', b"\xff")) * size
    elif kind == 1:
        data = b"\n" * (size // 8)
    elif kind == 2:
        data = Said(host.request("status").request | {"more": "x" * size}).to_bytes()
    elif kind == 3:
        data = with_text(host.request("status").request, "more", "[" + "[]," * (size // 3) + "1]")
    elif kind == 4:
        data = with_text(host.request("status").request, "more", "9" * size)
    elif kind == 5:
        data = host.request("begin", who="w" * size).to_bytes() + host.request("finish").to_bytes()
    else:
        content = json.loads(host.values["manifest"])
        content["provenance"]["more"] = rng.choice(([[]] * (size // 8), "x" * size, ["\u00e9" * 1000] * (size // 2000)))
        data = host.request("begin", manifest=seal(content).decode()).to_bytes()
    return Case("large", data)


def manifests(host: Host, rng: random.Random) -> Case:
    """A push of a bundle whose manifest is another, its own hash made right again."""
    content = json.loads(host.values["manifest"])
    if rng.random() < 0.4:
        entry = dict(rng.choice(list(content["files"].values())))
        entry["size"] = rng.choice((entry["size"], 0, 1, 2**40, 2**63 - 1))
        content["files"][rng.choice(ODD_TEXTS)] = entry
    elif rng.random() < 0.2:
        content["files"] |= {f"file{number}": {"size": number, "sha256": "0" * 64} for number in range(1000)}
    else:
        mutations.replace_fields(content, mutations.ODD_VALUES, rng)
    try:
        text = seal(content).decode()
    except ValueError:  # half a surrogate
        text = json.dumps(content)
    said = host.push(rng)
    said[0].request["manifest"] = text
    return Case("manifests", join(said))


def planted(host: Host, rng: random.Random) -> Case:
    """A push into a store in which links, pipes or folders lie where its own files should."""
    digest, name = host.bundle.digest, host.bundle.manifest.name
    file = rng.choice([*host.bundle.manifest.files, MANIFEST_NAME])
    release, staged = f"releases/{name}/{digest}", f"staging/{digest}"
    places = (
        *("lock", "staging", "releases", "current", "journal", "cache", "staging/x", f"staging/removed-{digest}"),
        *(f"{staged}.deltas", f"{staged}.deltas/{file}"),
        *(staged, f"{staged}/{file}", f"releases/{name}", release, f"{release}/{file}", f"journal/{name}"),
        *(f"current/{name}", f"current/.{name}.x", f"cache/{digest}.verified", f"cache/{digest}"),
    )
    place, kind = rng.choice(places), rng.randrange(5)
    target = rng.choice(("canary", "canary/inner", "canary/inner/file", "canary/none"))
    planted = f"{place} is {('a link to ' + target, 'a pipe', 'a folder')[max(0, kind - 2)]}"

    def plant(store: Path) -> None:
        path = store / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(store / "was")
        if kind <= 2:
            path.symlink_to(store.parent / target)
        elif kind == 3:
            os.mkfifo(path)
        else:
            path.mkdir()
            (path / "x").write_bytes(b"x")

    said = host.push(rng) if rng.random() < 0.8 else host.conversation(rng)
    return Case("planted", join(said), plant, planted)


FAMILIES = {
    "valid": valid,
    "fields": fields,
    "order": order,
    "texts": texts,
    "cut": cut,
    "large": large,
    "manifests": manifests,
    "planted": planted,
}
#: Of every so many, how many are of a family. Those of megabytes take a second each.
SHARES = {"valid": 1, "fields": 12, "order": 6, "texts": 8, "cut": 5, "large": 1, "manifests": 6, "planted": 6}
TURNS = [family for family, share in SHARES.items() for _ in range(share)]


def case(host: Host, seed: int, number: int) -> Case:
    """The conversation of that number."""
    rng = random.Random(f"{seed} {number}")
    return FAMILIES[TURNS[number % len(TURNS)]](host, rng)


def join(said: Sequence[Said]) -> bytes:
    return b"".join(one.to_bytes() for one in said)
