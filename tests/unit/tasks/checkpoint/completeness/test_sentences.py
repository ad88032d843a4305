"""What a user is told of a folder that lacks tensors, by inspect and by the check of a base."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from requant.tasks.checkpoint.base_check import check_base
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.inspect import as_text, inspect_checkpoint
from requant.tasks.checkpoint.problems import problems_of
from requant.tasks.errors import CheckpointError
from tests.factories.architectures import headers_only, pico_config, pico_shapes, stated
from tests.factories.bases import other_base
from tests.factories.checkpoints import edited, write_quantized
from tests.factories.paths import TINY
from tests.factories.pico import pico_base

SHARD = "model-00001-of-00001.safetensors"
QUERY = "model.language_model.layers.1.self_attn.q_proj"
NORM = "model.language_model.norm.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base", shards=1)


def lose(folder: Path, *names: str) -> Path:
    with edited(folder, SHARD) as tensors:
        for name in names:
            del tensors[name]
    return folder


def inspected(folder: Path) -> tuple[bool | None, list[str]]:
    document = inspect_checkpoint(folder)
    return document.complete, document.problems


@pytest.mark.parametrize("experts", [0, 4])
def test_a_whole_base_and_its_quantized_form_are_complete(tmp_path: Path, experts: int) -> None:
    base = pico_base(tmp_path / "base", experts=experts)
    for folder in (base, write_quantized(base, tmp_path / "quantized")):
        assert inspected(folder) == (True, [])
    assert "complete      yes" in as_text("base", inspect_checkpoint(base))


def test_the_tiny_model_is_complete() -> None:
    assert inspect_checkpoint(TINY).complete is True


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_moe_text"])
def test_what_save_pretrained_writes_is_complete(tmp_path: Path, kind: str) -> None:
    for fused in (False, True):
        folder = other_base(tmp_path / f"{kind}-{fused}", kind, fused=fused)
        assert inspected(folder)[0] is True


def test_a_lost_tensor_is_a_problem_that_says_what_an_engine_does(base: Path) -> None:
    lose(base, NORM)
    complete, (problem,) = inspected(base)
    assert complete is False
    assert problem.startswith(f"{NORM} is missing, and Qwen3_5ForConditionalGeneration needs it: vLLM ")


def test_a_lost_word_of_a_packed_module_is_told_once(base: Path, tmp_path: Path) -> None:
    made = write_quantized(base, tmp_path / "quantized")
    shard = next(s for s in made.glob("model*.safetensors") if f"{QUERY}.qweight".encode() in s.read_bytes()[:100_000])
    with edited(made, shard.name) as tensors:
        del tensors[f"{QUERY}.qweight"]
    problems = [problem for problem in inspected(made)[1] if QUERY in problem]
    assert problems == [f"{QUERY}.qweight is missing beside {QUERY}.qzeros"]


def test_a_shape_that_the_config_contradicts_is_told_once(base: Path) -> None:
    name = "model.language_model.embed_tokens.weight"
    with edited(base, SHARD) as tensors:
        dtype, (rows, columns), data = tensors[name]
        tensors[name] = dtype, (rows // 2, columns), data[: len(data) // 2]
    problems = [problem for problem in inspected(base)[1] if "embed_tokens" in problem]
    assert len(problems) == 1 and "has shape 1024 x 64, and the sizes of config.json need 2048 x 64" in problems[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("MllamaForConditionalGeneration", {}),
        ("NemotronHForCausalLM", {"moe_latent_size": 16}),
        ("GraniteSpeechForConditionalGeneration", {}),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}),
    ],
)
def test_an_architecture_whose_sizes_are_its_own_is_whole(tmp_path: Path, name: str, changes: dict[str, int]) -> None:
    made = pico_config(name, **changes)
    checkpoint = replace(headers_only(stated(made), pico_shapes(made)), folder=tmp_path)
    assert [p for p in problems_of(checkpoint, Judgement.of(checkpoint)) if "shape" in p or "needs it" in p] == []


def test_a_matrix_of_the_head_of_a_known_architecture_is_told_by_its_shape(base: Path) -> None:
    with edited(base, SHARD) as tensors:
        dtype, (rows, columns), data = tensors["mtp.fc.weight"]
        tensors["mtp.fc.weight"] = dtype, (rows, columns // 2), data[: len(data) // 2]
    assert [p for p in inspected(base)[1] if "shape" in p] == [
        "mtp.fc has shape 64 x 64, and the sizes of config.json need 64 x 128"
    ]


def test_a_lost_layer_is_told_once(base: Path) -> None:
    names = [name for name in Checkpoint.open(base).tensors if ".layers.1." in name and not name.startswith("mtp")]
    lose(base, *names)
    complete, problems = inspected(base)
    assert complete is False and len([p for p in problems if "layer 1" in p or ".layers.1." in p]) == 1


def test_an_architecture_that_is_not_known_is_not_judged(base: Path) -> None:
    config = base / "config.json"
    config.write_text(config.read_text().replace("Qwen3_5ForConditionalGeneration", "SomethingForCausalLM"))
    assert inspected(base)[0] is None
    assert "complete      not judged" in as_text("base", inspect_checkpoint(base))


def test_a_base_that_lacks_a_tensor_is_refused_by_its_name(base: Path, tmp_path: Path) -> None:
    check_base(Checkpoint.open(base), "a/b", with_head=True)
    broken = lose(shutil.copytree(base, tmp_path / "broken"), NORM, f"{QUERY}.weight")
    with pytest.raises(CheckpointError, match=r"a/b cannot be used: it lacks .* \(and 1 more"):
        check_base(Checkpoint.open(broken), "a/b", with_head=True)
