"""What a run says at its end."""

from __future__ import annotations

import json
import math
from pathlib import Path

from requant.flows.report.report import RunReport, gate_rows, published_words, run_headline, verdict
from requant.flows.report.terminal import render, validation_text
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.record import RecordedBlock, StageRecord
from requant.tasks.validating.document import ValidationDocument
from requant.tasks.validating.gates import Gate, summary
from requant.tasks.validating.measured import DomainValues
from tests.factories.reports import ARTIFACT, PUBLISHED, RECIPE, SHA, SPEED, finished


def test_the_document_has_the_keys_of_the_contract() -> None:
    document = json.loads(json.dumps(finished().document().to_json()))
    contract = {"status", "base", "artifact", "stages", "gates", "benchmark", "published"}
    assert contract <= set(document)
    assert document["base"] == {"repo_id": "Qwen/Qwen3.6-27B", "sha": SHA}
    assert document["artifact"] == {"digest": ARTIFACT.digest, "path": "/out"}
    assert document["stages"] == [
        {"name": "download", "state": "reused", "seconds": 0.12},
        {"name": "quantize", "state": "ran", "seconds": 75.5},
    ]
    assert [{"name", "value", "limit", "passed"} <= set(gate) for gate in document["gates"]] == [True, True]
    assert (document["benchmark"], document["published"], document["error"]) == (SPEED, PUBLISHED.model_dump(), None)


def test_a_run_that_failed_early_has_the_same_keys() -> None:
    failed = RunReport(RECIPE, error="no such repo").document().to_json()
    assert set(failed) == set(finished().document().to_json())
    assert (failed["status"], failed["error"]) == ("failed", "no such repo")
    assert failed["base"] == {"repo_id": "Qwen/Qwen3.6-27B", "sha": None}
    assert failed["artifact"] == {"digest": None, "path": None} and failed["stages"] == failed["gates"] == []


def test_the_headline_says_what_was_made_of_what() -> None:
    assert run_headline(finished()) == (
        f"Qwen/Qwen3.6-27B@0123456 -> W4A16 g128, 18.00 GB, artifact {ARTIFACT.digest[:12]}"
    )
    assert run_headline(RunReport(RECIPE)) == "Qwen/Qwen3.6-27B: nothing made"


def test_a_gate_is_a_row_with_its_note() -> None:
    gates = [
        Gate("a", 0.123456, 0.5, True),
        Gate("b", 0.5, None, True, "no limit asked for"),
        Gate("c", 1.0, 0.0, False),
        Gate("d", None, None, None, "no limit asked for, and could not be measured"),
        Gate("e", None, 1.0, False, "could not be measured"),
    ]
    assert gate_rows(gates) == [
        ("a", "0.1235", "0.5", "passed", ""),
        ("b", "0.5", "none", "measured", "no limit asked for"),
        ("c", "1", "0", "FAILED", ""),
        ("d", "not measured", "none", "not measured", "no limit asked for, and could not be measured"),
        ("e", "not measured", "1", "FAILED", "could not be measured"),
    ]
    assert summary(gates) == "2 of 5 failed, 1 measured without a limit, 1 not measured"
    assert summary(gates[:1]) == "1 passed" and summary(gates[:2]) == "1 passed, 1 measured without a limit"
    assert summary(gates[:2] + gates[3:4]) == "1 passed, 1 measured without a limit, 1 not measured"


def test_a_rejected_run_says_which_gates_failed_or_that_nothing_was_measured() -> None:
    failed = finished(status="rejected", gates=[Gate("a", 1.0, 0.0, False), Gate("b", None, None, None)])
    assert "next        raise quantize.iters" in render(failed) and "next  " not in render(finished())
    assert verdict(failed) == "nothing was published: a failed"
    unmeasured = finished(status="rejected", gates=[Gate("perplexity_increase", None, None, None)])
    assert verdict(unmeasured) == "nothing was published: nothing of its quality could be measured"


def test_a_number_that_json_has_not_is_null() -> None:
    block = {"block": 0, "kind": "decoder", "drift": 0.1}
    measured = {"blocks": [{**block, "error": math.nan}], "perplexity": math.inf, "tokens": 5, "head_kept": True}
    document = json.loads(json.dumps(finished(measured=measured).document().to_json(), allow_nan=False))
    assert document["measured"] == {
        "blocks": [{**block, "error": None}], "perplexity": None, "tokens": 5, "head_kept": True,
    }  # fmt: skip


def test_the_blocks_are_those_that_quantize_recorded() -> None:
    blocks = [{"name": "layers.0", "loss_before": 2.0, "loss_after": 1.0}]
    download = StageResult("download", "k", "ran", 1, ARTIFACT, StageRecord())
    quantize = StageResult("quantize", "k", "ran", 1, ARTIFACT, StageRecord({"blocks": blocks}))
    assert finished(stages=[download]).blocks == []
    assert finished(stages=[download, quantize]).blocks == [RecordedBlock("layers.0", None, 2.0, 1.0)]


def test_a_failed_run_says_its_sentence_in_the_terminal() -> None:
    assert "the disk is full" in render(RunReport(RECIPE, error="the disk is full"))


def test_the_terminal_shows_everything_and_no_markup_of_its_own() -> None:
    text = render(finished(error="[bold]not markup[/bold]"))
    for part in (
        "PUBLISHED",
        "quantize",
        "75.5",
        "FAILED",
        "50.0 tokens/s (transformers 5",
        "/out",
        PUBLISHED.url,
        "v1",
    ):
        assert part in text
    assert "[bold]not markup[/bold]" in text and "\x1b" not in text


def test_a_note_in_brackets_is_shown_and_not_taken_for_markup() -> None:
    """Sentences name tensors and shapes; rich must neither swallow nor choke on them."""
    odd = Gate("structure", 1.0, 0.0, False, "x has shape [8, 128] and [/red] in it")
    table = validation_text(ValidationDocument(gates=(odd,), passed=False, findings=()))
    assert "[8, 128] and [/red] in it" in table


def test_a_domain_is_a_row_of_the_terminals_table() -> None:
    values = DomainValues(
        tokens=8192, base_perplexity=10.0, perplexity=10.5, perplexity_increase=0.05, kl_divergence=math.nan,
        kl_divergence_p99=0.5, top1_agreement=0.83, top1_agreement_interval=(0.81, 0.85),
    )  # fmt: skip
    document = ValidationDocument(gates=(), passed=False, findings=(), domains={"prose": values})
    table = validation_text(document)
    assert "prose" in table and "83.0% (81.0 to 85.0)" in table and "8,192" in table
    written = json.loads(json.dumps(document.to_json(), allow_nan=False))
    assert written["domains"]["prose"]["kl_divergence"] is None and written["domains"]["prose"]["tokens"] == 8192


def test_a_path_in_brackets_is_shown_whole() -> None:
    assert "/models/[final]/out" in render(finished(path=Path("/models/[final]/out")))


def test_what_became_of_a_release_is_told_in_words() -> None:
    waiting = PUBLISHED.model_copy(update={"pull_request": "https://hub/me/x/discussions/1"})
    assert published_words(waiting) == "waits to be merged: https://hub/me/x/discussions/1"
    assert published_words(PUBLISHED) == "published, tag v1"
    assert published_words(PUBLISHED.model_copy(update={"changed": False})) == "already published, tag v1"
