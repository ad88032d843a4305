"""The pipeline's result behind the real vLLM's HTTP server: the card's words, the benchmark, the gates' own figures."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from requant.tasks.probing.sets import ask_sets
from requant.tasks.recipe.recipe import Probes
from requant.tasks.serving.client import Server
from requant.tasks.serving.process import free_port, run_engine
from tests.engines.pipeline import TARGET, Made, engine_environment
from tests.factories.line_tasks import ITEMS, TASKS, line_tasks
from tests.factories.paths import ROOT

WINDOWS, LENGTH = 4, 512  # of the measured text, compared token by token


def engines() -> list[str]:
    """The engines' processes on this machine, by what they call themselves."""
    return [p.info["name"] for p in psutil.process_iter(["name"]) if (p.info["name"] or "").startswith("VLLM::")]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server says."""
    return tmp_path_factory.mktemp("log") / "vllm.log"


@pytest.fixture(scope="module")
def server(made: Made, vllm_python: str, log: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The card's command as printed, typed where `vllm` is the CPU build; its model comes from the Hub stand-in."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "bin").mkdir()
    program = folder / "bin" / "vllm"
    port = free_port()
    # The port is the one thing that is not the card's: 8000 may be taken here.
    program.write_text(f'#!/bin/sh\nshift; exec $REQUANT_VLLM --port {port} --host 127.0.0.1 --model "$@"\n')
    program.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**made.environment, "PATH": path, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
    command, before = made.snippets("bash")[0], engines()
    with run_engine(["sh", "-c", command], log, environment) as engine:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 300
        while True:
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert engine.status is None and time.monotonic() < deadline, str(engine.failure("vLLM did not start"))
            time.sleep(0.5)
        yield url
    assert engines() == before


def test_the_result_loads_without_a_word_about_skipped_weights(server: str, log: Path) -> None:
    with mock.patch.dict(os.environ):  # of which draft.py sets some
        from infra.dev.engines.draft import about_weights

    said = log.read_text()
    assert "Loading weights took" in said
    assert [line for line in said.splitlines() if "WARNING" in line and about_weights(line)] == []


def test_it_drafts_with_its_head_as_requant_measures_it(made: Made, server: str, tmp_path: Path) -> None:
    environment = {**made.environment, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "requant", "bench", str(made.folder), "--json", "--engine", f"url:{server}"]
    command += ["--prompts", "code", "--max-tokens", "48", "--concurrency", "1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    greedy = [r for r in document["prompts"] if r["sampling"] == "greedy"]
    print(f"bench: {document['acceptance']} of {sum(r['drafted_tokens'] for r in greedy)}")
    assert all(r["mtp"] and r["tokens"] == 48 for r in document["prompts"])
    assert document["acceptance"] > 0.5 and sum(r["drafted_tokens"] for r in greedy) > 150


def test_the_cards_request_is_answered_as_printed(made: Made, server: str) -> None:
    environment = {**made.environment, "OPENAI_BASE_URL": f"{server}/v1"}
    request = next(snippet for snippet in made.snippets("bash") if snippet.startswith("curl "))
    done = subprocess.run(["sh", "-c", request], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == TARGET and answer["choices"][0]["message"]["content"].strip()


@pytest.mark.slow
def test_the_cards_python_runs_as_printed(made: Made, tmp_path: Path) -> None:
    (snippet,) = made.snippets("python")
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    environment = {**made.environment, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "reverses a list" in done.stdout and len(done.stdout) > 100


@pytest.mark.slow
def test_engine_and_gates_speak_of_the_same_model(made: Made, server: str) -> None:
    """Log-probabilities of the measured text, token by token: vLLM's in BF16 and those of the torch path."""
    from requant.tasks.texts.text import EVALUATION
    from requant.tasks.validating.measure import measure, run_settings

    ours = measure(made.folder, EVALUATION, run_settings(made.folder))
    tokens, nll = ours.tokens[:WINDOWS, :LENGTH], ours.nll[:WINDOWS, : LENGTH - 1]
    body = {"model": TARGET, "prompt": tokens.tolist(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    answer = httpx.post(f"{server}/v1/completions", json=body, timeout=300).json()
    theirs = np.array([[_chosen(place) for place in c["prompt_logprobs"][1:]] for c in answer["choices"]])
    difference = np.abs(theirs + nll)
    print(f"log-probabilities: {difference.mean():.4f} apart on average, at most {difference.max():.4f}")
    assert theirs.shape == nll.shape and difference.mean() < 0.05


def _chosen(place: dict[str, Any]) -> float:
    (entry,) = place.values()
    return float(entry["logprob"])


def test_the_engine_answers_as_torch_does_and_a_second_run_is_no_difference(
    made: Made, server: str, tmp_path: Path
) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's client is not installed: pip install 'requant[eval]'")
    import torch

    from requant.tasks.evaluate import compare_outcomes
    from requant.tasks.evaluating.harness import harness_of_server, run_in_torch
    from requant.tasks.evaluating.rounds import run_in_rounds
    from requant.tasks.serving.client import Server
    from requant.tasks.validating.model import RunSettings
    from requant.tasks.validating.paired import Verdict

    asked = line_tasks(tmp_path)
    engine = harness_of_server(Server(server, TARGET, chat=False), made.folder, asked, "vLLM", remote_code=False)
    served = engine.outcomes()
    with run_in_torch(made.folder, asked, RunSettings(torch.device("cpu"), torch.float32)) as harness:
        in_torch = harness.outcomes()
    assert served.scores.keys() == served.items.keys() == TASKS.keys()
    for name in ("line_choice", "line_perplexity"):
        assert served.items[name].ids == in_torch.items[name].ids and len(served.items[name].ids) == ITEMS
    assert served.scores["line_choice"].value == pytest.approx(in_torch.scores["line_choice"].value, abs=0.05)
    pairs = zip(served.items["line_perplexity"].values, in_torch.items["line_perplexity"].values, strict=True)
    assert all(abs(one - other) < 0.5 + 0.02 * abs(other) for one, other in pairs), "log-likelihoods of whole lines"

    again = run_in_rounds(served, asked.margin, "vLLM", engine.answers)
    found = compare_outcomes(served, again, asked).tasks
    assert found is not None
    verdicts = {name: score.paired.verdict for name, score in found.items() if score.paired}
    assert verdicts.keys() == TASKS.keys() and not {Verdict.WORSE, Verdict.BETTER} & set(verdicts.values())
    assert all(score.samples == ITEMS for score in found.values())


def test_an_image_is_seen(server: str) -> None:
    """Two images of one size: as many tokens, more than without one, and another distribution behind them."""
    flat, steep = (_about(server, Image.new("RGB", (64, 64), "black")), _about(server, _gradient()))
    assert flat["usage"]["prompt_tokens"] == steep["usage"]["prompt_tokens"] > _about(server)["usage"]["prompt_tokens"]
    first, second = (answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in (flat, steep))
    assert [entry["logprob"] for entry in first] != [entry["logprob"] for entry in second]


def _gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def _about(server: str, image: Image.Image | None = None) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": "def picture():"}]
    if image is not None:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {"model": TARGET, "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 5}
    response = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text[:500]
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.slow
def test_the_run_was_measured_with_its_engine(well_made: Made) -> None:
    measured = well_made.document["benchmark"]
    assert measured["engine"] == "vllm" and measured["version"].startswith("vLLM 0.")
    on, off = measured["mtp"]["on"], measured["mtp"]["off"]
    assert off["acceptance"] is None and on["acceptance"] > 0.5
    assert {(r["mtp"], r["sampling"], r["concurrency"]) for r in measured["prompts"]} == {
        (mtp, sampling, number) for mtp in (True, False) for sampling in ("greedy", "sampled") for number in (1, 2)
    }
    assert all(r["tokens"] == 48 * r["concurrency"] for r in measured["prompts"])
    assert "**run** by the pipeline" in well_made.card


@pytest.mark.slow
def test_bench_measures_what_the_engine_drafts_and_leaves_nothing_behind(
    well_made: Made, vllm_python: str, tmp_path: Path
) -> None:
    """Both ways through the server; the acceptance is near that of many prompts in one process."""
    environment = {**engine_environment(vllm_python), "XDG_CACHE_HOME": str(tmp_path)}
    before = engines()
    command = [
        sys.executable,
        "-m",
        "requant",
        "bench",
        str(well_made.folder),
        "--json",
        "--engine",
        "vllm",
        "--mtp",
        "both",
    ]
    command += ["--prompts", "code", "--max-tokens", "200", "--concurrency", "1"]
    for flag in ("dtype=bfloat16", "max-model-len=1024", "enforce-eager", "enable-prefix-caching=false",
                 "limit-mm-per-prompt={image: 0, video: 0}", "skip-mm-profiling"):  # fmt: skip
        command += ["--flag", flag]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    document = json.loads(done.stdout)
    greedy = [r for r in document["prompts"] if r["mtp"] and r["sampling"] == "greedy"]
    print(f"bench: {document['mtp']}")
    assert sum(r["drafted_tokens"] for r in greedy) > 700
    # 800 drafts of 8 prompts scatter by several points: notes on few prompts are in infra/dev/engines/prompts.py
    assert 0.75 < document["acceptance"] < 0.99
    assert document["mtp"]["off"]["acceptance"] is None and document["mtp"]["speedup"] > 0
    assert all(r["tokens"] == 200 for r in document["prompts"])
    assert all(Path(log).stat().st_size for log in document["logs"]) and len(document["logs"]) == 2
    assert engines() == before


def test_probes_are_asked_through_its_template_and_come_back_as_tokens(server: str) -> None:
    """The model has no tools in its template and 1,024 tokens of context: answers alone can be asked."""
    asked = Probes(limit=4, max_tokens=64)
    sets = ask_sets(Server(server, TARGET, True), asked)
    assert sets["tools"].not_measured == "the chat template takes no tools"
    assert sets["retrieval"].not_measured == "the engine takes 1,024 tokens" and not sets["retrieval"].outcomes
    outcomes = sets["answers"].outcomes
    assert len(outcomes) == 4 and not sets["answers"].not_measured
    assert all(set(outcome.measures) == {"answers_finished", "answers_without_loop"} for outcome in outcomes)
