"""Models whose weights come and go block by block: the same as the whole, and nothing stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.fp8 import dequantize_fp8
from requant.tasks.checkpoint.served_dtype import Dtype
from requant.tasks.checkpoint.torch_tensor import to_torch
from requant.tasks.errors import CheckpointError
from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.model import RunSettings, Skeleton, load_model, state_dict
from tests.factories.bases import other_base
from tests.factories.checkpoints import write_quantized
from tests.factories.fp8_bases import as_fp8
from tests.factories.inlined import KINDS as INLINED
from tests.factories.inlined import inlined_base
from tests.factories.pico import pico_base

CPU = torch.device("cpu")
ON_CPU = RunSettings(CPU, torch.float32)
KINDS = ("qwen3_5", "llama", "qwen3", "qwen3 tied", "qwen3_5_text", "qwen3_5_moe_text", *INLINED)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: _base(folder / kind, kind) for kind in KINDS}


def _base(folder: Path, kind: str) -> Path:
    if kind == "qwen3_5":
        return pico_base(folder)
    if kind in INLINED:
        return inlined_base(folder, kind)
    name, _, tied = kind.partition(" ")
    return other_base(folder, name, tie_word_embeddings=bool(tied))


@pytest.mark.parametrize(("served", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, None)])
def test_packed_weights_have_the_scales_that_an_engine_keeps(
    tmp_path: Path, served: Dtype | None, dtype: torch.dtype | None
) -> None:
    """vLLM keeps them in the dtype of the model: the recipe's, otherwise that of the config."""
    checkpoint = Checkpoint.open(write_quantized(pico_base(tmp_path / "base"), tmp_path))
    assert checkpoint.config["dtype"] == "bfloat16"
    module = next(name for name, m in checkpoint.modules.items() if m.storage == "integer")
    parts = checkpoint.modules[module].packed_parts
    settings = RunSettings(CPU, torch.float32, served=served)
    weight = state_dict(parts.values(), checkpoint, settings)[f"{module}.weight"]
    scales = to_torch(parts["scales"])
    kept = scales.to(dtype or torch.bfloat16).float()
    assert scales.dtype == torch.float16 and torch.equal(kept, scales.float()) == (dtype == torch.float16)
    integers = weight / kept.T.repeat_interleave(weight.shape[1] // len(kept), dim=1)
    assert torch.allclose(integers, integers.round(), atol=1e-4) and integers.abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "scales"), [("qwen3", "blocks"), ("qwen3", "tensor"), ("qwen3_5_moe_text", "blocks")])
def test_fp8_weights_are_those_that_quantize_reads(
    bases: dict[str, Path], kind: str, scales: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(as_fp8(bases[kind], tmp_path / "fp8", scales=scales))
    found = state_dict(checkpoint.tensors.values(), checkpoint, RunSettings(CPU, dtype))
    expected = dequantize_fp8(checkpoint).tensors
    assert found.keys() == expected.keys()
    fp8 = [name for name in found if checkpoint.tensors[name].dtype == "F8_E4M3"]
    assert len(fp8) > 10
    assert all(torch.equal(found[name], to_torch(expected[name]).to(dtype)) for name in fp8)


def on_meta(skeleton: Skeleton) -> int:
    return sum(p.is_meta for block in skeleton.blocks for p in block.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_block_by_block_is_the_same_as_the_whole_model(bases: dict[str, Path], kind: str) -> None:
    """Against a plain forward: hidden states, and logits; rows of two lengths at once."""
    checkpoint = Checkpoint.open(bases[kind])
    whole = load_model(checkpoint, ON_CPU)
    skeleton = Skeleton(checkpoint, ON_CPU)
    skeleton.load_ends()
    rows, long = torch.randint(10, 2000, (2, 17)), torch.randint(10, 2000, (1, 40))
    states = run_blocks(skeleton, [Rows.of(skeleton, rows), Rows.of(skeleton, long)])
    for tokens, hidden in zip((rows, long), states, strict=True):
        torch.testing.assert_close(skeleton.logits(hidden), whole(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


def test_transformers_own_loader_gives_the_same_model(bases: dict[str, Path]) -> None:
    import transformers

    texts = dict.fromkeys(("llama", *INLINED), "AutoModelForCausalLM")
    for kind, auto in {**texts, "qwen3_5": "AutoModelForImageTextToText"}.items():
        theirs = getattr(transformers, auto).from_pretrained(bases[kind], dtype=torch.float32)
        ours = load_model(Checkpoint.open(bases[kind]), ON_CPU)
        for (name, one), (other_name, other) in zip(
            sorted(theirs.state_dict().items()), sorted(ours.state_dict().items()), strict=True
        ):
            assert name == other_name and torch.equal(one, other), name
        buffers = dict(ours.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in theirs.named_buffers())


def test_one_block_is_in_memory_at_a_time(bases: dict[str, Path]) -> None:
    skeleton = Skeleton(Checkpoint.open(bases["qwen3_5"]), ON_CPU)
    skeleton.load_ends()
    everything = on_meta(skeleton)
    seen = []
    for number in range(len(skeleton.blocks)):
        with skeleton.loaded(number) as block:
            assert not any(p.is_meta for p in block.parameters())
            seen.append(everything - on_meta(skeleton))
        assert on_meta(skeleton) == everything
    assert seen == [len(list(block.parameters())) for block in skeleton.blocks]


def test_a_block_is_emptied_even_where_its_work_fails(bases: dict[str, Path]) -> None:
    skeleton = Skeleton(Checkpoint.open(bases["llama"]), ON_CPU)
    with pytest.raises(RuntimeError), skeleton.loaded(0):
        raise RuntimeError
    assert all(p.is_meta for p in skeleton.blocks[0].parameters())


def test_what_is_held_stays(bases: dict[str, Path]) -> None:
    skeleton = Skeleton(Checkpoint.open(bases["qwen3_5"]), ON_CPU)
    skeleton.hold()
    with skeleton.loaded(1):
        pass
    assert not any(p.is_meta for p in skeleton.model.parameters())


def test_packed_blocks_come_as_what_they_stand_for(bases: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_quantized(bases["qwen3_5"], tmp_path))
    whole = load_model(checkpoint, ON_CPU)
    skeleton = Skeleton(checkpoint, ON_CPU)
    expected = dict(whole.model.language_model.layers[1].named_parameters())
    with skeleton.loaded(1) as block:
        assert all(torch.equal(p, expected[name]) for name, p in block.named_parameters())


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3"])
@torch.inference_mode()
def test_a_routers_bias_is_not_rounded_where_the_model_is(bases: dict[str, Path], kind: str) -> None:
    """As in engines: it decides between experts whose scores hardly differ. The block computes with it."""
    skeleton = Skeleton(Checkpoint.open(bases[kind]), RunSettings(CPU, torch.bfloat16))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with skeleton.loaded(1) as block:
        bias = block.get_buffer("mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32 and bytes(skeleton.checkpoint.tensors[name].read()) == bias.numpy().tobytes()
    assert not torch.equal(bias, bias.bfloat16().float())
    skeleton.load_ends()
    (hidden,) = run_blocks(skeleton, [Rows.of(skeleton, torch.randint(10, 2000, (1, 17)))])
    assert hidden.dtype == torch.bfloat16 and bool(hidden.isfinite().all())


def test_rows_that_blocks_treat_differently_are_refused(bases: dict[str, Path]) -> None:
    """Some models hand their blocks more than hidden states, such as embeddings of each token for each block."""
    skeleton = Skeleton(Checkpoint.open(bases["llama"]), ON_CPU)
    skeleton.load_ends()
    forward = skeleton.text.forward

    def with_tokens(input_ids: torch.Tensor, **more: object) -> object:
        hidden = skeleton.text.get_input_embeddings()(input_ids)
        for block in skeleton.blocks:
            hidden = block(hidden, per_layer=input_ids)
        return hidden

    skeleton.text.forward = with_tokens
    try:
        with pytest.raises(CheckpointError, match="get more than hidden states"):
            Rows.of(skeleton, torch.tensor([[1, 2], [3, 4]]))
    finally:
        skeleton.text.forward = forward


def test_the_next_block_is_read_while_one_computes_where_there_is_room(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that is none: what is read ahead is what would have been read."""
    skeleton = Skeleton(Checkpoint.open(bases["qwen3_5"]), ON_CPU)
    expected = [{name: p.clone() for name, p in block.named_parameters()} for block in skeleton.in_turn()]
    read: list[int | str] = []
    to_state = skeleton._read
    monkeypatch.setattr(skeleton, "_read", lambda part: read.append(part) or to_state(part))
    monkeypatch.setattr(skeleton, "_can_be_read_ahead", lambda number: number < len(skeleton.blocks))
    for number, block in enumerate(skeleton.in_turn()):
        assert all(torch.equal(p, expected[number][name]) for name, p in block.named_parameters())
    assert read == list(range(len(skeleton.blocks)))
    assert all(p.is_meta for block in skeleton.blocks for p in block.parameters())


def test_blocks_that_were_begun_and_not_finished_leave_nothing(bases: dict[str, Path]) -> None:
    skeleton = Skeleton(Checkpoint.open(bases["qwen3_5"]), ON_CPU)
    for _ in skeleton.in_turn():
        break
    assert all(p.is_meta for block in skeleton.blocks for p in block.parameters())
