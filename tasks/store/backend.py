"""The interface of a place that can hold a store: a few operations on named objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One object in a listing: its size in bytes, and when it was last written, in seconds of the store's clock."""

    key: str
    size: int
    modified: float


class Backend(Protocol):
    """Objects by key (`a/b/c`). A failed write leaves no partial object. Only `write_new` is conditional."""

    @property
    def url(self) -> str:
        """The store's address, as REQUANT_STORE spells it."""
        ...

    def check(self) -> None:
        """Check at once, without retries, whether the place can be used. Raises StoreError."""
        ...

    def read(self, key: str) -> bytes | None:
        """Return the content of an object, or None if there is none."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Create or replace a small object."""
        ...

    def write_new(self, key: str, data: bytes) -> bool:
        """Create a small object atomically. Return False, and write nothing, if there already is one."""
        ...

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if there is none."""
        ...

    def put_file(self, key: str, path: Path, sha256: str | None = None) -> None:
        """Create an object from a local file of any size. The file may be moved or linked, but not changed.

        Raises CorruptBlob if bytes are sent to a server and do not have this sha256.
        """
        ...

    def get_file(self, key: str, path: Path) -> str:
        """Download an object of any size into a new local file, and return the sha256 of the received bytes."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield all keys below `prefix/`."""
        ...

    def items(self, prefix: str) -> Iterator[Item]:
        """Yield all objects below `prefix/`."""
        ...

    def now(self) -> float:
        """Return the time of the clock that sets `Item.modified`. Ages are never measured with another clock."""
        ...

    def leftovers(self, before: float) -> Iterator[str]:
        """Yield names of what killed writers left and last wrote before that time: temporary files, or unfinished
        multipart uploads."""
        ...

    def discard(self, leftover: str) -> None:
        """Delete one of the `leftovers`. One that no longer exists is no error."""
        ...

    def delete(self, key: str, before_try: Callable[[], None] = lambda: None) -> None:
        """Delete an object, if there is one. `before_try` is called before each attempt, and may raise."""
        ...
