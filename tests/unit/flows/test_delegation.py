"""A run that waits for stages on the gpu pool."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Crashed, Failed

from requant.flows import delegation, gpu_pool, requantize
from requant.flows.delegation import CrashOutcome, StageFailed, StageRequest, gpu_pool_stages
from requant.flows.report.report import RunReport
from requant.tasks.artifact import Manifest
from requant.tasks.errors import CheckpointError, EngineFailed, RecipeError, RequantError, StoreError
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.pipeline.stage import Stage, StageResult
from requant.tasks.planning.findings import Findings
from requant.tasks.planning.outside import task_findings
from requant.tasks.quantize import STAGE as QUANTIZE
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.record import StageRecord
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.store import open_store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import Text
from requant.tasks.validate import STAGE as VALIDATE
from tests.factories.measured import good

RECIPE = parse_recipe({"base": {"repo_id": "a/b"}})


class Waiting:
    """Waits for a run of the gpu pool with these states, and handles each crash with the next outcome."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, states: list[State], *outcomes: CrashOutcome) -> None:
        run, left, crashes = SimpleNamespace(id=uuid4(), name="a run"), iter(states), iter(outcomes)
        monkeypatch.setattr(delegation, "POLL_INTERVAL_S", 0.0)
        monkeypatch.setattr(delegation, "_start_run", lambda *arguments: run)
        monkeypatch.setattr(delegation, "_state", lambda run_id: next(left))
        monkeypatch.setattr(delegation, "_restart", lambda run_id: next(crashes))

    def __call__(self, stage: Stage) -> None:
        delegation._run_and_wait(StageRequest(stage, "key", RECIPE, {}))


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="requant"):
        yield


@pytest.mark.parametrize(("stage", "resumes"), [(QUANTIZE, True), (VALIDATE, False)])
def test_only_quantize_is_said_to_resume_after_a_crash(
    stage: Stage, resumes: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Waiting(monkeypatch, [Crashed(message="no heartbeat"), Completed()], CrashOutcome.RESTARTED)(stage)
    assert "a run crashed (no heartbeat) and is restarted" in caplog.text
    assert ("finished block" in caplog.text) == resumes


def test_a_restart_is_logged_only_when_the_server_made_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    states = [Crashed(), Crashed(), Crashed(), Completed()]
    Waiting(monkeypatch, states, CrashOutcome.UNKNOWN, CrashOutcome.UNKNOWN, CrashOutcome.RESTARTED)(QUANTIZE)
    assert caplog.text.count("restarted") == 1


def test_a_crash_that_is_final_fails_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageFailed, match="no heartbeat"):
        Waiting(monkeypatch, [Crashed(message="no heartbeat")], CrashOutcome.FINAL)(QUANTIZE)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (EngineFailed("no memory"), EngineFailed),
        (CheckpointError("no weights"), CheckpointError),
        (StoreError("no such key"), StageFailed),
        (RecipeError("another version"), StageFailed),
    ],
)
def test_a_waiting_run_learns_whether_engine_or_checkpoint_failed(
    raised: RequantError, seen: type[RequantError], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("watch_own_run", "crash_stale_task_runs", "exit_if_run_is_over"):  # no flow runs here
        monkeypatch.setattr(gpu_pool, name, lambda: None)

    def work() -> None:
        raise raised

    state = gpu_pool.run_to_final_state(work)
    stored = Failed(name=state.name, message=state.message)  # what the server keeps of it
    with pytest.raises(RequantError, match=str(raised)) as error:
        Waiting(monkeypatch, [stored])(VALIDATE)
    assert error.type is seen


@pytest.mark.parametrize("stage", ["acceptance", "probe"])
def test_what_neither_engine_nor_checkpoint_caused_fails_the_run(
    stage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing deployment, a cancelled or deleted run: the gates must not be left unmeasured in silence."""
    recipe = parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": {"engine": "vllm"}, "probes": {}})
    text = Text("builtin:mixed-evaluation", "a" * 64)
    store = open_store(tmp_path.as_uri())
    context = requantize.RunContext(store, recipe, Calibration.of(text), text, {}, frozenset({stage}))
    made = StageResult("download", "k", "ran", 0.0, Manifest(()), StageRecord())
    stages, report = requantize.MadeStages(made, made, made), RunReport(recipe)
    report.settled, report.measured, report.benchmark = recipe, good(), BenchmarkResult(engine="vllm")
    judge = {"acceptance": requantize._drafts_in_engine, "probe": requantize._judge_probes}[stage]

    failures = iter((StageFailed("no deployment"), EngineFailed("no memory")))

    def fail(*arguments: object, **reads: object) -> None:
        raise next(failures)

    monkeypatch.setattr(requantize, "run_on_gpu_pool", fail)
    with pytest.raises(StageFailed, match="no deployment"):
        judge(context, report, stages)
    assert judge(context, report, stages), "the gates say why"


def test_a_cancelled_run_of_the_gpu_pool_fails_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageFailed, match="ended Cancelled"):
        Waiting(monkeypatch, [Cancelled()])(VALIDATE)


def test_a_worker_without_lm_eval_can_delegate_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Revision("a/b", "0" * 40, (HubFile("model.safetensors", 54_000_000_000, "0" * 40, "0" * 64),))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = parse_recipe({"base": {"repo_id": "a/b"}, "eval": {"tasks": ["gsm8k"]}})
    (problem,) = task_findings(asked, {"validate"}, gpu_pool_stages(asked, base)).problems
    assert problem.startswith("validate: eval.tasks: gsm8k needs lm-eval")
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a-deployment")
    assert task_findings(asked, {"validate"}, gpu_pool_stages(asked, base)) == Findings()
