"""The stage acceptance with servers of its own: what is counted, how often, and in which engine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.acceptance import STAGE, DraftCounter, acceptance, acceptance_key, read_comparison
from requant.tasks.artifact import Manifest
from requant.tasks.errors import EngineFailed
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.serving import client
from requant.tasks.serving.client import Server, ask
from requant.tasks.serving.drafts import BATCH, PLACE_TOKENS, ServedCheckpoint, count_drafts
from requant.tasks.serving.process import free_port, run_engine
from requant.tasks.serving.prompts import Prompt
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.serving.vllm import find_server
from requant.tasks.store import Store, open_store
from requant.tasks.texts.text import find_text
from requant.tasks.validating.drafts import DraftComparison, EngineSetup
from requant.tasks.validating.ratio import MIN_BATCHES
from tests.factories.paths import ROOT
from tests.factories.requant import SHORT_TEXT, wait_for
from tests.factories.stores import put

ENGINE = ROOT / "tests" / "factories" / "stand_in_engine.py"
TEXT = find_text(SHORT_TEXT, "validation.text")
RUNNING_NOW = "vLLM 0.0.1"  # what the stand-in says


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """REQUANT_VLLM is the stand-in; the folder that its processes sign in to, two for each start."""
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setattr(client, "COUNTER_DELAY_S", 0.0)  # the stand-in counts before it answers
    monkeypatch.setenv("REQUANT_VLLM", f"{sys.executable} {ENGINE}")
    monkeypatch.setenv("ENGINE_PIDS", str(pids))
    monkeypatch.setenv("ENGINE_ACCEPTS", json.dumps({"base": 0.9, "quantized": 0.6}))
    return pids


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    return open_store()


def checkpoint(store: Store, number: int, *, quantized: bool) -> Manifest:
    config = {"number": number, **({"quantization_config": {}} if quantized else {})}
    return put(store, {"config.json": json.dumps(config).encode()})


def recipe(**benchmark: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": {"acceptance_precision": 0.2, **benchmark}})


def compare(store: Store, asked: Recipe, base: Manifest, artifact: Manifest, **benchmark: Any) -> DraftComparison:
    measured = BenchmarkResult.model_validate({"engine": "vllm", **benchmark})
    return read_comparison(store, acceptance(store, asked, base, artifact, TEXT, measured).manifest)


def starts(folder: Path) -> int:
    return sum(path.name.isdecimal() for path in folder.iterdir()) // 2


@contextlib.contextmanager
def running(folder: Path, log: Path) -> Iterator[str]:
    """A server that runs already, with the checkpoint in `folder` and drafts; its address."""
    port = free_port()
    command = [sys.executable, str(ENGINE), "--port", str(port), "--model", str(folder), "--speculative-config", "{}"]
    with run_engine(command, log, os.environ):
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield f"url:http://127.0.0.1:{port}"


def test_a_base_is_counted_once_for_all_that_is_made_from_it(store: Store, stand_in: Path) -> None:
    base = checkpoint(store, 0, quantized=False)
    results = [checkpoint(store, number, quantized=True) for number in (1, 2)]
    first = compare(store, recipe(), base, results[0])
    assert starts(stand_in) == 2
    setup = {"version": first.base.version, "hardware": first.base.hardware}
    second = compare(store, recipe(), base, results[1], **setup)
    assert starts(stand_in) == 3 and second.base == first.base
    compare(store, recipe(), base, results[1], **setup)
    assert starts(stand_in) == 3, "both are in the store"
    assert first.base.rate == pytest.approx(0.9, abs=0.03) and first.quantized.rate == pytest.approx(0.6, abs=0.03)
    assert first.ratio is not None and first.ratio.high < 0.8
    assert len(first.base.drafted) == MIN_BATCHES and set(first.base.drafted) == {BATCH * PLACE_TOKENS // 2}


def test_a_result_that_another_version_measured_is_counted_again_beside_its_base(store: Store, stand_in: Path) -> None:
    base, artifact = checkpoint(store, 0, quantized=False), checkpoint(store, 1, quantized=True)
    old = compare(store, recipe(), base, artifact, version="vLLM 0.0.0", hardware="a GPU of old")
    assert old.quantized.setup == old.base.setup and old.base.version == RUNNING_NOW


def test_a_count_is_kept_under_the_setup_that_made_it(
    store: Store, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the base of an older setup would be compared with a result of that setup, and never match."""
    base, *results = (checkpoint(store, number, quantized=number > 0) for number in range(3))
    older = {"version": "vLLM 0.0.0", "hardware": compare(store, recipe(), base, results[0]).base.hardware}
    compare(store, recipe(), base, results[0], **older)
    monkeypatch.setenv("ENGINE_VERSION", "0.0.0")
    compared = compare(store, recipe(), base, results[1], **older)
    assert compared.base.version == compared.quantized.version == "vLLM 0.0.0"


def test_drafts_that_cannot_be_counted_lose_nothing_of_the_benchmark(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = checkpoint(store, 1, quantized=True)
    server = Server(f"http://127.0.0.1:{free_port()}", "a model", False, lambda sentence: EngineFailed(sentence))
    served = ServedCheckpoint(store.link_files(artifact, tmp_path / "model"), server, "vllm", EngineSetup())
    DraftCounter(store, recipe(), TEXT).count_while_served(artifact, served)
    assert "the drafts were not counted" in caplog.text


def test_two_servers_that_run_already_are_compared_and_nothing_is_started(
    store: Store, stand_in: Path, tmp_path: Path
) -> None:
    base, artifact = checkpoint(store, 0, quantized=False), checkpoint(store, 1, quantized=True)
    folders = [store.link_files(one, tmp_path / name) for one, name in ((base, "base"), (artifact, "artifact"))]
    with running(folders[0], tmp_path / "log") as of_base, running(folders[1], tmp_path / "log2") as of_result:
        wait_for(lambda: starts(stand_in) == 2)
        asked = recipe(engine=of_result, base_engine=of_base)
        compared = compare(store, asked, base, artifact, engine=of_result)
        assert starts(stand_in) == 2
    assert compared.ratio is not None and compared.ratio.value == pytest.approx(0.6 / 0.9, abs=0.05)
    assert compared.base.setup == compared.quantized.setup == EngineSetup()


def test_a_server_that_drafts_for_others_meanwhile_is_not_counted(stand_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with running(folder, tmp_path / "log") as url:
        server = find_server(url.removeprefix("url:"), chat=False)

        def ask_at_length() -> None:
            with contextlib.suppress(EngineFailed):  # the server ends before it has answered
                ask(server, Prompt("a", "other", "x", False, 20_000), "greedy", times=16)

        threading.Thread(target=ask_at_length, daemon=True).start()
        wait_for((stand_in / "asked").exists)
        with pytest.raises(EngineFailed, match="drafted for others while its drafts were counted"):
            count_drafts(server, Path(SHORT_TEXT).read_text(), 0.001, EngineSetup())


def test_a_base_that_does_not_start_is_told_in_the_words_of_its_log_and_nothing_is_kept(
    store: Store, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_ACCEPTS", json.dumps({"base": "ValueError: no memory left", "quantized": 0.6}))
    base, artifact = checkpoint(store, 0, quantized=False), checkpoint(store, 1, quantized=True)
    with pytest.raises(EngineFailed, match=r"vLLM did not start, exit status 1: ValueError: no memory left"):
        compare(store, recipe(), base, artifact)
    assert store.manifest(STAGE.name, acceptance_key(recipe(), base, artifact, TEXT, "vllm")) is None
