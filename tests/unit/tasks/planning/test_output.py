"""The planned checkpoint is the written one, file by file, whatever becomes of the head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.head import HeadFiles, keep_head, without_head
from requant.tasks.planning.layers import choose_layers
from requant.tasks.planning.output import CheckpointPlan, plan_output
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from tests.factories.checkpoints import write_packed
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base


def recipe(**changes: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"group_size": 32}, **changes})


def write(base: Path, asked: Recipe, folder: Path) -> dict[str, int]:
    """What the pipeline writes, with rounding in place of auto-round: bytes by file."""
    source = Checkpoint.open(base)
    apart = split_fused_experts(source)
    config = choose_layers(apart, asked.quantize).quantization
    bits = write_packed(base, folder / "packed", config=config)
    out = folder / "made"
    files = assemble(apart, Checkpoint.open(folder / "packed"), bits, out)
    if asked.mtp == "drop" or source.head is None:
        files += without_head(HeadFiles.read(out), source.head).write(out)
    else:
        files += keep_head(HeadFiles.read(out), source, out, asked.mtp)
    for path in base.iterdir():
        if not path.name.startswith("model") and path.name not in {"config.json", "README.md"}:
            (out / path.name).write_bytes(path.read_bytes())
    return {file.path: file.size for file in files}


@pytest.mark.parametrize("mtp", ["keep", "int8", "int4", "drop"])
@pytest.mark.parametrize("shape", [{}, {"shards": 1, "layers": 3}, {"head": False}, {"experts": 3}], ids=str)
def test_every_file_has_the_planned_size(mtp: str, shape: dict[str, Any], tmp_path: Path) -> None:
    base, asked = pico_base(tmp_path / "base", **shape), recipe(mtp=mtp)
    output = plan_output(Checkpoint.open(base), asked, {})
    assert output.problems == []
    assert write(base, asked, tmp_path) == output.sizes


@pytest.mark.parametrize("mtp", ["keep", "int8", "drop"])
def test_the_planned_tensors_and_verdicts_are_the_written_ones(mtp: str, tmp_path: Path) -> None:
    base, asked = pico_base(tmp_path / "base"), recipe(mtp=mtp)
    output = plan_output(Checkpoint.open(base), asked, {})
    write(base, asked, tmp_path)
    made = Checkpoint.open(tmp_path / "made").sound()
    assert {n: (t.dtype, t.shape) for n, t in made.tensors.items()} == tensors(output)
    assert made.config == output.checkpoint.config and not made.problems
    found = account(made, Checkpoint.open(base), with_head=mtp != "drop", pack_head=mtp == "int8")
    assert len(output.kept_names) == found.kept + found.head
    from requant.tasks.checkpoint.compat import Judgement

    assert output.judgement.verdicts == Judgement.of(made).verdicts


def tensors(output: CheckpointPlan) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in output.checkpoint.tensors.items()}


def test_an_fp8_base_is_planned_as_the_bf16_one_that_it_stands_for(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    fp8 = plan_output(Checkpoint.open(as_fp8(base, tmp_path / "fp8")), recipe(), {})
    plain = plan_output(Checkpoint.open(base), recipe(), {})
    assert tensors(fp8) == tensors(plain) and fp8.base is not fp8.source and plain.base is plain.source


def test_every_kept_group_has_a_reason_of_its_own(tmp_path: Path) -> None:
    asked = recipe(quantize={"group_size": 32, "layers": {"down_proj": {"bits": 16}}})
    kept = {k.tensors: k.why for k in plan_output(Checkpoint.open(pico_base(tmp_path / "b")), asked, {}).kept()}
    assert kept["model.language_model.layers.*.mlp.down_proj.weight"] == "quantize.layers keeps it"
    assert "too few to pack" in kept["model.language_model.layers.*.linear_attn.in_proj_a.weight"]
    for name in ("mtp.*", "model.visual.*", "lm_head.weight", "model.language_model.embed_tokens.weight"):
        assert kept[name] != "not a matrix of a decoder block"
