"""Starting the runs of what is due: on a Prefect server, once however often it is asked for, or here."""

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
MAX_RUNS = 3  # runs of one commit and recipe, of which a later one is started when those before it failed
RETRY_AFTER = datetime.timedelta(minutes=10)  # before that: what restarts crashed runs gets its turn first
BATCH = 60  # recipes a request: each has ATTEMPTS keys, and the server answers with 200 runs at most
MAX_TRIES = 5  # to have the server take a run


def start_here(store: Store, due: Sequence[Due]) -> Iterator[Started | Problem]:
    """Run them in this process, one after another; what fails is said, and tried again by the next pass."""
    from requant.flows.requantize import RunFailed, requantize  # torch and all

    for each in due:
        outcome: Any = requantize(each.recipe, return_state=True).result(raise_on_failure=False)
        if isinstance(outcome, RunFailed):
            yield Problem(each.name, str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            yield Started(each.name, each.base, None, outcome.status)


def start_on_server(store: Store, due: Sequence[Due]) -> Iterator[Started | Problem]:
    """Create a flow run of the deployment for each, unless there is one; a worker runs it.

    Runs are named by the idempotency key `repo@sha:recipe digest`, which the server has once, whoever asks and however
    many at a time. Raises RequantError if the server does not answer, refuses, or lacks the deployment.
    """
    with server_errors(), get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(DEPLOYMENT)
        for begin in range(0, len(due), BATCH):
            keys = {each.name: run_keys(store, each) for each in due[begin : begin + BATCH]}
            runs = _runs(client, [key for those in keys.values() for key in those])
            wanted: list[tuple[Due, str]] = []
            for each in due[begin : begin + BATCH]:
                before = [runs[key] for key in keys[each.name] if key in runs]
                try:
                    if another(before, store, each):
                        wanted.append((each, keys[each.name][len(before)]))
                except RequantError as error:
                    yield Problem(each.name, str(error))
            yield from _create(client, deployment.id, wanted)


def _create(client: SyncPrefectClient, deployment: UUID, wanted: list[tuple[Due, str]]) -> Iterator[Started | Problem]:
    """Create the runs, all in one request: 24 ms of the server's time each, where one at a time takes it 60.

    What it does not take (SQLite is locked) is asked for again. Recipes have been checked, and their runs check
    them once more: the server need not.
    """
    for attempt in range(MAX_TRIES):
        if not wanted:
            return
        bodies = [
            {
                "parameters": {"recipe": each.recipe.model_dump(mode="json")},
                "idempotency_key": key,
                "name": f"{each.base.repo_id}@{each.base.sha[:7]}",
                "tags": ["watch"],
                "enforce_parameter_schema": False,
            }
            for each, key in wanted
        ]
        route: Any = f"/deployments/{deployment}/create_flow_run/bulk"  # the client has no method for it yet
        answer = client.request("POST", route, json=bodies)
        results = answer.raise_for_status().json()["results"]
        failed = []
        for (each, key), result in zip(wanted, results, strict=True):
            if result["status"] == "CREATED":
                yield Started(each.name, each.base, result["flow_run_id"], "scheduled")
            elif attempt + 1 < MAX_TRIES:
                failed.append((each, key))
            else:
                sentence = str(result["error"]).splitlines()[0][:300]
                yield Problem(each.name, f"the Prefect server does not take its run ({sentence}): see its log")
        wanted = failed
        time.sleep(1.0 if failed else 0.0)


def run_keys(store: Store, due: Due) -> list[str]:
    """The idempotency keys of a commit and recipe: of the first run, and of those after a failed one."""
    key = f"{due.recipe.base.repo_id}@{first_commit(store, due.recipe, due.base)}:{due.recipe.digest}"
    return [key, *(f"{key}:{number}" for number in range(2, MAX_RUNS + 1))]


def another(before: Sequence[FlowRun], store: Store, due: Due) -> bool:
    """Whether one more run is to be started after those before it, the latest last.

    One that waits, works or was cancelled (somebody meant it) is left alone. After one that failed or crashed there
    is another, later. After one that ended well there is another only if the base has moved on since, and back.
    Raises RequantError if somebody has to look.
    """
    state = before[-1].state if before else None
    if not before:
        return True
    if state is None or not state.is_final() or state.is_cancelled():
        return False
    if state.is_completed():
        last = last_run(store, due.recipe)  # which it wrote before it ended
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
    """The flow runs that have one of these idempotency keys."""
    only = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
    return {run.idempotency_key or "": run for run in client.read_flow_runs(flow_run_filter=only, limit=200)}


@contextlib.contextmanager
def server_errors() -> Iterator[None]:
    """Raise a sentence for what the Prefect client raises inside."""
    url = os.environ.get("PREFECT_API_URL")
    try:
        yield
    except ObjectNotFound as error:
        raise RequantError(
            f"the Prefect server {url} has no deployment {DEPLOYMENT}: deploy it with deployments/prefect.yaml"
        ) from error
    except httpx.HTTPStatusError as error:
        hint = ": set PREFECT_API_AUTH_STRING" if error.response.status_code in {401, 403} else ""
        raise RequantError(f"the Prefect server {url} refuses ({_detail(error)}){hint}") from error
    except httpx.HTTPError as error:
        raise RequantError(f"the Prefect server {url} does not answer ({error}): start it") from error


def _detail(error: httpx.HTTPStatusError) -> str:
    """The server's own words, else the status."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return f"{error.response.status_code}, {str(error.response.json()['detail'])[:300]}"
    return str(error.response.status_code)
