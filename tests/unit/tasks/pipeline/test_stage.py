"""run_stage: reuse, one worker for one key, what is recorded, what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from requant.tasks.artifact import Manifest
from requant.tasks.errors import DiskFull, QuantizeDied, StoreError, WrongToolVersion
from requant.tasks.hardware import machine
from requant.tasks.pipeline.stage import Made, Stage, put_files, run_stage
from requant.tasks.store import Store
from requant.tasks.store import lease as leases
from requant.tasks.store.folder import FolderBackend
from requant.tasks.versions import installed_version, locked_version
from tests.factories.checkpoints import write_files
from tests.factories.paths import ROOT
from tests.factories.stores import Install

STAGE = Stage("quantize", 1, tools=("auto-round", "transformers"))
KEY = "a" * 64


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    folder = FolderBackend(tmp_path / "store")
    return Store(folder, cache=folder)


def made(store: Store, folder: Path, data: bytes = b"result") -> Made:
    files = write_files(folder / "out", {"a": data})
    return Made(Manifest.of(put_files(store, folder / "out", files)), {"measured": 5})


def leases_left(store: Store) -> list[str]:
    return list(store.backend.keys("leases"))


def test_a_stage_runs_once_and_is_reused_afterwards(store: Store) -> None:
    runs: list[Path] = []

    def work(folder: Path) -> Made:
        runs.append(folder)
        return made(store, folder)

    first, second = run_stage(store, STAGE, KEY, work), run_stage(store, STAGE, KEY, work)
    assert (first.state, second.state, len(runs)) == ("ran", "reused", 1)
    assert first.manifest == second.manifest and store.read_blob(second.manifest["a"]) == b"result"
    assert (second.name, second.key, second.provenance) == ("quantize", KEY, first.provenance)
    assert leases_left(store) == []


def test_the_work_folder_is_gone_after_success(store: Store) -> None:
    result = run_stage(store, STAGE, KEY, lambda folder: made(store, folder))
    assert list((store.cache.root / "work").iterdir()) == []
    assert result.manifest.size == 6


def test_what_is_recorded_says_when_where_and_with_what(store: Store) -> None:
    record = run_stage(store, STAGE, KEY, lambda folder: made(store, folder)).provenance
    document = record.to_json()
    assert document["measured"] == 5 and document["stage"] == "quantize"
    assert record.tools == {name: installed_version(name) for name in ("auto-round", "transformers")}
    assert record.machine == machine() and machine().memory_bytes > 1 << 28
    assert record.seconds >= 0 and record.started.endswith("+00:00")


def test_two_threads_do_the_work_of_one_key_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "requant")
    runs, results = [], []
    start = threading.Barrier(2)

    def work(folder: Path) -> Made:
        runs.append(threading.get_ident())
        time.sleep(0.2)
        return made(store, folder)

    def run() -> None:
        start.wait()
        results.append(run_stage(store, STAGE, KEY, work))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(runs) == 1
    assert sorted(r.state for r in results) == ["ran", "reused"]
    assert results[0].manifest == results[1].manifest
    assert caplog.text.count("waiting for process") <= 1 and leases_left(store) == []


def test_work_that_dies_leaves_its_folder_and_no_artifact_and_no_lease(store: Store) -> None:
    def die(folder: Path) -> Made:
        (folder / "finished-block").write_bytes(b"1")
        raise QuantizeDied("killed")

    with pytest.raises(QuantizeDied, match="killed"):
        run_stage(store, STAGE, KEY, die)
    assert store.manifest("quantize", KEY) is None and leases_left(store) == []

    def resume(folder: Path) -> Made:
        assert (folder / "finished-block").read_bytes() == b"1"
        return made(store, folder)

    assert run_stage(store, STAGE, KEY, resume).state == "ran"


def test_two_keys_of_one_stage_have_folders_of_their_own(store: Store) -> None:
    folders = []
    for key in (KEY, "b" * 64):
        run_stage(store, STAGE, key, lambda folder: (folders.append(folder), made(store, folder))[1])
    assert len(set(folders)) == 2


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, DiskFull), (errno.EACCES, StoreError)])
def test_an_operating_system_error_in_the_work_becomes_a_sentence(
    store: Store, number: int, expected: type[Exception]
) -> None:
    def work(folder: Path) -> Made:
        raise OSError(number, "as the system says", str(folder / "x"))

    with pytest.raises(expected, match="as the system says"):
        run_stage(store, STAGE, KEY, work)
    assert leases_left(store) == []


def test_an_unexpected_error_is_not_dressed_up(store: Store) -> None:
    def work(folder: Path) -> Made:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error") as caught:
        run_stage(store, STAGE, KEY, work)
    assert type(caught.value) is OSError


def test_a_corrupt_manifest_is_an_error_and_the_work_is_not_done_again(store: Store) -> None:
    store.backend.write(f"artifacts/quantize/{KEY}", b"{")
    with pytest.raises(StoreError, match="manifest in the store"):
        run_stage(store, STAGE, KEY, lambda folder: pytest.fail("a damaged store burns no GPU hours"))


def test_a_key_changes_with_reads_settings_version_and_name() -> None:
    keys = {
        STAGE.key({"base": "a"}, {"bits": 4}),
        STAGE.key({"base": "b"}, {"bits": 4}),
        STAGE.key({"base": "a"}, {"bits": 8}),
        Stage("quantize", 2, STAGE.tools).key({"base": "a"}, {"bits": 4}),
        Stage("other", 1, STAGE.tools).key({"base": "a"}, {"bits": 4}),
        Stage("quantize", 1).key({"base": "a"}, {"bits": 4}),
    }
    assert len(keys) == 6


def test_a_key_is_made_of_declared_versions_and_not_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    before = STAGE.key({}, {})
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.0")
    assert STAGE.key({}, {}) == before


def test_a_package_that_is_not_installed_is_recorded_as_absent() -> None:
    assert installed_version("no-such-package-at-all") == "absent"
    assert installed_version("pytest") == pytest.__version__


def test_the_declared_versions_are_those_that_the_project_is_tested_with() -> None:
    """Otherwise a plan in CI and a GPU worker would not agree on a key."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    lock = (ROOT / "tasks" / "lock.txt").read_text().splitlines()
    locked = dict(line.split("==") for line in lock if "==" in line and not line.startswith("#"))
    assert {"auto-round", "transformers"} <= set(locked)
    assert locked == {name: constraints[name] for name in locked}
    assert all(locked_version(name) == version for name, version in locked.items())


def test_an_installation_brings_the_declared_versions_without_the_constraints_file() -> None:
    """Otherwise a plain `pip install` makes a worker that refuses every stage."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["eval"]}
    assert {f"{name}=={locked_version(name)}" for name in ("auto-round", "lm_eval", "transformers")} <= asked


def test_a_worker_with_another_version_is_refused_before_the_work(store: Store, install: Install) -> None:
    install(transformers="5.24.0")
    locked = locked_version("transformers")
    with pytest.raises(WrongToolVersion) as caught:
        run_stage(store, STAGE, KEY, lambda folder: pytest.fail("the result would carry the wrong versions in its key"))
    sentence = str(caught.value)
    assert f"stage quantize needs transformers {locked}" in sentence and "transformers 5.24.0" in sentence
    assert f"pip install 'transformers=={locked}'" in sentence and "auto-round" not in sentence
    assert "\n" not in sentence and not caught.value.retryable
    assert store.manifest("quantize", KEY) is None and leases_left(store) == []


def test_all_versions_that_differ_are_named_with_one_command(store: Store, install: Install) -> None:
    install(transformers="5.24.0", auto_round="0.15.0")
    with pytest.raises(WrongToolVersion) as caught:
        run_stage(store, STAGE, KEY, lambda folder: made(store, folder))
    both = f"'auto-round=={locked_version('auto-round')}' 'transformers=={locked_version('transformers')}'"
    assert f"pip install {both}" in str(caught.value)


def test_a_local_version_label_is_the_same_version(store: Store, install: Install) -> None:
    install(transformers=f"{locked_version('transformers')}+cpu")
    assert run_stage(store, STAGE, KEY, lambda folder: made(store, folder)).state == "ran"


def test_a_reused_stage_needs_nothing_installed(store: Store, install: Install) -> None:
    run_stage(store, STAGE, KEY, lambda folder: made(store, folder))
    install(transformers="5.24.0")
    assert run_stage(store, STAGE, KEY, lambda folder: pytest.fail("it is there")).state == "reused"


def test_a_tool_that_this_run_of_a_stage_does_not_use_may_differ(store: Store, install: Install) -> None:
    """A benchmark in vLLM runs in vLLM's environment."""
    install(transformers="5.24.0")
    assert run_stage(store, STAGE, KEY, lambda folder: made(store, folder), uses=lambda: ()).state == "ran"


def test_a_tool_that_is_absent_is_refused_where_it_is_used(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(WrongToolVersion, match="has no auto-round and no transformers: run pip install"):
        run_stage(store, STAGE, KEY, lambda folder: made(store, folder))


def test_the_process_that_quantizes_looks_at_its_own_versions(tmp_path: Path, install: Install) -> None:
    """Its search path is not that of the process that starts it."""
    install(transformers="5.24.0")
    (tmp_path / "job.json").write_text("{}")
    command = [sys.executable, "-m", "requant.tasks.quantizing.child", str(tmp_path / "job.json"), str(tmp_path)]
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "PATH": ""}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdin=subprocess.PIPE) as child:
        assert child.wait(60) == 1
    (event,) = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (event["event"], event["kind"]) == ("error", "refused")
    assert "transformers 5.24.0" in event["text"] and "pip install 'transformers==" in event["text"]


def test_every_tool_of_a_stage_is_declared() -> None:
    from requant.tasks import benchmark, download, evaluate, mtp_fix, quantize, validate

    stages = [
        benchmark.STAGE,
        download.STAGE,
        evaluate.STAGE,
        mtp_fix.STAGE,
        quantize.STAGE,
        validate.STAGE,
        validate.MEASURE,
    ]
    assert len({stage.name for stage in stages}) == 7
    assert all(locked_version(tool)[0].isdigit() for stage in stages for tool in stage.tools)


def test_a_record_is_json_that_everyone_can_read(store: Store) -> None:
    run_stage(store, STAGE, KEY, lambda folder: made(store, folder))
    text = store.backend.read(f"provenance/quantize/{KEY}") or b""
    assert json.loads(text)["stage"] == "quantize"
