"""What a place must be able to do to hold a store: a few operations on named objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One object as a listing shows it: its size in bytes, when it was last written in seconds of the store's clock."""

    key: str
    size: int
    modified: float


class Backend(Protocol):
    """Objects by key (`a/b/c`). Every write is whole or absent; only `write_new` is conditional."""

    @property
    def url(self) -> str:
        """The store's address, as REQUANT_STORE spells it."""
        ...

    def check(self) -> None:
        """Find out at once, without retries, whether the place can be used. Raises StoreError."""
        ...

    def read(self, key: str) -> bytes | None:
        """The whole object, or None."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Create or replace a small object."""
        ...

    def write_new(self, key: str, data: bytes) -> bool:
        """Create a small object; False, and nothing written, if there is one already. Atomic."""
        ...

    def size(self, key: str) -> int | None:
        """The object's size in bytes, or None."""
        ...

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Create an object from a local file of any size. The file may be moved or linked, not changed.

        Where bytes are sent, raises CorruptBlob if they do not have this sha256.
        """
        ...

    def get_file(self, key: str, path: Path) -> str:
        """Fetch an object of any size into a new local file; the sha256 of what came."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys below `prefix/`."""
        ...

    def items(self, prefix: str) -> Iterator[Item]:
        """All objects below `prefix/`."""
        ...

    def now(self) -> float:
        """The time by the clock that `Item.modified` is of: no machine's own clock is compared with it."""
        ...

    def leftovers(self, before: float) -> Iterator[str]:
        """What writers that were killed left, last written `before`: temporary files, unfinished multipart uploads."""
        ...

    def discard(self, leftover: str) -> None:
        """Remove what `leftovers` named; no error if it is gone."""
        ...

    def delete(self, key: str, before_try: Callable[[], None] = lambda: None) -> None:
        """Remove an object; no error if there is none. `before_try` is called before each try, and may raise."""
        ...
