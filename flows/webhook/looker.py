"""Check repos in a thread, one pass after another, while the relay answers requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Set
from typing import Protocol

from requant.flows.watching import Pass
from requant.tasks.errors import RequantError

MAX_WAITING_REPOS = 1000  # A repo counts once, however many payloads name it.
log = logging.getLogger(__name__)


class Look(Protocol):
    def __call__(self, repos: Set[str]) -> Pass:
        """Make a pass of the watch over the recipes whose base is one of these repos."""
        ...


class Looker:
    """Collects the names of repos, and checks all that have come in one pass."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._waiting: set[str] = set()
        self._change = threading.Condition()
        threading.Thread(target=self._work, name="looker", daemon=True).start()

    def look_at(self, repo: str) -> bool:
        """Have a repo checked soon. Return False if too many are waiting."""
        with self._change:
            if repo not in self._waiting and len(self._waiting) >= MAX_WAITING_REPOS:
                return False
            self._waiting.add(repo)
            self._change.notify()
        return True

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting)
                repos, self._waiting = frozenset(self._waiting), set()
            try:
                done = self._look(repos)
            except RequantError as error:
                log.warning("nothing was started: %s; the scheduled watch looks again", error)
            except Exception:  # The thread must survive any error of a single pass.
                log.exception("a pass failed")
            else:
                log.info("%s", done.text)
