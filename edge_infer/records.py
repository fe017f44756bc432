"""What a dataclass that is never changed needs besides its fields, written once.

``@dataclass(frozen=True)`` writes and compiles six methods for every class, which takes 0.4 ms on a server and ten
times as long on a board: with two dozen classes, longer than to open a model. ``@dataclass(eq=False, repr=False)`` on a
``Record`` compiles ``__init__`` alone. Standard library only, Python >= 3.8: a push sends this file along.
"""

from __future__ import annotations

from typing import Any


class Record:
    """Compared, hashed and shown by its fields, each of which is set once."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"{type(self).__name__}.{name} cannot be changed; dataclasses.replace makes another")
        self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be removed")

    def __eq__(self, other: object) -> bool:
        return self.__dict__ == other.__dict__ if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"
