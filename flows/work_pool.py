"""Whether a work pool of a Prefect server can take runs."""

from __future__ import annotations

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound


def problem_of_pool(client: SyncPrefectClient, pool: str) -> str | None:
    """Say in a sentence why no run of a work pool starts, and what to do; None if a worker is there to take them.

    Prefect takes a worker for online that sent a heartbeat within the last 90 s.
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
