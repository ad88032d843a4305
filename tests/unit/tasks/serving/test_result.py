"""The result of a benchmark: read from recorded documents, written as it was read, and summarized."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from requant.tasks.errors import StoreError
from requant.tasks.serving.result import BenchmarkResult, PromptResult, TokenGaps, compare_mtp, summarize
from tests.factories.paths import ROOT

# What `requant bench --json` printed of a small model in each engine, before results had types.
RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "unit" / "tasks" / "serving" / "benchmarks.json").read_text())


@pytest.mark.parametrize("engine", RECORDED)
def test_a_recorded_document_is_written_as_it_was_read(engine: str) -> None:
    document = RECORDED[engine]
    result = BenchmarkResult.from_json(json.dumps(document))
    assert result.to_json() == document
    again = BenchmarkResult.from_json(json.dumps(result.to_json()).encode())
    assert again == result and json.dumps(again.to_json()) == json.dumps(result.to_json())
    jsonschema.validate(document, BenchmarkResult.model_json_schema(mode="serialization"))


def test_the_document_of_no_engine_is_the_same_bytes_in_every_store() -> None:
    assert json.dumps(BenchmarkResult.from_json(json.dumps(RECORDED["none"])).to_json()) == json.dumps(RECORDED["none"])


def test_keys_of_later_versions_are_ignored_and_missing_ones_have_defaults() -> None:
    row = {**RECORDED["vllm"]["prompts"][0], "energy_joules": 5}
    document = {"engine": "vllm", "prompts": [row], "future": {"a": 1}}
    result = BenchmarkResult.from_json(json.dumps(document))
    assert result.to_json() == {"engine": "vllm", "prompts": [RECORDED["vllm"]["prompts"][0]]}
    assert result.tokens_per_second is None and result.mtp is None and result.logs is None


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("{", r"\(the document: Invalid JSON"),
        ("[]", r"\(the document: Input should be an object\)"),
        ("{}", r"\(engine: Field required\)"),
        ('{"engine": 5}', r"\(engine: Input should be a valid string\)"),
        ('{"engine": "vllm", "prompts": [{"prefill": 1.0}]}', r"\(prompts\.0\.set: Field required\)"),
        ('{"engine": "vllm", "draft_tokens": "1"}', r"\(draft_tokens: Input should be a valid integer\)"),
    ],
)
def test_a_document_that_does_not_fit_is_one_sentence(document: str, said: str) -> None:
    with pytest.raises(StoreError, match=said) as caught:
        BenchmarkResult.from_json(document)
    assert len(str(caught.value).splitlines()) == 1 and "another store" in str(caught.value)


def row(**changes: Any) -> PromptResult:
    values: dict[str, Any] = {
        "set": "card", "name": "code", "mtp": False, "sampling": "greedy", "concurrency": 1, "tokens": 100,
        "tokens_per_second": 100.0, "first_token_seconds": 0.1,
        "inter_token_seconds": TokenGaps(median=0.01, p99=0.02), "acceptance": None,
    }  # fmt: skip
    return PromptResult(**{**values, **changes})


def test_speeds_are_summed_up_as_all_tokens_over_all_time() -> None:
    rows = [row(), row(tokens=300, tokens_per_second=50.0), row(concurrency=4, tokens_per_second=900.0)]
    found = summarize(rows, mtp=False)
    assert found is not None and found.tokens_per_second == round(400 / 7, 3)
    assert summarize(rows, mtp=True) is None


def test_speed_is_compared_where_it_was_measured_with_mtp_and_without() -> None:
    on = row(mtp=True, tokens_per_second=150.0, drafted_tokens=50, accepted_tokens=45, acceptance=0.9)
    both = compare_mtp([row(), on])
    assert both.on is not None and (both.on.tokens_per_second, both.on.acceptance, both.speedup) == (150.0, 0.9, 1.5)
    alone = compare_mtp([row()])
    assert alone.off is not None and (alone.off.tokens_per_second, alone.off.acceptance) == (100.0, None)
    assert alone.on is None and alone.speedup is None
