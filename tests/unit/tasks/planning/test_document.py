"""The plan's document: what was printed before it had types is read and written unchanged, and its keys are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from requant.tasks.plan import plan_of
from requant.tasks.planning.document import PlanDocument
from requant.tasks.planning.inputs import Inputs
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from tests.factories.pico import pico_base
from tests.factories.stores import held_base

# Documents of `requant plan --json` from before the models were written: the contract, not what a plan says today.
PLANS = json.loads(Path(__file__).with_name("plans.json").read_text())
KEYS = ["base", "stages", "output", "needs", "transfer", "engines", "hardware", "changes", "notes", "problems"]
OUTPUT = ["bytes", "weights_bytes", "quantized_tensors", "kept_tensors", "scheme", "packing", "shards", "files"]
STAGE = ["name", "state", "bytes", "seconds", "cost", "figure"]
NEEDS = ["disk_bytes", "ram_bytes", "vram_bytes", "low_gpu_mem", "stages"]
UNKNOWN = {"bytes": None, "quantized_tensors": None, "kept_tensors": None}


def ordered(document: Any) -> Any:
    """A document in which the order of keys counts."""
    if isinstance(document, dict):
        return [(key, ordered(value)) for key, value in document.items()]
    return [ordered(value) for value in document] if isinstance(document, list) else document


def planned(store: Store, base: Path, **recipe: Any) -> dict[str, Any]:
    """The document of a plan for another machine, of a base that the store has."""
    small = {"group_size": 32, "nsamples": 8, "seqlen": 64, "batch_size": 4}
    calibration = Calibration.of(find_text("builtin:python"))
    inputs = Inputs(held_base(store, base), calibration, find_text("builtin:python-evaluation"))
    asked = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": small, **recipe})
    document = plan_of(store, asked, inputs, elsewhere=True)
    assert PlanDocument.model_validate(document.to_json()) == document
    return document.to_json()


@pytest.mark.parametrize("case", PLANS)
def test_documents_from_before_the_models_are_read_and_written_unchanged(case: str) -> None:
    assert ordered(PlanDocument.model_validate(PLANS[case]).to_json()) == ordered(PLANS[case])


def test_the_plan_of_one_result_has_the_keys_that_it_has_had(store: Store, tmp_path: Path) -> None:
    document = planned(store, pico_base(tmp_path / "base"))
    assert list(document) == [*KEYS, "calibration"]
    assert list(document["output"]) == [*OUTPUT, "quantized", "kept"]
    assert all(list(stage) == STAGE for stage in document["stages"])
    assert list(document["needs"]) == NEEDS
    assert list(document["needs"]["stages"]["mtp_fix"]) == ["disk_bytes"]
    assert "disk_bytes" not in document["needs"]["stages"]["benchmark"]


@pytest.mark.parametrize(
    ("engine", "asked"), [("vllm", True), ("auto", True), ("torch", False), ("none", False), ("url:http://a:1", False)]
)
def test_stages_that_serve_the_base_are_planned_where_an_engine_can_and_need_room_for_it(
    engine: str, asked: bool, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUANT_VLLM", "true")  # a command that exists
    document = planned(store, pico_base(tmp_path / "base"), benchmark={"engine": engine}, probes={})
    names = {stage["name"] for stage in document["stages"]} & {"acceptance", "probe"}
    assert names == ({"acceptance", "probe"} if asked else set())
    needs = document["needs"]["stages"]
    for name in names:
        assert needs[name]["vram_bytes"] > needs["benchmark"]["vram_bytes"]


def test_the_plan_of_outputs_names_the_output_of_each_stage_and_has_a_plan_of_each(
    store: Store, tmp_path: Path
) -> None:
    document = planned(store, pico_base(tmp_path / "base"), outputs=[{}, {"name": "eight", "scheme": "W8A16"}])
    assert list(document) == [*KEYS, "calibration", "outputs"]
    assert all(list(stage) == ["output", *STAGE] for stage in document["stages"])
    assert list(document["output"]) == list(UNKNOWN) and list(document["needs"]) == NEEDS
    for one in document["outputs"]:
        assert list(one) == ["name", "repo_id", *KEYS]
        assert all(list(stage) == STAGE for stage in one["stages"])


def test_a_result_that_cannot_be_made_has_nulls_and_problems(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", head=False)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"mtp_num_hidden_layers": 0', '"mtp_num_hidden_layers": 1'))
    document = planned(store, base)
    assert list(document) == [*KEYS, "calibration"] and document["stages"] == [] and document["output"] == UNKNOWN
    assert document["needs"] == {"disk_bytes": None, "ram_bytes": None, "vram_bytes": None}
    (problem,) = document["problems"]
    assert "promises 1 MTP layers and its tensors have 0" in problem and str(tmp_path) not in problem


def test_a_document_cannot_be_changed_and_takes_no_key_that_it_does_not_know() -> None:
    document = PlanDocument.model_validate(next(iter(PLANS.values())))
    with pytest.raises(ValidationError, match="frozen"):
        document.problems = ()  # type: ignore[misc]
    with pytest.raises(ValidationError, match="surprise"):
        PlanDocument.model_validate({**document.to_json(), "surprise": 1})


SERVERS = {"engine": "url:http://127.0.0.1:8000", "base_engine": "url:http://127.0.0.1:8001"}
COMPARED: list[tuple[dict[str, Any], bool]] = [
    ({"benchmark": {"engine": "vllm"}}, True),
    ({"benchmark": {"engine": "vllm"}, "mtp": "drop"}, False),
    ({"benchmark": {"engine": "torch"}}, False),
    ({"benchmark": {"engine": SERVERS["engine"]}}, False),
    ({"benchmark": SERVERS}, True),
]


@pytest.mark.parametrize(("recipe", "compared"), COMPARED)
def test_the_plan_compares_drafts_where_an_engine_has_result_and_base(
    recipe: dict[str, Any], compared: bool, store: Store, tmp_path: Path
) -> None:
    document = planned(store, pico_base(tmp_path / "base"), **recipe)
    names = [stage["name"] for stage in document["stages"]]
    assert names[-1] == ("acceptance" if compared else "benchmark")
