"""Which run used which artifacts: what `requant store ls` and `gc --keep-last` know of recipes and bases.

`runs/<recipe>/<commit of the base>` is rewritten while a run goes on, so that its age says when it was last alive; the
next run of the same recipe on the same commit takes its place.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from requant.tasks.store.background import repeated
from requant.tasks.store.store import Store

BEAT_S = 60.0  # seconds; gc's grace period must be much longer
POLL_S = 1.0  # seconds between two looks at what the run has used


@dataclass(frozen=True)
class Run:
    """A run: the digest of its recipe, its base as repo@commit, what it makes, and what it used so far.

    `artifacts`: pairs of stage and stage key. `seen`: when it was last alive, by the store's clock.
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
        """None for what is no run: what it names is then known by its age alone."""
        try:
            document = json.loads(text)
            recipe, base, makes = (str(document[name]) for name in ("recipe", "base", "makes"))
            return cls(recipe, base, makes, tuple((str(s), str(k)) for s, k in document["artifacts"]), seen)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


@contextlib.contextmanager
def recorded(store: Store, describe: Callable[[], Run | None]) -> Iterator[None]:
    """Keep the record of a run while it lasts, to its last artifact; None from `describe`: nothing to tell yet."""
    written: Run | None = None
    at = 0.0

    def keep() -> None:
        nonlocal written, at
        run = describe()
        if run is not None and (run != written or time.monotonic() - at > BEAT_S):
            store.backend.write(run.key, run.to_json())
            written, at = run, time.monotonic()

    # A store that is lost holds up no run that ends.
    with repeated(keep, POLL_S, "the run's record could not be written", patience=10):
        yield
