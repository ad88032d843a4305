"""A cancelled run on a real Prefect server: what it has asked of the gpu pool is cancelled with it."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient

from tests.factories.forked import forked
from tests.factories.paths import ROOT
from tests.factories.requant import Requant, finish

# It asks as requantize does, and is cancelled while it waits. No worker takes what it asks for.
PROGRAM = """
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Cancelling, Completed, Running
from requant.flows.delegation import _start_run
from requant.flows.requantize import requantize

@flow(persist_result=False, on_cancellation=requantize.on_cancellation_hooks)
def cancelled():
    parameters = {"recipe": {"base": {"repo_id": "a/b"}}, "base": "b", "key": "k"}
    begun, waiting, done = (_start_run("quantize", key, parameters) for key in ("begun", "waiting", "done"))
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(begun.id, Running(), force=True)
        client.set_flow_run_state(done.id, Completed(), force=True)
    print(begun.id, waiting.id, done.id)
    return Cancelling()

cancelled(return_state=True)
"""


def test_what_a_cancelled_run_has_asked_of_other_workers_is_cancelled(
    prefect_server: str, environment: dict[str, str], tmp_path: Path
) -> None:
    deployed = Requant(tmp_path, environment)("deploy", str(ROOT / "deployments"))
    assert deployed.status == 0, deployed.stderr
    parent = finish(forked(["-c", PROGRAM], environment))
    assert parent.status == 0, parent.stderr
    with SyncPrefectClient(prefect_server) as client:
        runs = [client.read_flow_run(UUID(run)) for run in parent.stdout.split()]
        for run in runs:
            client.delete_flow_run(run.id)
    assert [run.state_type.value for run in runs if run.state_type] == ["CANCELLING", "CANCELLED", "COMPLETED"]
