"""The measured values: their JSON form is that of the documents that were recorded before they had a type."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from requant.tasks.checkpoint.audit import Account
from requant.tasks.checkpoint.weight_error import Fidelity
from requant.tasks.checkpoint.writer import json_bytes
from requant.tasks.errors import StoreError
from requant.tasks.redaction import without_non_finite
from requant.tasks.validate import RESULT_FILE, read_values
from requant.tasks.validating.measured import (
    KEYS,
    NOT_COMPARED,
    NOT_EVALUATED,
    NOT_RUN,
    Audit,
    Behaviour,
    Divergence,
    Evaluation,
    MatrixError,
    Measured,
    Side,
)
from tests.factories.measured import good

RECORDED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "measured.json").read_text())


@pytest.mark.parametrize("case", RECORDED)
def test_a_recorded_document_is_written_as_it_was(case: str) -> None:
    written = Measured.from_json(RECORDED[case]).to_json()
    assert written == RECORDED[case]
    assert json_bytes(written) == json_bytes(RECORDED[case]), "and the keys have the same order"


def test_values_are_read_into_their_parts() -> None:
    measured = Measured.from_json(RECORDED["everything"])
    document = RECORDED["everything"]
    assert measured.text == document["text"] and measured.audit.packed == document["packed"]
    assert measured.matrices is not None and measured.matrices[1].bits == document["matrices"][1]["bits"]
    assert measured.divergence.blocks is not None
    assert measured.divergence.blocks[1].drift == document["blocks"][1]["drift"]
    assert measured.behaviour.base.perplexity == document["base_perplexity"]
    assert measured.behaviour.quantized.perplexity_interval == tuple(document["perplexity_interval"])
    assert measured.evaluation is not None and measured.evaluation.tasks is not None
    assert measured.evaluation.tasks["arc_easy"].ours == document["tasks"]["arc_easy"]["ours"]


def test_what_could_not_be_run_has_nulls_for_the_gates_and_says_why() -> None:
    measured = Measured.from_json(RECORDED["cannot be run"])
    assert (measured.behaviour, measured.divergence, measured.evaluation) == (NOT_RUN, NOT_COMPARED, NOT_EVALUATED)
    assert measured.not_measured is not None and " lacks " in measured.not_measured
    assert Measured.from_json(RECORDED["everything"]).not_measured is None


def test_a_document_of_another_version_is_read_without_its_unknown_keys_and_with_defaults() -> None:
    measured = Measured.from_json({"head_kept": True, "invented": 5, "blocks": None})
    assert measured.to_json() == {"head_kept": True, "blocks": None}
    assert measured.evaluation is None and measured.audit.altered == () and measured.behaviour.tokens is None


def test_a_number_that_json_has_not_stays_what_it_is() -> None:
    measured = good(perplexity=math.inf, perplexity_increase=math.nan)
    assert measured.behaviour.quantized.perplexity == math.inf
    again = Measured.from_json(json.loads(json.dumps(measured.to_json())))
    assert again.behaviour.perplexity_increase is not None and math.isnan(again.behaviour.perplexity_increase)


def test_every_value_has_its_place_in_the_written_order() -> None:
    own = {name for part in (Measured, Audit, Divergence, Behaviour, Evaluation) for name in part.model_fields}
    own -= {"audit", "divergence", "behaviour", "evaluation", "base", "quantized"}
    assert set(KEYS) == own | {f"{side}{name}" for side in ("", "base_") for name in Side.model_fields}


def test_every_finding_and_figure_of_the_files_has_its_field() -> None:
    assert {field.name for field in fields(Account)} == set(Audit.model_fields)
    assert {field.name for field in fields(Fidelity)} == set(MatrixError.model_fields)


def test_the_document_of_a_run_has_null_for_what_is_not_finite_and_is_read_again() -> None:
    """Where a model is broken, any figure can be NaN."""
    broken = json.loads(json.dumps(RECORDED["everything"]), parse_float=lambda number: math.nan)
    document = without_non_finite(Measured.from_json(broken).to_json())
    again = Measured.from_json(document)
    assert again.matrices is not None and math.isnan(again.matrices[0].slope)
    assert without_non_finite(again.to_json()) == document


WRONG: dict[str, tuple[str, Any]] = {
    "a word for a number": ("perplexity_increase", "little"),
    "a number for a list": ("unaccounted", 5),
    "a block without its error": ("blocks", [{"block": 0, "kind": "decoder", "drift": 0.1}]),
    "three ends of an interval": ("perplexity_interval", [1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize(("key", "value"), WRONG.values(), ids=WRONG)
def test_a_value_that_does_not_fit_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        good(**{key: value})


class OneBlob:
    """A store that holds one file."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.manifest = {RESULT_FILE: "its file"}
        self.key = "k" * 64

    def read_blob(self, file: str) -> bytes:
        assert file == "its file"
        return self.content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"perplexity": "low"}', "perplexity: Input should be a valid number"),
        (b"[1]", "validation.json: Input should be a valid dictionary"),
        (b"{", "validation.json: Expecting property name"),
    ],
)
def test_a_file_in_the_store_that_does_not_fit_is_an_error_of_one_sentence(content: bytes, reason: str) -> None:
    store: Any = OneBlob(content)
    with pytest.raises(StoreError) as refused:
        read_values(store, store)
    assert reason in str(refused.value) and "\n" not in str(refused.value)
    assert str(refused.value).endswith("delete the artifact and run again")


def test_reading_what_was_measured_needs_no_torch() -> None:
    script = "import sys, requant.tasks.validating.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
