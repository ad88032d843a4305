"""What a run of several outputs says at its end, and the card of each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requant.flows.cli.report_files import write_report
from requant.flows.recipe_flow import run_name
from requant.flows.report.markdown import comparison
from requant.flows.report.report import COMPARISON_COLUMNS, RunReport, compared_rows, run_headline, verdict, worst
from requant.flows.report.terminal import render
from requant.tasks.artifact import File, Manifest
from requant.tasks.card.card import make_card
from requant.tasks.errors import RecipeError
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.plots import Picture
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.record import StageRecord
from requant.tasks.validating.gates import Gate
from requant.tasks.validating.measured import Measured
from tests.factories.cards import FACTS, MEASURED, SHA, facts_of

RECIPE = parse_recipe(
    {
        "base": {"repo_id": "Qwen/Qwen3.6-27B"},
        "outputs": [{}, {"scheme": "W8A16"}, {"format": "auto_round:auto_awq"}],
        "publish": {"repo_id": "me/q"},
    }
)
BASE = Revision("Qwen/Qwen3.6-27B", SHA, ())
FOUR, EIGHT, AWQ = RECIPE.each


def manifest(gigabytes: int) -> Manifest:
    return Manifest.of([File("model.safetensors", gigabytes * 10**9, "a" * 64), File("config.json", 9, "b" * 64)])


def output(name: str, size: int, **changes: Any) -> RunReport:
    stages = [
        StageResult("download", "base", "ran" if name == FOUR else "reused", 1.0, manifest(54), StageRecord()),
        StageResult("quantize", f"q-{name}", "ran", 60.0, manifest(size), StageRecord()),
    ]
    report = RunReport(RECIPE.each[name], name, base=BASE, stages=stages, artifact=manifest(size))
    report.status, report.gates = "published", [Gate("structure", 0.0, 0.0, True)]
    report.measured = Measured.from_json(
        {"perplexity_increase": 0.0123, "top1_agreement": 0.95, "mtp_acceptance": 0.871}
    )
    return replace(report, **changes)


def three(**changes: Any) -> RunReport:
    made = {FOUR: output(FOUR, 18), EIGHT: output(EIGHT, 27), AWQ: output(AWQ, 18, **changes)}
    return RunReport(RECIPE, base=BASE, outputs=made, status=worst(made.values()))


REJECTED = {"status": "rejected", "gates": [Gate("finite", 0.0, 0.0, True), Gate("top1_agreement", 0.5, 0.85, False)]}
FAILED = {"status": "failed", "error": "the disk is full", "artifact": None}


def test_the_document_has_the_keys_of_one_result_and_that_of_each_output() -> None:
    document = json.loads(json.dumps(three().document().to_json()))
    single = set(output(FOUR, 18).document().to_json()) - {"name"}
    assert [set(each) for each in document["outputs"]] == [single | {"name"}] * 3
    assert set(document) == single | {"outputs"}
    assert [each["name"] for each in document["outputs"]] == [FOUR, EIGHT, AWQ]
    assert (document["status"], document["error"], document["published"]) == ("published", None, None)
    assert document["base"] == {"repo_id": "Qwen/Qwen3.6-27B", "sha": SHA}
    assert document["artifact"] == {"digest": None, "path": None}
    rows = [(stage["output"], stage["name"], stage["state"]) for stage in document["stages"]]
    assert rows[:3] == [(FOUR, "download", "ran"), (FOUR, "quantize", "ran"), (EIGHT, "download", "reused")]
    assert len(rows) == 6 and [gate["output"] for gate in document["gates"]] == [FOUR, EIGHT, AWQ]


def test_a_run_that_ended_before_its_outputs_has_none() -> None:
    document = RunReport(RECIPE, error="no such repo").document().to_json()
    assert (document["status"], document["error"], document["outputs"]) == ("failed", "no such repo", [])


def test_a_run_is_the_worst_of_its_outputs_and_says_which() -> None:
    assert three().status == "published"
    assert verdict(three()) == f"{FOUR} published; {EIGHT} published; {AWQ} published"
    rejected, failed = three(**REJECTED), three(**FAILED)
    assert rejected.status == "rejected" and failed.status == "failed"
    assert verdict(rejected).endswith(f"{AWQ} rejected (nothing was published: top1_agreement failed)")
    assert verdict(failed).endswith(f"{EIGHT} published; {AWQ} failed (the disk is full)")
    assert worst([output(FOUR, 18, **FAILED), output(EIGHT, 27, **REJECTED)]) == "failed"


def test_outputs_are_compared_side_by_side() -> None:
    rows = [dict(zip(COMPARISON_COLUMNS, row, strict=True)) for row in compared_rows(three(**REJECTED))]
    assert [row["output"] for row in rows] == [FOUR, EIGHT, AWQ]
    assert (rows[0]["size"], rows[0]["smaller"], rows[1]["smaller"]) == ("18.00 GB", "3.00 times", "2.00 times")
    assert (rows[0]["perplexity"], rows[0]["same token"], rows[0]["draft acceptance"]) == ("+1.2%", "95.0%", "87.1%")
    assert [row["gates"] for row in rows] == ["1 passed", "1 passed", "1 of 2 failed"]
    assert compared_rows(three(**FAILED))[2][2:4] == ("", "")


def test_the_terminal_shows_each_output_and_then_all() -> None:
    text = render(three(**FAILED))
    for name in RECIPE.each:
        assert text.count(f"{name}: Qwen/Qwen3.6-27B@0123456") == 1
    assert text.index("the disk is full") < text.index("draft acceptance") < text.index("3.00 times")
    assert "no such repo" in render(RunReport(RECIPE, error="no such repo"))


def test_a_report_has_a_folder_of_pictures_for_each_output(tmp_path: Path) -> None:
    picture = Picture("losses", "Losses.", b"<svg/>", b"png")
    write_report(three(pictures=[picture]), tmp_path / "told.json")
    text = (tmp_path / "told.md").read_text()
    assert text.startswith(comparison(three())) and f"![Losses.](told-pictures/{AWQ}/losses.svg)" in text
    assert (tmp_path / "told-pictures" / AWQ / "losses.svg").read_bytes() == b"<svg/>"
    assert json.loads((tmp_path / "told.json").read_text())["outputs"][2]["name"] == AWQ


def test_the_store_keeps_what_any_output_uses_in_the_name_of_the_whole_recipe() -> None:
    run = three().run
    assert run is not None and run.recipe == RECIPE.digest[:16]
    assert run.artifacts == (("download", "base"), *(("quantize", f"q-{name}") for name in RECIPE.each))
    assert run.makes == f"me/q-{FOUR}, me/q-{EIGHT}, me/q-{AWQ}"
    assert RunReport(RECIPE, base=BASE).run is None


def test_the_headline_and_the_name_of_the_run_say_that_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_headline(three()) == f"Qwen/Qwen3.6-27B@0123456 -> {FOUR}, {EIGHT}, {AWQ}"
    monkeypatch.setattr("prefect.runtime.flow_run.parameters", {"recipe": RECIPE}, raising=False)
    assert run_name() == "Qwen3.6-27B 3 outputs"


def test_a_card_names_its_siblings_and_reproduces_itself_alone() -> None:
    others = {name: one for name, one in RECIPE.each.items() if name != EIGHT}
    card = make_card(replace(FACTS, recipe=RECIPE.each[EIGHT], others=others))
    section = card.split("## Other quantizations of this base")[1].split("\n## ")[0]
    row = "| [me/q-{0}](https://huggingface.co/me/q-{0}) | W4A16, group size 128, symmetric | {1} | 200 | keep |"
    assert row.format(FOUR, "auto_round") in section and row.format(AWQ, "auto_round:auto_awq") in section
    assert f"me/q-{EIGHT}" not in section
    recipe = card.split("```yaml\n")[1].split("\n```")[0]
    assert "outputs" not in recipe and "scheme: W8A16" in recipe and f"repo_id: me/q-{EIGHT}" in recipe
    assert "Other quantizations" not in make_card(FACTS)


def test_siblings_of_a_base_without_a_head_are_not_said_to_keep_one() -> None:
    facts = replace(
        FACTS, recipe=RECIPE.each[EIGHT], others={name: r for name, r in RECIPE.each.items() if name != EIGHT}
    )
    assert "| keep |" in make_card(facts)
    assert "| keep |" not in make_card(
        replace(facts, measured=facts_of(measured={**MEASURED, "head_kept": False}).measured)
    )


def test_a_rollback_of_several_must_name_the_repo(tmp_path: Path) -> None:
    from requant.flows.cli.publish import target_of

    (tmp_path / "three.yaml").write_text(RECIPE.model_dump_json(exclude_unset=True))
    with pytest.raises(RecipeError, match=f"has 3 outputs: name the repo itself, me/q-{FOUR} or"):
        target_of(str(tmp_path / "three.yaml"))
