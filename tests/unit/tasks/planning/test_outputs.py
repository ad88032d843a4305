"""One plan for several outputs: what is shared is counted once, and who needs most decides."""

from __future__ import annotations

from typing import Any

from requant.flows.report.plan import plan_headline, plan_markdown, plan_text
from requant.tasks.planning.document import PlanDocument
from requant.tasks.planning.outputs import EarlierOutputs, combine_plans
from requant.tasks.recipe.loader import parse_recipe

RECIPE = parse_recipe(
    {
        "base": {"repo_id": "a/b"},
        "outputs": [{}, {"scheme": "W8A16"}, {"mtp": "drop"}],
        "publish": {"repo_id": "me/q"},
    }
)
FOUR, EIGHT, HEADLESS = RECIPE.each
NOTHING = {"bytes": None, "quantized_tensors": None, "kept_tensors": None}


def stage(name: str, state: str = "run", seconds: float = 10.0, cost: float | None = None) -> dict[str, Any]:
    nbytes = 100 if state == "run" else 0
    return {"name": name, "state": state, "bytes": nbytes, "seconds": seconds, "cost": cost, "figure": "assumed"}


def plan(size: int, ram: int, *stages: dict[str, Any], **changes: Any) -> PlanDocument:
    """The plan of one output."""
    document: dict[str, Any] = {
        "base": {"repo_id": "a/b", "revision": "main", "sha": "1" * 40, "bytes": 5000, "tensors": 7},
        "stages": list(stages),
        "output": {
            "bytes": size, "quantized_tensors": 3, "kept_tensors": 4, "packing": "auto_round", "quantized": [],
            "weights_bytes": size, "shards": {"a.safetensors": size}, "files": {"a.safetensors": size},
            "scheme": {"bits": 4, "group_size": 128, "sym": True},
            "kept": [{"tensors": "norm", "count": 1, "why": "small"}],
        },
        "needs": {
            "disk_bytes": 10 * size, "ram_bytes": ram, "vram_bytes": 1,
            "low_gpu_mem": {"ram_bytes": ram, "vram_bytes": 0},
            "stages": {"quantize": {"ram_bytes": ram, "vram_bytes": 1, "low_ram_bytes": ram, "low_vram_bytes": 0}},
        },
        "transfer": {"download_bytes": stages[0]["bytes"] if stages else 0, "upload_bytes": size},
        "engines": {"vllm": {"loads": True, "mtp": True, "reason": "nothing is in the way", "version": "1.0"}},
        "hardware": {"gpu": None, "seconds": sum(s["seconds"] for s in stages), "price_per_hour": 2.0, "cost": 0.5},
        "changes": None,
        "notes": ["of all"],
        "problems": [],
    }  # fmt: skip
    return PlanDocument.model_validate({**document, **changes})


def whole(**changes: Any) -> PlanDocument:
    headless = {"vllm": {"loads": True, "mtp": False, "reason": "no head", "version": "1.0"}}
    plans = {
        FOUR: plan(100, 50, stage("download"), stage("quantize", cost=0.5)),
        EIGHT: plan(200, 40, stage("download", "reused", 0.0), stage("quantize", cost=0.5), **changes),
        HEADLESS: plan(90, 60, stage("download", "reused", 0.0), stage("mtp_fix"), engines=headless),
    }
    return combine_plans(RECIPE, plans)


def test_the_base_is_downloaded_once_and_every_other_stage_names_its_output() -> None:
    document = whole().to_json()
    assert [(s["output"], s["name"]) for s in document["stages"]] == [
        (FOUR, "download"), (FOUR, "quantize"), (EIGHT, "quantize"), (HEADLESS, "mtp_fix"),
    ]  # fmt: skip
    assert document["transfer"] == {"download_bytes": 100, "upload_bytes": 390}


def test_times_costs_and_bytes_are_summed_and_needs_are_the_most_of_any() -> None:
    document = whole().to_json()
    assert (document["hardware"]["seconds"], document["hardware"]["cost"]) == (40.0, 1.5)
    assert document["output"]["bytes"] == 390
    needs = document["needs"]
    assert (needs["disk_bytes"], needs["ram_bytes"], needs["low_gpu_mem"]["ram_bytes"]) == (2000, 60, 60)
    assert needs["stages"]["quantize"]["ram_bytes"] == 60


def test_each_output_has_its_own_plan_and_repo_and_an_engine_is_as_the_worst_of_them() -> None:
    document = whole().to_json()
    assert [(o["name"], o["repo_id"], o["output"]["bytes"]) for o in document["outputs"]] == [
        (FOUR, f"me/q-{FOUR}", 100), (EIGHT, f"me/q-{EIGHT}", 200), (HEADLESS, f"me/q-{HEADLESS}", 90),
    ]  # fmt: skip
    assert document["engines"]["vllm"] == {
        "loads": True,
        "mtp": False,
        "reason": f"{HEADLESS}: no head",
        "version": "1.0",
    }
    assert set(plan(1, 1).to_json()) | {"outputs"} == set(document)


def test_what_is_true_of_all_is_told_once_and_the_rest_by_name() -> None:
    document = whole(problems=["the group size divides nothing"], notes=["of all", "of eight bits"]).to_json()
    assert document["notes"] == ["of all", f"{EIGHT}: of eight bits"]
    assert document["problems"] == [f"{EIGHT}: the group size divides nothing"]


def test_an_output_that_cannot_be_made_leaves_the_others_their_figures() -> None:
    needs = {"disk_bytes": None, "ram_bytes": None, "vram_bytes": None}
    document = whole(stages=[], output=NOTHING, needs=needs, engines={}, problems=["no"])
    assert (document.output.bytes, document.needs.ram_bytes) == (190, 60)
    assert f"{EIGHT}: no" in plan_text(document) and EIGHT in plan_markdown(document, "three.yaml")


def test_an_output_finds_done_what_those_before_it_make() -> None:
    before = EarlierOutputs()
    four, eight, headless = RECIPE.each.values()
    assert before.stages(four) == set()
    before.add(four, plan(100, 50, stage("download"), stage("quantize")))
    assert (before.stages(eight), before.stages(headless)) == ({"download"}, {"download", "quantize"})
    before.add(
        eight, plan(200, 50, stage("download", "reused"), stage("quantize", "reused"), stage("mtp_fix", "reused"))
    )
    assert before.kept_bytes == 100  # what is there already takes no more disk
    before.add(headless, plan(1, 1, output=NOTHING))
    assert before.recipes == [four, eight]


def test_a_text_that_the_base_writes_is_there_for_later_outputs_and_planned_once() -> None:
    own = parse_recipe({**RECIPE.model_dump(exclude_unset=True), "quantize": {"calibration": "self"}})
    four, eight, _ = own.each.values()
    before = EarlierOutputs()
    before.add(four, plan(100, 50, stage("download"), stage("self_calibration"), stage("quantize")))
    assert before.stages(eight) == {"download", "self_calibration"}
    stages = (stage("download"), stage("self_calibration"), stage("quantize"))
    combined = combine_plans(own, {name: plan(100, 50, *stages) for name in own.each})
    names = [one.name for one in combined.stages]
    assert [names.count(name) for name in ("download", "self_calibration", "quantize")] == [1, 1, 3]


def test_a_person_sees_one_table_of_stages_and_one_of_outputs() -> None:
    text = plan_text(whole())
    assert plan_headline(whole()) == "5.0 kB become 0.4 kB in 3 outputs"
    assert f"me/q-{EIGHT}" in text and text.count("download") == 1
    shown = plan_markdown(whole(), "three.yaml")
    assert shown.count("<details>") == 3 and f"tensors of {HEADLESS}" in shown and "`a/b@1111111`: " in shown
