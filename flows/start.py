"""Start the runs of due recipes: on a Prefect server, where each is created only once, or in this process."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

from requant.flows.last_run import first_commit, last_run
from requant.flows.watching import Due, Problem, Started
from requant.tasks.errors import RequantError
from requant.tasks.store import Store

DEPLOYMENT = "requantize/requantize"
MAX_RUNS = 3  # per base commit and recipe: the first run, and two more after failures
RETRY_AFTER = datetime.timedelta(minutes=10)  # Until then, a sweep may restart a crashed run itself.
RECIPES_PER_REQUEST = 60  # Each has MAX_RUNS keys, and the server returns at most 200 runs per request.
MAX_ATTEMPTS = 5  # to create a run


def start_here(store: Store, due: Sequence[Due]) -> Iterator[Started | Problem]:
    """Run due recipes in this process, one after another. The next pass tries a failed one again."""
    from requant.flows.report.report import verdict
    from requant.flows.requantize import RunFailed, requantize  # This imports torch.

    for one in due:
        outcome: Any = requantize(one.recipe, return_state=True).result(raise_on_failure=False)
        if isinstance(outcome, RunFailed):
            yield Problem(one.name, str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            yield Started(one.name, one.base, None, outcome.status, verdict(outcome))


def start_on_server(store: Store, due: Sequence[Due]) -> Iterator[Started | Problem]:
    """Create a flow run of the deployment for each due recipe that has none.

    The idempotency key of a run is `repo@sha:recipe digest`, so the server creates each run only once, even if several
    processes ask for it. Raises RequantError if the server does not answer, refuses, or lacks the deployment.
    """
    with server_errors(), get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        for begin in range(0, len(due), RECIPES_PER_REQUEST):
            batch = due[begin : begin + RECIPES_PER_REQUEST]
            keys = {one.name: run_keys(store, one) for one in batch}
            runs = _runs(client, [key for keys_of_one in keys.values() for key in keys_of_one])
            wanted: list[tuple[Due, str]] = []
            for one in batch:
                before = [runs[key] for key in keys[one.name] if key in runs]
                try:
                    if needs_another_run(before, store, one):
                        wanted.append((one, keys[one.name][len(before)]))
                except RequantError as error:
                    yield Problem(one.name, str(error))
            yield from _create(client, deployment.id, wanted)


def _create(client: SyncPrefectClient, deployment: UUID, wanted: list[tuple[Due, str]]) -> Iterator[Started | Problem]:
    """Create the runs in one request, which takes the server 24 ms per run instead of 60 ms one by one.

    Runs that the server could not create, because SQLite is locked, are asked for again. The server does not check the
    parameters: the recipes have been checked, and the runs check them again.
    """
    for attempt in range(MAX_ATTEMPTS):
        if not wanted:
            return
        bodies = [
            {
                "parameters": {"recipe": one.recipe.model_dump(mode="json")},
                "idempotency_key": key,
                "name": f"{one.base.repo_id}@{one.base.sha[:7]}",
                "tags": ["watch"],
                "enforce_parameter_schema": False,
            }
            for one, key in wanted
        ]
        route: Any = f"/deployments/{deployment}/create_flow_run/bulk"  # The client has no method for it yet.
        answer = client.request("POST", route, json=bodies)
        results = answer.raise_for_status().json()["results"]
        failed = []
        for (one, key), result in zip(wanted, results, strict=True):
            if result["status"] == "CREATED":
                yield Started(one.name, one.base, result["flow_run_id"], "scheduled")
            elif attempt + 1 < MAX_ATTEMPTS:
                failed.append((one, key))
            else:
                sentence = str(result["error"]).splitlines()[0][:300]
                yield Problem(one.name, f"the Prefect server does not take its run ({sentence}): see its log")
        wanted = failed
        time.sleep(1.0 if failed else 0.0)


def run_keys(store: Store, due: Due) -> list[str]:
    """Return the idempotency keys of a commit and recipe: one for each run that may be started."""
    key = f"{due.recipe.base.name}@{first_commit(store, due.recipe, due.base)}:{due.recipe.digest}"
    return [key, *(f"{key}:{number}" for number in range(2, MAX_RUNS + 1))]


def needs_another_run(before: Sequence[FlowRun], store: Store, due: Due) -> bool:
    """Check whether another run of a due recipe is needed. `before` has its earlier runs, the latest last.

    None is needed while a run waits or works, or after a run that somebody cancelled. A failed or crashed run is
    followed by another one after a while. A completed run is followed by another one only if the base changed since,
    and changed back. Raises RequantError if a person has to look at it.
    """
    state = before[-1].state if before else None
    if not before:
        return True
    if state is None or not state.is_final() or state.is_cancelled():
        return False
    if state.is_completed():
        last = last_run(store, due.recipe)  # The run wrote it before it ended.
        if last is None:
            raise RequantError(
                f"run {before[-1].name} ended well, and the store {store.url} knows nothing of it: "
                "set REQUANT_STORE to the workers' store"
            )
        if last.content == due.base.content:
            return False
    elif datetime.datetime.now(datetime.UTC) - state.timestamp < RETRY_AFTER:
        return False
    if len(before) >= MAX_RUNS:
        raise RequantError(
            f"{len(before)} runs of {due.base.name} were started, the last one ended {state.name} "
            f"({state.message or 'without a word'}): mend that, and start one by hand"
        )
    return True


def _runs(client: SyncPrefectClient, keys: list[str]) -> dict[str, FlowRun]:
    """Return the flow runs that have one of these idempotency keys, by key."""
    run_filter = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
    return {run.idempotency_key or "": run for run in client.read_flow_runs(flow_run_filter=run_filter, limit=200)}


@contextlib.contextmanager
def server_errors() -> Iterator[None]:
    """Turn the errors of the Prefect client inside into RequantError with a sentence."""
    url = os.environ.get("PREFECT_API_URL")
    try:
        yield
    except ObjectNotFound as error:
        raise RequantError(
            f"the Prefect server {url} has no deployment {DEPLOYMENT}: deploy it with deployments/prefect.yaml"
        ) from error
    except httpx.HTTPStatusError as error:
        hint = ": set PREFECT_API_AUTH_STRING" if error.response.status_code in {401, 403} else ""
        raise RequantError(f"the Prefect server {url} refuses ({_server_words(error)}){hint}") from error
    except httpx.HTTPError as error:
        raise RequantError(f"the Prefect server {url} does not answer ({error}): start it") from error


def _server_words(error: httpx.HTTPStatusError) -> str:
    """Return the status and, if the server gave it, the reason."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return f"{error.response.status_code}, {str(error.response.json()['detail'])[:300]}"
    return str(error.response.status_code)
