"""quantize: keys, the ladder of settings, the child's events. The child itself runs in the integration tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from requant.tasks import quantize as quantize_stage
from requant.tasks.artifact import File, Manifest
from requant.tasks.quantize import quantize_key, read_part, tokenizer_part
from requant.tasks.quantizing.events import BlockStarted, read_events
from requant.tasks.quantizing.job import JobResult, Rung
from requant.tasks.quantizing.memory_fallback import ladder
from requant.tasks.quantizing.samples import SampleSource, SourceUse
from requant.tasks.quantizing.tuned_blocks import tuned_blocks
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.texts.calibration import Calibration, CalibrationSource
from requant.tasks.texts.text import Text

A, B = "a" * 64, "b" * 64
BASE = Manifest.of(
    File(path, 3, A)
    for path in (
        "README.md", ".gitattributes", "LICENSE", "config.json", "generation_config.json", "chat_template.jinja",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
        "model-00001-of-00001.safetensors", "model.safetensors.index.json", "modeling_x.py",
    )
)  # fmt: skip
TEXT = Text("builtin:python", A, path=Path("/here/python.txt"))


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, **changes})


def key(recipe: Recipe, base: Manifest = BASE, text: Text = TEXT) -> str:
    return quantize_key(recipe, base, Calibration.of(text))


def changed(path: str) -> Manifest:
    return Manifest.of(replace(f, sha256=B) if f.path == path else f for f in BASE.files)


@pytest.mark.parametrize("path", [
    "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "modeling_x.py",
    "model-00001-of-00001.safetensors", "model.safetensors.index.json",
])  # fmt: skip
def test_a_file_that_the_weights_depend_on_changes_the_key(path: str) -> None:
    assert key(recipe(), changed(path)) != key(recipe())
    assert path in read_part(BASE)


@pytest.mark.parametrize("path", [
    "README.md", ".gitattributes", "LICENSE", "generation_config.json", "chat_template.jinja",
    "preprocessor_config.json",
])  # fmt: skip
def test_any_other_file_of_the_base_quantizes_nothing_anew(path: str) -> None:
    assert key(recipe(), changed(path)) == key(recipe())
    assert path not in read_part(BASE)


SETTINGS: dict[str, Any] = {
    "scheme": "W8A16", "bits": 8, "group_size": 32, "sym": False, "format": "auto_round:auto_awq", "iters": 199,
    "nsamples": 127, "seqlen": 2047, "batch_size": 4, "lr": 0.01, "seed": 43, "layers": {"lm_head": {"bits": 8}},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_of_quantize_changes_the_key(name: str) -> None:
    assert key(recipe(quantize={name: SETTINGS[name]})) != key(recipe())


ALIKE: list[tuple[dict[str, Any], str]] = [
    ({}, "auto_round:auto_gptq"),
    ({"bits": 2, "layers": {"up_proj": {"bits": 8}}}, "auto_round:auto_gptq"),
    ({"sym": False}, "auto_round:auto_awq"),
    ({"sym": False, "layers": {"up_proj": {"bits": 16, "data_type": "fp"}}}, "auto_round:auto_awq"),
]


@pytest.mark.parametrize(("quantize", "spelled"), ALIKE, ids=str)
def test_two_formats_that_auto_round_packs_alike_share_the_work(quantize: dict[str, Any], spelled: str) -> None:
    assert key(recipe(quantize={**quantize, "format": spelled})) == key(recipe(quantize=quantize))


def test_a_format_that_is_packed_in_its_own_way_has_a_key_of_its_own() -> None:
    awq = {"format": "auto_round:auto_awq"}
    for quantize in (
        {},
        {"sym": False, "layers": {"up_proj": {"bits": 8}}},
        {"sym": False, "layers": {"x": {"scheme": "W2A16"}}},
    ):
        assert key(recipe(quantize={**quantize, **awq})) != key(recipe(quantize=quantize))


def test_the_keys_of_what_stores_hold_already_stay_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every model would be quantized once more, as it is on purpose where the stage's version is raised."""
    monkeypatch.setattr(quantize_stage, "STAGE", replace(quantize_stage.STAGE, version=5))
    assert key(recipe())[:16] == "b4f0c9db3226d402"
    assert key(recipe(quantize={"sym": False, "group_size": 32}))[:16] == "4a1c4a61e7e08997"
    assert key(recipe(quantize={"format": "auto_round:auto_awq"}))[:16] == "554a13989a9a9358"


def test_another_calibration_text_changes_the_key_and_its_name_or_place_does_not() -> None:
    assert key(recipe(), text=replace(TEXT, digest=B)) != key(recipe())
    assert key(recipe(), text=Text("other", A, path=Path("/there/x.txt"))) == key(recipe())
    assert key(recipe(quantize={"calibration": "me/text"})) == key(recipe())


def test_a_new_chat_template_changes_the_key_only_of_a_text_with_chats() -> None:
    without = Manifest.of(f for f in BASE.files if f.path != "chat_template.jinja")
    bases = (BASE, changed("chat_template.jinja"), without)
    assert len({key(recipe(), base) for base in bases}) == 1
    assert len({key(recipe(), base, replace(TEXT, chats=True)) for base in bases}) == 3
    assert "README.md" not in tokenizer_part(BASE) and "chat_template.jinja" in tokenizer_part(BASE)


def test_running_the_repos_own_code_changes_the_key() -> None:
    assert key(recipe(allow_remote_code=True)) != key(recipe())


@pytest.mark.parametrize("section", [
    {"mtp": "drop"}, {"gates": {"min_top1_agreement": 0.5}}, {"benchmark": {"engine": "none"}},
    {"publish": {"repo_id": "me/x"}}, {"base": {"repo_id": "a/b", "revision": "v2"}},
])  # fmt: skip
def test_what_quantize_does_not_read_does_not_change_the_key(section: dict[str, Any]) -> None:
    assert key(recipe(**section)) == key(recipe())


def test_a_preset_has_the_key_of_what_it_stands_for() -> None:
    assert key(recipe(quantize={"preset": "auto-round"})) == key(recipe())


def test_a_result_of_a_version_that_did_not_count_its_sources_is_recorded_without_them() -> None:
    old = JobResult.model_validate({"checkpoint": "/work/out", "settings": {}, "bits": {}, "peak_gpu_bytes": None})
    source = SampleSource(name="builtin:python", paths=[])
    read = [quantize_stage._ReadSource(CalibrationSource(TEXT), source, None)]
    assert quantize_stage._sources(read, old.calibration) == {}
    use = SourceUse(rows=1, tokens=9, samples={"": 2})
    (told,) = quantize_stage._sources(read, [use])["sources"]
    assert (told["source"], told["tokens"], told["samples"]) == ("builtin:python", 9, {"": 2})


def rungs_of(**settings: Any) -> list[Rung]:
    return list(ladder(Rung.asked(Quantize(**settings))))


def test_the_ladder_begins_as_asked_and_ends_with_one_sample_a_step() -> None:
    rungs = rungs_of(batch_size=8)
    assert [(r.batch_size, r.gradient_accumulate_steps, r.low_gpu_mem) for r in rungs] == [
        (8, 1, "auto"), (8, 1, True), (4, 2, True), (2, 4, True), (1, 8, True), (1, 8, True),
    ]  # fmt: skip


def test_a_ladder_that_begins_low_has_no_rung_twice() -> None:
    assert [(r.batch_size, r.offload) for r in rungs_of(batch_size=1, low_gpu_mem=True)] == [(1, False), (1, True)]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7, 8, 12, 15, 16, 100])
def test_every_rung_needs_less_and_sees_as_many_samples_a_step(batch: int) -> None:
    """The same samples a step, accumulated: the result is the same but for float noise."""
    rungs = rungs_of(batch_size=batch, low_gpu_mem=False)
    assert {r.batch_size * r.gradient_accumulate_steps for r in rungs} == {batch}
    sizes = [r.batch_size for r in rungs]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1


def write_events(path: Path, *events: dict[str, Any], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(event) for event in events) + end)
    return path


def recorded_blocks(events: Path) -> list[dict[str, Any]]:
    return [block.to_json() for block in tuned_blocks(events)]


def test_events_are_read_line_by_line_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path, 0) == (0, [])
    path.write_text('{"event": "block", "name": "a"}\n{"event": "block", "name": "b"}\n{"event": "blo')
    position, events = read_events(path, 0)
    assert events == [BlockStarted(name="a"), BlockStarted(name="b")] and position == 64
    with path.open("a") as stream:
        stream.write('ck", "name": "c"}\n')
    assert read_events(path, position)[1] == [BlockStarted(name="c")]


def test_blocks_are_told_with_their_time_and_their_loss(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl",
        {"event": "settings", "seconds": 0.5},
        {"event": "block", "seconds": 1.0, "name": "layers.0"},
        {"event": "loss", "seconds": 2.0, "before": 0.5, "after": 0.1},
        {"event": "progress", "seconds": 3.5, "done": 1, "total": 2},
        {"event": "block", "seconds": 3.5, "name": "layers.1"},
        {"event": "warning", "seconds": 3.6, "text": "x"},
        {"event": "progress", "seconds": 4.0, "done": 2, "total": 2},
    )
    assert recorded_blocks(events) == [
        {"name": "layers.0", "starts": 1, "loss_before": 0.5, "loss_after": 0.1, "seconds": 2.5},
        {"name": "layers.1", "starts": 1, "seconds": 0.5},
    ]


def test_a_block_started_again_has_the_last_attempts_values(tmp_path: Path) -> None:
    events = write_events(
        tmp_path / "events.jsonl",
        {"event": "block", "seconds": 1.0, "name": "layers.0"},
        {"event": "loss", "seconds": 2.0, "before": 9.0, "after": 8.0},
        {"event": "error", "seconds": 2.5, "kind": "oom", "text": "x"},
        {"event": "block", "seconds": 0.5, "name": "layers.0"},
        {"event": "progress", "seconds": 1.0, "done": 1, "total": 1},
    )
    assert recorded_blocks(events) == [{"name": "layers.0", "starts": 2, "seconds": 0.5}]


def test_a_child_that_never_began_has_no_blocks(tmp_path: Path) -> None:
    assert recorded_blocks(tmp_path / "events.jsonl") == []


def test_a_line_cut_by_a_kill_does_not_spoil_the_next_attempt(tmp_path: Path) -> None:
    """The next child appends to the same file: its first line follows the cut one without a line break."""
    first = {"event": "block", "seconds": 1.0, "name": "layers.0"}
    events = write_events(tmp_path / "events.jsonl", first, end='\n{"event": "loss", "bef')
    with events.open("a") as stream:
        stream.write('{"event": "settings", "seconds": 0.1}\n' + json.dumps({**first, "seconds": 0.2}) + "\n")
        stream.write('{"event": "progress", "seconds": 1.2, "done": 1, "total": 1}\n')
    assert recorded_blocks(events) == [{"name": "layers.0", "starts": 2, "seconds": 1.0}]
