"""Check whether a work pool of a Prefect server can take runs, and give notice while a run waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

LOOK_INTERVAL_S = 60.0  # between two looks at the pool, and before the first one


def problem_of_pool(client: SyncPrefectClient, pool: str) -> str | None:
    """Say in a sentence why no run of a work pool starts, and what to do; None if a worker is there to take them.

    For Prefect, a worker is online if it sent a heartbeat within the last 90 s.
    """
    try:
        if client.read_work_pool(pool).is_paused:
            return f"the work pool {pool} is paused: resume it with `prefect work-pool resume {pool}`"
        workers = client.read_workers_for_work_pool(pool)
    except ObjectNotFound:
        return f"the Prefect server has no work pool {pool}: run `requant deploy`"
    if any(worker.status == "ONLINE" for worker in workers):
        return None
    start = f"requant worker --pool {pool} --name {pool}-0" + (" --limit 1" if pool == "gpu" else "")
    return f"no worker of the work pool {pool} is online: start one with `{start}`"


class WorkerNotice:
    """Gives notice once that no worker takes a waiting run, and once that a worker has taken it."""

    def __init__(
        self,
        problem: Callable[[], str | None],
        tell: Callable[[str | None], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a notice. `problem` says why the pool takes no run, and `tell` gets each change of that."""
        self._problem = problem
        self._tell = tell
        self._clock = clock
        self._last_look_s: float | None = None
        self._last_problem: str | None = None

    def look(self, waiting: bool) -> None:
        """Look at the pool once a minute while the run waits. Raises what `problem` and `tell` raise."""
        now_s = self._clock()
        if not waiting:
            self._last_look_s = None
            self._say(None)
        elif self._last_look_s is None:
            self._last_look_s = now_s
        elif now_s - self._last_look_s >= LOOK_INTERVAL_S:
            self._last_look_s = now_s
            self._say(self._problem())

    def _say(self, problem: str | None) -> None:
        if problem != self._last_problem:
            self._tell(problem)
            self._last_problem = problem
