"""How long and how much: figures of earlier runs before measured blocks before a table; memory, disk, changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra.bench.shapes import Dimensions, write_base
from requant.tasks.artifact import File, Manifest
from requant.tasks.checkpoint.architecture import architecture_problem, known_model_types
from requant.tasks.checkpoint.blocks import block_sizes
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.planning import resources
from requant.tasks.planning.base_diff import changed_fields, changed_files
from requant.tasks.planning.durations import effort, estimate_quantize, estimate_stage, estimate_writing, gpu_figures
from requant.tasks.planning.output import CheckpointPlan, plan_output
from requant.tasks.planning.resources import disk_problem, estimate_needs
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Benchmark, Recipe
from requant.tasks.record import StageRecord, TuningWork
from requant.tasks.store import Store
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base

# Packed weights of Qwen3.6-27B's blocks.
BLOCKS = {f"layers.{n}": 382_730_240 if (n + 1) % 4 else 372_244_480 for n in range(64)}
LINEAR = {block for block, count in BLOCKS.items() if count > 380_000_000}
RECORDED = [run for run in json.loads((ROOT / "infra" / "gpu-figures.json").read_text()) if run["stage"] == "quantize"]
ALL_STAGES = {"quantize", "mtp_fix", "validate", "benchmark"}


def recipe(gpu: str | None = None, **quantize: Any) -> Recipe:
    hardware = {"hardware": {"gpu": gpu}} if gpu else {}
    return parse_recipe({"base": {"repo_id": "a/b"}, "quantize": quantize, **hardware})


def record(store: Store, stage: str, **facts: Any) -> None:
    """Provenance as a stage leaves it."""
    store.commit(stage, "0" * 64, Manifest.of([]), StageRecord({"started": "2026-11-01T10:00:00", **facts}))


def test_a_measured_gpus_blocks_foretell_the_whole_model(store: Store) -> None:
    measured = json.loads((Path(resources.__file__).parent / "gpu-figures.json").read_text())
    whole = measured["whole_seconds"]
    for fast, variant in ((True, "requant"), (False, "auto-round")):
        figure = estimate_quantize(store, recipe("H100", fast=fast), BLOCKS, LINEAR)
        assert figure.seconds == pytest.approx(whole[variant], rel=0.03)
        assert measured["card"]["name"] in figure.source


def base_of(folder: Path, layers: int) -> CheckpointPlan:
    """The plan of a base of 27 B dimensions with so many layers, from headers alone."""
    base = folder / "base"
    write_base(base, Dimensions(layers=layers))
    return plan_output(Checkpoint.open(base), recipe(), {})


@pytest.mark.parametrize("run", RECORDED, ids=lambda run: f"{run['layers']} layers, {run['iters']} iterations")
def test_what_was_measured_is_within_a_fifth_of_the_plan(run: dict[str, Any], store: Store, tmp_path: Path) -> None:
    asked = recipe("H200", iters=run["iters"])
    blocks = dict(list(BLOCKS.items())[: run["layers"]])
    estimate = estimate_quantize(store, asked, blocks, LINEAR)
    figures = next(figures for figures in gpu_figures() if figures.gpu == run["gpu"])
    compiling = sum(
        loops["requant"].cold_seconds - loops["requant"].steady_seconds for loops in figures.blocks.values()
    )
    # A run that finds its kernels in the compile cache takes less time than a plan can know.
    assert estimate.seconds - compiling == pytest.approx(run["seconds"] - run["compile_seconds"], rel=0.2)
    needs = estimate_needs(base_of(tmp_path, run["layers"]), asked, 0, {"quantize"}).stages["quantize"]
    assert needs.ram_bytes == pytest.approx(run["private_bytes"], rel=0.2)
    assert needs.vram_bytes == pytest.approx(run["gpu_bytes"], rel=0.2)


def test_validate_at_27_b_takes_what_was_measured(store: Store, tmp_path: Path) -> None:
    """164 s for both models, 22 s for imports and the text, and 7 GB of memory (docs/explanation/gates.md)."""
    needs = estimate_needs(base_of(tmp_path, 64), recipe("H200"), 0, {"validate"}).stages["validate"]
    assert needs.ram_bytes == pytest.approx(7e9, rel=0.2)
    both_bytes = 55_562_855_904 + 19_550_000_000
    assert estimate_stage(store, "validate", recipe("H200"), both_bytes).seconds == pytest.approx(186, rel=0.2)


@pytest.mark.parametrize("iters", [20, 50, 400])
def test_a_run_foretells_one_with_other_iterations_from_its_steps_and_the_rest(iters: int, store: Store) -> None:
    """A step takes 0.5 s, everything else of a block 3 s, compiling 20 s, and what is around the blocks 30 s."""
    work = {"parameters": 1000, "iters": 100, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "fast": "auto"}
    blocks = [
        {"name": "a", "seconds": 73.0, "step_seconds": 0.5, "compile_seconds": 20.0},
        {"name": "b", "seconds": 53.0, "step_seconds": 0.5, "compile_seconds": 0.0},
    ]
    record(store, "quantize", seconds=156.0, settings={"device": "NVIDIA RTX 5090"}, work=work, blocks=blocks)
    figure = estimate_quantize(store, recipe("RTX 5090", iters=iters), {"a": 500, "b": 500}, set())
    assert figure.seconds == pytest.approx(30 + 20 + 2 * (3 + 0.5 * iters))
    double = estimate_quantize(store, recipe("RTX 5090", iters=iters), {"a": 1000, "b": 1000}, set())
    assert double.seconds == pytest.approx(30 + 20 + 4 * (3 + 0.5 * iters))


def test_a_text_that_the_base_writes_takes_as_long_as_earlier_ones_for_its_tokens_and_weights(store: Store) -> None:
    assumed = estimate_writing(store, recipe("H100"), 54_000_000_000, 327_680)
    assert 300 < assumed.seconds < 3600 and assumed.source.startswith("assumed: 32 rows at once")
    assert estimate_writing(store, recipe(device="cpu"), 54_000_000_000, 327_680).seconds > 10 * assumed.seconds
    on_h100 = {"machine": {"gpus": ["NVIDIA H100 80GB HBM3"]}, "bytes_read": 54_000_000_000}
    record(store, "self_calibration", seconds=200.0, written_tokens=100_000, **on_h100)
    assert estimate_writing(store, recipe("H100"), 54_000_000_000, 200_000).seconds == pytest.approx(400)
    assert estimate_writing(store, recipe("A100"), 54_000_000_000, 200_000).source.startswith("assumed")


def test_half_the_steps_take_about_half_the_time_and_fewer_weights_less(store: Store) -> None:
    full = estimate_quantize(store, recipe("H100"), BLOCKS, LINEAR).seconds
    half = estimate_quantize(store, recipe("H100", iters=100), BLOCKS, LINEAR).seconds
    assert 0.5 < half / full < 0.6
    few = dict(list(BLOCKS.items())[:8])
    assert estimate_quantize(store, recipe("H100"), few, LINEAR).seconds < full / 4
    assert effort(TuningWork(2, iters=1, nsamples=1, seqlen=10, batch_size=1)) == 2 * 10 * (3 + 2)


def test_another_gpu_is_told_from_auto_rounds_table_and_said_so(store: Store) -> None:
    figure = estimate_quantize(store, recipe("RTX 5090"), BLOCKS, LINEAR)
    assert 23 * 60 < figure.seconds < 120 * 60  # between 14 and 70 billion weights
    assert "A100" in figure.source and "RTX 5090" in figure.source
    slower = estimate_quantize(store, recipe("RTX 5090", low_gpu_mem=True), BLOCKS, LINEAR)
    assert slower.seconds > figure.seconds


def test_a_cpu_without_a_record_has_an_assumption_called_so_and_no_gpus_figures(store: Store) -> None:
    figure = estimate_quantize(store, recipe(device="cpu"), BLOCKS, LINEAR)
    assert figure.source == "assumed: a CPU with 500 GFLOP/s"
    gpu = estimate_quantize(store, recipe(), BLOCKS, LINEAR)
    assert figure.seconds > 100 * gpu.seconds
    assert estimate_quantize(store, recipe(device="cpu"), {"a": 2}, set()).seconds == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("changes", [
    {"seqlen": 0}, {"seqlen": -64}, {"iters": 0, "nsamples": 0}, {"parameters": 10**400},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("steps", [{}, {"step_seconds": 0.1}, {"step_seconds": 1e308, "compile_seconds": 1e308}])
def test_a_record_with_impossible_work_does_not_end_a_plan(
    changes: dict[str, int], steps: dict[str, float], store: Store
) -> None:
    work = {"parameters": 1000, "iters": 1, "nsamples": 4, "seqlen": 64, "batch_size": 4, "fast": "auto", **changes}
    record(store, "quantize", seconds=9.0, settings={"device": "cpu"}, work=work, blocks=[{"seconds": 3.0, **steps}])
    figure = estimate_quantize(store, recipe(device="cpu"), BLOCKS, LINEAR)
    assert 0 < figure.seconds < float("inf")


def test_an_earlier_run_on_that_gpu_comes_first_and_its_cold_start_stays(store: Store) -> None:
    work = {"parameters": 1000, "iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "fast": "auto"}
    blocks = [{"name": "a", "seconds": 10.0}, {"name": "b", "seconds": 10.0}]
    facts = {"seconds": 50.0, "settings": {"device": "NVIDIA RTX 5090"}, "work": work, "blocks": blocks}
    record(store, "quantize", **facts)
    figure = estimate_quantize(store, recipe("RTX 5090"), {"a": 2000, "b": 2000}, set())
    assert figure.seconds == pytest.approx(30 + 4 * 20) and "an earlier run on NVIDIA RTX 5090" in figure.source
    assert "blocks of 27 B" in estimate_quantize(store, recipe("H100"), {"a": 2000}, set()).source


def test_other_stages_take_the_nearest_run_and_else_an_assumption_called_so(store: Store) -> None:
    assert estimate_stage(store, "validate", recipe(), 200_000_000).source.startswith("assumed")
    record(store, "validate", seconds=7.0, bytes_read=1_000_000, machine={"gpus": []})
    known = estimate_stage(store, "validate", recipe(device="cpu"), 2_000_000)
    assert known.seconds == pytest.approx(14.0) and known.source == "an earlier run on cpu, 2026-11-01"
    assert estimate_stage(store, "validate", recipe("H100"), 2_000_000).source.startswith("assumed")


def test_a_toy_run_foretells_nothing_of_a_large_model(store: Store) -> None:
    work = {"parameters": 1000, "iters": 1, "nsamples": 4, "seqlen": 64, "batch_size": 4, "fast": "auto"}
    facts = {"seconds": 30.0, "settings": {"device": "NVIDIA H100 80GB HBM3"}, "blocks": [{"seconds": 3.0}]}
    record(store, "quantize", **facts, work=work)
    record(store, "validate", seconds=30.0, bytes_read=2_000_000, settings={"device": "NVIDIA H100 80GB HBM3"})
    assert "blocks of 27 B" in estimate_quantize(store, recipe("H100"), BLOCKS, LINEAR).source
    assert estimate_stage(store, "validate", recipe("H100"), 75_000_000_000).source.startswith("assumed")
    larger = {**work, "parameters": 20_000_000_000, "iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8}
    earlier = StageRecord({"started": "2026-10-01T10:00:00", **facts, "work": larger})
    store.commit("quantize", "1" * 64, Manifest.of([]), earlier)
    assert estimate_quantize(store, recipe("H100"), BLOCKS, LINEAR).source.endswith("2026-10-01")


@pytest.mark.parametrize(
    ("asked", "measured", "source"),
    [
        ("none", "vllm", "nothing is measured"),
        ("vllm", "none", "assumed"),
        ("auto", "none", "assumed"),
        ("vllm", "torch", "assumed"),
        ("vllm", "vllm", "an earlier run"),
        ("auto", "torch", "an earlier run"),
    ],
)
def test_a_benchmark_takes_as_long_as_one_in_its_engine(asked: str, measured: str, source: str, store: Store) -> None:
    record(store, "benchmark", seconds=7.0, bytes_read=1_000_000, measured={"engine": measured})
    one = recipe().model_copy(update={"benchmark": Benchmark(engine=asked)})
    assert estimate_stage(store, "benchmark", one, 1_000_000).source.startswith(source)


def test_low_memory_mode_moves_the_samples_from_the_gpu_into_memory(tmp_path: Path) -> None:
    output = plan_output(Checkpoint.open(pico_base(tmp_path / "base")), recipe(group_size=32), {})
    stage = estimate_needs(output, recipe(group_size=32), 0, ALL_STAGES).stages["quantize"]
    samples = 3 * 128 * 2048 * 64 * 2
    next_block = 2 * max(block_sizes(output.base).values())
    assert stage.vram_bytes - stage.low_vram_bytes == samples + next_block
    assert stage.low_ram_bytes - stage.ram_bytes == samples
    assert estimate_needs(output, recipe(group_size=32, device="cpu"), 0, {"quantize"}).vram_bytes == 0
    nothing = estimate_needs(output, recipe(group_size=32), 0, set())
    assert nothing.disk_bytes == 0 and nothing.ram_bytes == 0
    assert estimate_needs(output, recipe(group_size=32), 10**9, ALL_STAGES).disk_bytes > 10**9


def test_disk_is_told_stage_by_stage(tmp_path: Path) -> None:
    output = plan_output(Checkpoint.open(pico_base(tmp_path / "base")), recipe(group_size=32), {})
    needed = estimate_needs(output, recipe(group_size=32), 10**6, ALL_STAGES, kept_bytes=7)
    disk = {name: stage.disk_bytes for name, stage in needed.stages.items() if stage.disk_bytes is not None}
    assert list(disk) == ["download", "quantize", "mtp_fix", "validate"] and disk["download"] == 10**6
    assert disk["mtp_fix"] == output.head_bytes and sum(disk.values()) + 7 == needed.disk_bytes
    assert estimate_needs(output, recipe(group_size=32), 10**6, {"publish"}, kept_bytes=7).disk_bytes == 0


def test_too_little_disk_is_a_problem_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 5_000_000_000

    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: Usage)
    assert disk_problem(4_000_000_000, tmp_path / "not" / "there") is None
    sentence = disk_problem(6_000_000_000, tmp_path / "not" / "there")
    assert sentence is not None and "needs 6.00 GB" in sentence and "5.00 GB are free" in sentence
    (tmp_path / "work" / "quantize-0").mkdir(parents=True)
    (tmp_path / "work" / "quantize-0" / "resume").write_bytes(b"0" * 100_000)
    assert disk_problem(5_000_050_000, tmp_path) is None  # an interrupted run goes on from what it left
    assert disk_problem(5_000_200_000, tmp_path) is not None


def test_files_and_fields_that_changed_are_told() -> None:
    old = Manifest.of([File("a", 1, "a" * 64), File("b", 1, "b" * 64), File("c", 1, "c" * 64)])
    files = (HubFile("b", 1, "x", "d" * 64), HubFile("c", 1, "y", None), HubFile("d", 1, "z", None))
    changed = changed_files(old, Revision("a/b", "0" * 40, files), {"b": "d" * 64, "c": None, "d": None})
    assert changed.to_json() == {"added": ["d"], "removed": ["a"], "changed": ["b"]}
    fields = changed_fields({"x": 1, "deep": {"y": [1]}, "gone": True}, {"x": 1, "deep": {"y": [2]}, "new\n": 1})
    assert [field.to_json() for field in fields] == [
        {"field": "deep.y", "before": "[1]", "now": "[2]"},
        {"field": "gone", "before": "true", "now": None},
        {"field": "'new\\n'", "before": None, "now": "1"},
    ]


def test_the_model_types_read_from_transformers_source_are_those_that_it_knows() -> None:
    import transformers

    known = known_model_types()
    assert known is not None and set(transformers.CONFIG_MAPPING.keys()) <= known
    assert len(known) <= len(transformers.CONFIG_MAPPING.keys()) + 2


@pytest.mark.parametrize(
    ("config", "allow", "sentence"),
    [
        ({"model_type": "llama"}, False, None),
        ({"model_type": "llama", "auto_map": {}}, False, None),
        ({"model_type": "own", "auto_map": {}}, False, "set allow_remote_code"),
        ({"model_type": "own", "auto_map": {}}, True, None),
        ({"model_type": "own"}, True, "does not know the base's model type 'own'"),
        ({}, True, "does not know the base's model type None"),
        ({"model_type": ["llama"]}, False, "does not know"),
        ({"model_type": "gpt2"}, False, "transposed"),
    ],
)
def test_an_architecture_is_known_or_why_not_is_said(config: Any, allow: bool, sentence: str | None) -> None:
    problem = architecture_problem(ModelConfig(config), {"llama", "gpt2"}, allow_remote_code=allow)
    assert problem is None if sentence is None else problem is not None and sentence in problem
