"""An engine's process: started, explained when it fails, and ended with its workers however this process ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from requant.tasks.errors import EngineFailed
from requant.tasks.serving.process import free_port, run_engine
from requant.tasks.serving.vllm import serve_vllm
from tests.factories.forked import forked
from tests.factories.forks import Fork
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base
from tests.factories.requant import wait_for

ENGINE = ROOT / "tests" / "factories" / "stand_in_engine.py"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """REQUANT_VLLM is the stand-in; the folder that its processes sign in to."""
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("REQUANT_VLLM", f"{sys.executable} {ENGINE}")
    monkeypatch.setenv("ENGINE_PIDS", str(pids))
    return pids


def signed_in(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def alive(folder: Path) -> list[int]:
    return [
        pid
        for pid in signed_in(folder)
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


Start = Callable[..., Fork]


@pytest.fixture
def start_bench(environment: dict[str, str], tmp_path: Path, stand_in: Path) -> Start:
    """Start `requant bench` of a pico base in a fork, where Ctrl-C interrupts it even if pytest itself ignores it."""
    variables = {name: os.environ[name] for name in ("REQUANT_VLLM", "ENGINE_PIDS")}
    code = (
        "import signal, sys; from requant.flows.cli.main import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv[0] = 'requant'; main()"
    )

    def start(*arguments: str) -> Fork:
        folder = pico_base(tmp_path / "model")
        command = ["-c", code, "bench", str(folder), "--engine", "vllm", "--json", *arguments]
        return forked(command, {**environment, **variables, "XDG_CACHE_HOME": str(tmp_path / "cache")})

    return start


def test_bench_measures_both_ways_and_leaves_no_process(start_bench: Start, stand_in: Path) -> None:
    stdout, stderr = start_bench("--max-tokens", "20", "--concurrency", "3").communicate(timeout=120)
    document = json.loads(stdout)
    assert [command["mtp"] for command in document["commands"]] == [False, True]
    assert document["commands"][1]["words"] == [
        "vllm", "serve", "MODEL", "--dtype", "bfloat16",
        "--speculative-config", '{"method":"mtp","num_speculative_tokens":1}',
    ]  # fmt: skip
    assert len(document["prompts"]) == 4 * 2 * 2 * 2 and document["acceptance"] == 0.75
    assert {row["tokens"] for row in document["prompts"]} == {20, 60}
    assert document["mtp"]["speedup"] > 0 and len(document["logs"]) == 2
    assert "vLLM is ready" in stderr and "card/code, greedy x 3" in stderr
    assert len(signed_in(stand_in)) == 4 and alive(stand_in) == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("--never-ready", signal.SIGTERM),
        ("--slow", signal.SIGINT),
        ("--slow", signal.SIGKILL),
        pytest.param("--never-ready", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("--never-ready", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("--slow", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_engine_and_its_workers_end_with_us(
    moment: str, number: signal.Signals, start_bench: Start, stand_in: Path
) -> None:
    """While it is waited for, and in the middle of a request; it ignores SIGTERM and its worker left its group."""
    process = start_bench("--mtp", "off", "--flag", moment)
    wait_for(lambda: len(signed_in(stand_in)) == 2)
    if moment == "--slow":
        wait_for((stand_in / "asked").exists)
    assert len(alive(stand_in)) == 2
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    wait_for(lambda: alive(stand_in) == [])
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "Traceback" not in stderr


def test_an_engine_ends_with_the_block_that_started_it(tmp_path: Path, stand_in: Path) -> None:
    command = [sys.executable, str(ENGINE), "--never-ready"]
    with pytest.raises(ZeroDivisionError), run_engine(command, tmp_path / "log", os.environ) as engine:
        wait_for(lambda: len(alive(stand_in)) == 2)
        assert engine.status is None
        raise ZeroDivisionError
    assert alive(stand_in) == []


def test_secrets_do_not_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    log = tmp_path / "log"
    with run_engine(["env"], log, os.environ) as engine:
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
        serve_vllm(tmp_path, {"die-with": words}, log, chat=True),
    ):
        pass
    assert str(failure.value).startswith("vLLM did not start, exit status 1: ")
    assert cause in str(failure.value) and str(log) in str(failure.value)
    assert "Engine core initialization failed" not in str(failure.value) and "ImportError" not in str(failure.value)


def test_a_server_that_runs_already_is_asked_and_left_alone(start_bench: Start, tmp_path: Path, stand_in: Path) -> None:
    port = free_port()
    command = [sys.executable, str(ENGINE), "--port", str(port)]
    with run_engine(command, tmp_path / "log", os.environ):
        wait_for(lambda: len(alive(stand_in)) == 2)
        asked = ["--engine", f"url:http://127.0.0.1:{port}", "--max-tokens", "8", "--concurrency", "1"]
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        stdout, stderr = start_bench(*asked).communicate(timeout=60)
        document = json.loads(stdout)
        assert document["engine"] == asked[1] and document["model"] == "stand-in", stderr
        assert document["acceptance"] == 0.75 and document["mtp"]["off"] is None  # it drafts: its counters say so
        assert document["commands"] == document["logs"] == []
        assert len(alive(stand_in)) == 2
