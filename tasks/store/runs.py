"""Records of runs and the artifacts that they used, for `requant store ls` and `gc --keep-last`.

A run rewrites its record `runs/<recipe>/<commit of the base>` while it goes on. The record's age tells when the run was
last alive. The next run of the same recipe on the same commit replaces it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from requant.tasks.background import repeated
from requant.tasks.store.store import Store

BEAT_S = 60.0  # gc's grace period must be much longer
POLL_S = 1.0


@dataclass(frozen=True)
class Run:
    """A run: the digest of its recipe, its base as repo@commit, what it makes, and the artifacts that it used so far.

    `artifacts` are pairs of stage and stage key. `seen` is when the run was last alive, by the store's clock.
    """

    recipe: str
    base: str
    makes: str
    artifacts: tuple[tuple[str, str], ...]
    seen: float = 0.0

    @property
    def key(self) -> str:
        return f"runs/{self.recipe}/{self.base.rpartition('@')[2]}"

    def to_json(self) -> bytes:
        document = {"recipe": self.recipe, "base": self.base, "makes": self.makes, "artifacts": self.artifacts}
        return json.dumps(document, indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes, seen: float) -> Run | None:
        """Parse the record of a run. Return None for one that cannot be read."""
        try:
            document = json.loads(text)
            recipe, base, makes = (str(document[name]) for name in ("recipe", "base", "makes"))
            return cls(recipe, base, makes, tuple((str(s), str(k)) for s, k in document["artifacts"]), seen)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


@contextlib.contextmanager
def recorded(store: Store, describe: Callable[[], Run | None]) -> Iterator[None]:
    """Write the record of a run whenever it changes, at least every BEAT_S seconds, and once more at the end.

    `describe` returns the run, or None while there is nothing to record.
    """
    written: Run | None = None
    written_at = 0.0

    def write() -> None:
        nonlocal written, written_at
        run = describe()
        if run is not None and (run != written or time.monotonic() - written_at > BEAT_S):
            store.backend.write(run.key, run.to_json())
            written, written_at = run, time.monotonic()

    # The time limit keeps a store that is out of reach from delaying the end of the run.
    with repeated(write, POLL_S, "the run's record could not be written", join_timeout_s=10):
        yield
