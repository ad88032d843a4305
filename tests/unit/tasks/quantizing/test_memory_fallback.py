"""Running the child: the ladder outlives the process, and what starves is told from what was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest

from requant.tasks.errors import OutOfMemory, QuantizeDied, QuantizeFailed, StageTimeout
from requant.tasks.quantizing import memory_fallback as run
from requant.tasks.quantizing.events import Event, Failed, SettingsChosen, Warned
from requant.tasks.quantizing.failures import FailureKind
from requant.tasks.quantizing.job import Job, JobResult, Rung
from requant.tasks.quantizing.memory_fallback import Progress, ladder, quantize_with_fallback, run_child
from tests.factories.quantizing import job_of
from tests.factories.requant import wait_for
from tests.factories.sites import begin_with, give_secrets, secrets_given

JOB = job_of(batch_size=4)
RESULT = JobResult(checkpoint=Path("out"), settings=SettingsChosen(), bits={}, peak_gpu_bytes=None)


class Child:
    """Stands in for the process: does what the script says, attempt by attempt, and notes the settings it got."""

    def __init__(self, *script: str, resolved: bool = False) -> None:
        self.script, self.resolved = list(script), resolved
        self.rungs: list[Rung] = []

    def __call__(self, job: Job, folder: Path, report: Any, deadline_s: float) -> Failed | None:
        self.rungs.append(job.rung)
        with (folder / "events.jsonl").open("a") as stream:
            for event in ({"event": "settings", "low_gpu_mem": self.resolved}, {"event": "block", "name": "layers.1"}):
                stream.write(json.dumps({"seconds": 0.0, **event}) + "\n")
        what = self.script.pop(0)
        if what == "done":
            (folder / "result.json").write_text(RESULT.model_dump_json())
            return None
        if what == "killed":
            raise QuantizeDied("SIGKILL", killed=True)
        if what == "crashed":
            raise QuantizeDied("SIGSEGV")
        return Failed(kind=FailureKind(what), text=what)


def descend(child: Child, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(run, "run_child", child)
    _, attempts = quantize_with_fallback(JOB, folder, lambda event: None)
    return [attempt.model_dump(exclude_unset=True) for attempt in attempts]


def test_out_of_memory_steps_down_and_the_record_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child("oom", "oom", "oom", "done")
    attempts = descend(child, tmp_path, monkeypatch)
    assert [(rung.batch_size, rung.low_gpu_mem) for rung in child.rungs] == [
        (4, "auto"), (4, True), (2, True), (1, True),
    ]  # fmt: skip
    assert [a["ended"] for a in attempts] == ["oom", "oom", "oom", "done"]
    assert attempts[0]["block"] == "layers.1"


def test_a_rung_that_the_machine_is_on_already_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child("oom", "done", resolved=True)
    descend(child, tmp_path, monkeypatch)
    assert [rung.batch_size for rung in child.rungs] == [4, 2]


def test_the_last_rung_keeps_activations_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(*["oom"] * 4, "done")
    descend(child, tmp_path, monkeypatch)
    assert child.rungs[-1].offload and child.rungs[-1].batch_size == 1


def test_below_the_last_rung_is_an_error_that_names_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemory, match=r"GPU is out of memory .* one sample at a time, with offload, in layers\.1"):
        descend(Child(*["oom"] * 5), tmp_path, monkeypatch)


def test_a_new_process_goes_on_at_the_rung_of_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(QuantizeDied):
        descend(Child("oom", "oom", "killed"), tmp_path, monkeypatch)
    child = Child("done")
    attempts = descend(child, tmp_path, monkeypatch)
    assert child.rungs[0].batch_size == 2
    assert [a["ended"] for a in attempts] == ["oom", "oom", "died", "done"]


def test_what_the_kernel_kills_for_memory_gets_a_smaller_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not low_gpu_mem, which would move even more to the memory that ran out."""
    counts = iter((3, 4, 4))
    monkeypatch.setattr(run, "kernel_kills", lambda: next(counts))
    child = Child("killed", "done")
    attempts = descend(child, tmp_path, monkeypatch)
    assert [rung.batch_size for rung in child.rungs] == [4, 2]
    assert attempts[0]["ended"] == "host oom"


@pytest.mark.parametrize("asked", ["auto", False])
def test_without_host_memory_no_later_attempt_moves_samples_or_activations_to_it(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child("host oom", "host oom", "host oom")
    monkeypatch.setattr(run, "run_child", child)
    with pytest.raises(OutOfMemory, match=r"machine is out of memory .* one sample at a time, in .* use a machine"):
        quantize_with_fallback(job_of(batch_size=4, low_gpu_mem=asked), tmp_path, lambda event: None)
    assert [(rung.batch_size, rung.low_gpu_mem, rung.offload) for rung in child.rungs] == [
        (4, asked, False), (2, asked, False), (1, asked, False),
    ]  # fmt: skip


def test_a_gpu_without_memory_gets_low_gpu_mem_even_after_the_host_had_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child("host oom", "oom", "done")
    descend(child, tmp_path, monkeypatch)
    assert [(rung.batch_size, rung.low_gpu_mem) for rung in child.rungs] == [(4, "auto"), (2, "auto"), (1, True)]


def test_deaths_of_any_kind_count_but_the_last_must_be_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "kernel_kills", lambda: 0)
    for _ in range(4):
        with pytest.raises(QuantizeDied):
            descend(Child("crashed"), tmp_path, monkeypatch)
    assert json.loads((tmp_path / "ladder.json").read_text())["deaths"] == {"layers.1": 4}
    child = Child("killed", "done")
    descend(child, tmp_path, monkeypatch)
    assert [rung.batch_size for rung in child.rungs] == [4, 2]


def test_a_death_before_the_first_block_is_counted_across_runs(tmp_path: Path) -> None:
    path = tmp_path / "ladder.json"
    path.write_text(json.dumps({"rung": 1, "compiled": True, "attempts": [], "deaths": {"None": 2}}))
    progress = Progress(path)
    assert (progress.rung_index, progress.deaths, progress.deaths_block) == (1, 2, None)
    assert progress.count_death(None) == 3 and progress.count_death("layers.0") == 1


def test_a_stage_that_takes_too_long_ends_its_child_and_says_that_blocks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with("import signal; signal.pause()", tmp_path, monkeypatch)
    with pytest.raises(StageTimeout, match=r"within 47\.5 hours; its finished blocks are kept: start the run again"):
        quantize_with_fallback(JOB, tmp_path, lambda event: None, deadline_s=0.0)


def test_killed_again_and_again_in_one_block_it_gets_a_smaller_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "kernel_kills", lambda: 0)
    for _ in range(2):
        with pytest.raises(QuantizeDied):
            descend(Child("killed"), tmp_path, monkeypatch)
    child = Child("killed", "done")
    descend(child, tmp_path, monkeypatch)
    assert [rung.batch_size for rung in child.rungs] == [4, 2]


def test_a_failed_compilation_is_tried_once_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child("compile", "done")
    descend(child, tmp_path, monkeypatch)
    assert [rung.torch_compile for rung in child.rungs] == ["auto", False]
    with pytest.raises(QuantizeFailed):
        descend(Child("compile", "compile"), _fresh(tmp_path), monkeypatch)


def _fresh(folder: Path) -> Path:
    (folder / "fresh").mkdir()
    return folder / "fresh"


def test_a_damaged_ladder_file_begins_at_the_top(tmp_path: Path) -> None:
    (tmp_path / "ladder.json").write_text('{"rung": ')
    assert Progress(tmp_path / "ladder.json").rung_index == 0
    assert next(iter(ladder(JOB.rung))).batch_size == 4


def test_the_child_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs code of the base's repo where the recipe allows that."""
    give_secrets(tmp_path, monkeypatch)
    with pytest.raises(QuantizeDied):
        run_child(JOB, tmp_path, lambda event: None)
    assert secrets_given(tmp_path) == []


def test_an_interruption_ends_the_child_and_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with(
        """
        import json, os, signal, subprocess
        below = subprocess.Popen(["sleep", "600"])
        with open("events.jsonl", "w") as events:
            events.write(json.dumps({"event": "warning", "text": f"{os.getpid()} {below.pid}"}) + "\\n")
        signal.pause()
        """,
        tmp_path,
        monkeypatch,
    )
    started: list[psutil.Process] = []

    def interrupt(event: Event) -> None:
        assert isinstance(event, Warned)
        started.extend(psutil.Process(int(pid)) for pid in event.text.split())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(JOB, tmp_path, interrupt)
    try:
        assert len(started) == 2
        wait_for(lambda: not any(map(runs, started)), 10, "both processes to end")
    finally:
        for process in filter(runs, started):
            process.kill()


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended; what has may still wait for its parent to ask."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
