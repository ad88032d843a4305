"""An engine's process: started, explained when it fails, and ended with its workers however this process ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.errors import EngineFailed
from tasks.serving.process import free_port, running
from tasks.serving.vllm import vllm
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base

ENGINE = ROOT / "tests" / "factories" / "stand_in_engine.py"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """REQUANT_VLLM is the stand-in; the folder that its processes sign in to."""
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("REQUANT_VLLM", f"{sys.executable} {ENGINE}")
    monkeypatch.setenv("ENGINE_PIDS", str(pids))
    return pids


def alive(pids: Path) -> list[int]:
    found = []
    for path in pids.iterdir():
        if psutil.pid_exists(int(path.name)) and psutil.Process(int(path.name)).status() != psutil.STATUS_ZOMBIE:
            found.append(int(path.name))
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def start_bench(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    folder = pico_base(tmp_path / "model")
    command = [sys.executable, "-m", "flows.cli", "bench", str(folder), "--engine", "vllm", "--json", *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where pytest itself runs behind an `&`, SIGINT is ignored, and what it starts inherits that.
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    finally:
        signal.signal(signal.SIGINT, ours)


def test_bench_measures_both_ways_and_leaves_no_process(tmp_path: Path, stand_in: Path) -> None:
    stdout, stderr = start_bench(tmp_path, "--max-tokens", "20", "--concurrency", "3").communicate(timeout=120)
    document = json.loads(stdout)
    assert [command["mtp"] for command in document["commands"]] == [False, True]
    assert document["commands"][1]["words"] == [
        "vllm", "serve", "MODEL", "--speculative-config", '{"method":"mtp","num_speculative_tokens":1}',
    ]  # fmt: skip
    assert len(document["prompts"]) == 4 * 2 * 2 * 2 and document["acceptance"] == 0.75
    assert {row["tokens"] for row in document["prompts"]} == {20, 60}
    assert document["mtp"]["speedup"] > 0 and len(document["logs"]) == 2
    assert "vLLM is ready" in stderr and "card/code, greedy x 3" in stderr
    assert len(list(stand_in.iterdir())) == 4 and alive(stand_in) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["--never-ready", "--slow"])
def test_the_engine_and_its_workers_end_with_us(
    number: signal.Signals, moment: str, tmp_path: Path, stand_in: Path
) -> None:
    """While it is waited for, and in the middle of a request; it ignores SIGTERM and its worker left its group."""
    process = start_bench(tmp_path, "--mtp", "off", "--flag", moment)
    wait_for(lambda: len(list(stand_in.iterdir())) == 2)
    time.sleep(0.2 if moment == "--never-ready" else 2)
    assert len(alive(stand_in)) == 2
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    wait_for(lambda: alive(stand_in) == [])
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in stderr


def test_an_engine_ends_with_the_block_that_started_it(tmp_path: Path, stand_in: Path) -> None:
    command = [sys.executable, str(ENGINE), "--never-ready"]
    with pytest.raises(ZeroDivisionError), running(command, tmp_path / "log", os.environ) as engine:
        wait_for(lambda: len(alive(stand_in)) == 2)
        assert engine.status is None
        raise ZeroDivisionError
    assert alive(stand_in) == []


def test_secrets_do_not_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    log = tmp_path / "log"
    with running(["env"], log, os.environ) as engine:
        wait_for(lambda: engine.status is not None)
    assert "PATH=" in log.read_text() and "verysecret" not in log.read_text()


FAILURES = {
    "an argument that it does not know": (
        "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --kv-cash 1",
        "api_server.py: error: unrecognized arguments: --kv-cash 1",
    ),
    "a traceback with prefixes": (
        "(EngineCore pid=1) ERROR 11-25 [core.py:1] Traceback (most recent call last):\n"
        "(EngineCore pid=1) ERROR 11-25 [core.py:1]   File \"x.py\", line 1\n"
        "(EngineCore pid=1) ERROR 11-25 [core.py:1] ValueError: There is no module or parameter named 'fc.qweight'\n"
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "ValueError: There is no module or parameter named 'fc.qweight'",
    ),
    "an error that was got over": (
        "INFO 11-25 [x.py:1] ImportError: no flash attention\ntorch.OutOfMemoryError: CUDA out of memory.",
        "torch.OutOfMemoryError: CUDA out of memory.",
    ),
    "words alone": ("cannot open shared object file", "cannot open shared object file"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_start_is_explained_by_the_lines_that_say_why(name: str, tmp_path: Path, stand_in: Path) -> None:
    words, cause = FAILURES[name]
    log = tmp_path / "vllm.log"
    with (
        pytest.raises(EngineFailed) as failure,
        vllm(tmp_path, {"die-with": words}, log, chat=True, say=lambda text: None),
    ):
        pass
    assert str(failure.value).startswith("vLLM did not start, exit status 1: ")
    assert cause in str(failure.value) and str(log) in str(failure.value)
    assert "Engine core initialization failed" not in str(failure.value) and "ImportError" not in str(failure.value)


def test_a_server_that_runs_already_is_asked_and_left_alone(tmp_path: Path, stand_in: Path) -> None:
    port = free_port()
    command = [sys.executable, str(ENGINE), "--port", str(port)]
    with running(command, tmp_path / "log", os.environ):
        wait_for(lambda: len(alive(stand_in)) == 2)
        asked = ["--engine", f"url:http://127.0.0.1:{port}", "--max-tokens", "8", "--concurrency", "1"]
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        stdout, stderr = start_bench(tmp_path, *asked).communicate(timeout=60)
        document = json.loads(stdout)
        assert document["engine"] == asked[1] and document["model"] == "stand-in", stderr
        assert document["acceptance"] == 0.75 and document["mtp"]["off"] is None  # it drafts: its counters say so
        assert document["commands"] == document["logs"] == []
        assert len(alive(stand_in)) == 2
