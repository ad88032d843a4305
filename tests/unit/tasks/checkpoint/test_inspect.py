"""requant inspect: what a checkpoint is, and what is wrong with it, from headers and configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.inspect import as_text, inspect_checkpoint
from requant.tasks.checkpoint.inventory import missing_parts
from tests.factories.checkpoints import all_tensors, from_bf16, rounded, safetensors_bytes, to_bf16, write_checkpoint
from tests.factories.repairs import elsewhere, fixed

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def made(base: Path, tmp_path: Path) -> Path:
    """A quantized checkpoint without a fault."""
    folder = elsewhere(base, tmp_path / "made")
    fixed(folder, base)
    change_tensors(folder, lambda tensors: tensors | bf16_again(tensors))
    return folder


def bf16_again(tensors: dict[str, Any]) -> dict[str, Any]:
    """What auto-round wrote as F32, as the config says."""
    wide = {n: raw for n, raw in tensors.items() if raw[0] == "F32"}
    return {n: ("BF16", shape, to_bf16(np.frombuffer(data, "<f4"))) for n, (_, shape, data) in wide.items()}


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a checkpoint's tensors, all in one shard."""
    config = json.loads((folder / "config.json").read_text())
    tensors = change(all_tensors(folder))
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    write_checkpoint(folder, {SHARD: tensors}, config)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        part = config["text_config"] if key in config["text_config"] else config
        part[key] = value
    path.write_text(json.dumps(config))


def problems(folder: Path, **options: Any) -> list[str]:
    return inspect_checkpoint(folder, **options).problems


def test_a_base_is_said_to_be_what_it_is(base: Path) -> None:
    result = inspect_checkpoint(base, deep=True)
    assert result.tensors == len(all_tensors(base)) and result.dtypes == {"BF16": len(all_tensors(base))}
    assert result.bytes == sum(len(data) for _, _, data in all_tensors(base).values())
    assert result.quantized.count == 0 and result.quantized.bits is None
    head = {
        key: getattr(result.mtp, key) for key in ("present", "layout", "layers", "precision", "complete", "tensors")
    }
    assert head == {
        "present": True, "layout": "mtp", "layers": 1, "precision": "BF16", "complete": True, "tensors": 15,
    }  # fmt: skip
    assert result.problems == [] and result.engines["vllm"].mtp is True
    assert result.engines["transformers"].loads is True and result.engines["transformers"].mtp is False


def test_a_sound_quantized_checkpoint_has_no_problems_on_the_surface_or_below(made: Path) -> None:
    result = inspect_checkpoint(made, deep=True)
    assert result.problems == []
    quantized = result.quantized
    assert (quantized.count, quantized.bits, quantized.group_size, quantized.sym) == (13, 4, 32, True)
    assert quantized.storage == {"INT4": 13} and quantized.packing == "auto_round:auto_gptq"


def test_the_groups_hold_every_tensor_once(made: Path) -> None:
    result = inspect_checkpoint(made)
    assert sum(group.bytes for group in result.groups) == result.bytes
    stored = {group.modules: group for group in result.groups}
    gate = stored["model.language_model.layers.*.mlp.gate_proj"]
    assert (gate.count, gate.storage) == (2, "INT4")
    assert stored["mtp.fc"].to_json() | {"shape": None} == {
        "modules": "mtp.fc", "count": 1, "storage": "BF16", "shape": None, "bytes": 64 * 128 * 2,
    }  # fmt: skip


def test_a_packed_fc_is_said_not_to_draft_in_any_engine(base: Path, tmp_path: Path) -> None:
    result = inspect_checkpoint(elsewhere(base, tmp_path / "made", packed=("mtp.fc",)))
    assert result.mtp.precisions == {"F32": 14, "INT4": 1} and result.mtp.modules["mtp.fc"] == "INT4"
    for engine in ("vllm", "sglang"):
        assert result.engines[engine].mtp is False
        assert "mtp.fc.qweight is packed" in result.engines[engine].reason
    assert any("mtp.fc.qweight" in problem and "requant mtp-fix" in problem for problem in result.problems)


def test_a_head_that_engines_would_take_for_packed_is_said_not_to_draft(made: Path) -> None:
    """Without a block list every layer counts as quantized, and the head's plain weights find no parameter."""
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]["block_name_to_quantize"]
    config["quantization_config"]["extra_config"] = {}
    (made / "config.json").write_text(json.dumps(config))
    verdict = inspect_checkpoint(made).engines["vllm"]
    assert verdict.mtp is False


def test_a_missing_processor_file_is_a_problem_and_keeps_vllm_from_loading(base: Path) -> None:
    (base / "video_preprocessor_config.json").unlink()
    result = inspect_checkpoint(base)
    assert result.engines["vllm"].loads is False
    assert "video_preprocessor_config.json is missing" in result.engines["vllm"].reason
    assert problems(base) == ["video_preprocessor_config.json is missing: copy it from the base"]
    assert result.engines["transformers"].loads is True


def test_a_promised_head_that_is_not_there_is_a_problem(base: Path) -> None:
    change_tensors(base, lambda t: {n: raw for n, raw in t.items() if not n.startswith("mtp.")})
    result = inspect_checkpoint(base)
    assert [p for p in result.problems if "promises 1 MTP layers, and there are no tensors of a head" in p]
    assert result.mtp.present is False and result.engines["vllm"].mtp is False


@pytest.mark.parametrize("lost", ["mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_norm.weight",
                                  "mtp.layers.0.mlp.up_proj.weight"])  # fmt: skip
def test_a_head_that_lacks_a_tensor_is_incomplete(lost: str, base: Path) -> None:
    change_tensors(base, lambda t: {n: raw for n, raw in t.items() if n != lost})
    result = inspect_checkpoint(base)
    assert result.mtp.missing == [lost.removesuffix(".weight")] and result.mtp.complete is False
    assert [p for p in result.problems if f"the MTP head lacks {lost.removesuffix('.weight')}" in p]
    assert result.engines["vllm"].mtp is False


def test_two_configs_that_disagree_are_a_problem(made: Path) -> None:
    (made / "quantization_config.json").write_text('{"bits": 8}')
    assert "quantization_config.json and config.json disagree" in problems(made)[0]


def broken(folder: Path, name: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> None:
    """Give a tensor zeros of another dtype or shape."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        old_dtype, old_shape, _ = tensors[name]
        new_dtype, new_shape = dtype or old_dtype, shape or old_shape
        width = {"BF16": 2, "F16": 2, "F32": 4, "I32": 4}[new_dtype]
        return tensors | {name: (new_dtype, new_shape, bytes(int(np.prod(new_shape)) * width))}

    change_tensors(folder, change)


GATE = "model.language_model.layers.0.mlp.gate_proj"
EMBED = "model.language_model.embed_tokens.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a lost part": (
        lambda f: change_tensors(f, lambda t: {n: r for n, r in t.items() if n != f"{GATE}.scales"}),
        f"{GATE}.scales is missing beside {GATE}.qweight",
    ),
    "scales of another group size": (
        lambda f: broken(f, f"{GATE}.scales", shape=(4, 128)), f"{GATE}.scales has shape (4, 128)",
    ),
    "zero points of floats": (lambda f: broken(f, f"{GATE}.qzeros", dtype="F32"), f"{GATE}.qzeros has dtype F32"),
    "packed and plain": (
        lambda f: change_tensors(f, lambda t: t | {f"{GATE}.weight": ("BF16", (128, 64), bytes(128 * 64 * 2))}),
        f"{GATE} is there twice",
    ),
    "a cut vocabulary": (lambda f: broken(f, EMBED, shape=(1024, 64)), "embed_tokens has shape 1024 x 64"),
    "another hidden size": (lambda f: change_config(f, hidden_size=96), "and the sizes of config.json need"),
    "a retyped matrix": (lambda f: broken(f, EMBED, dtype="F32"), f"{EMBED} is F32, and config.json says bfloat16"),
    "a lost layer": (
        lambda f: change_tensors(f, lambda t: {n: r for n, r in t.items() if ".layers.1." not in n}),
        "config.json promises 2 layers, and layer 1 has no tensors",
    ),
    "no word of the quantization": (
        lambda f: (change_config(f, quantization_config=None), (f / "quantization_config.json").unlink()),
        "tensors are quantized, and config.json has no quantization_config",
    ),
    "the config beside only": (
        lambda f: change_config(f, quantization_config=None), "no quantization_config, which engines read: put",
    ),
    "nothing quantized": (
        lambda f: change_tensors(f, lambda t: {n: r for n, r in t.items() if r[0] == "BF16"}),
        "no tensor is quantized",
    ),
    "a stale shard": (
        lambda f: (f / "model-00009-of-00009.safetensors").write_bytes((f / SHARD).read_bytes()),
        "model-00009-of-00009.safetensors is a shard which the index does not name",
    ),
    "a single file beside the index": (
        lambda f: (f / "model.safetensors").write_bytes(safetensors_bytes({EMBED: all_tensors(f)[EMBED]})),
        "model.safetensors lies beside a sharded index",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_told_with_the_name_of_the_tensor_or_field(fault: Any, made: Path) -> None:
    damage, sentence = fault
    damage(made)
    found = problems(made)
    assert [problem for problem in found if sentence in problem], found


def flipped(folder: Path, name: str, value: bytes) -> None:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        dtype, shape, data = tensors[name]
        return tensors | {name: (dtype, shape, value + data[len(value) :])}

    change_tensors(folder, change)


@pytest.mark.parametrize(("name", "value", "sentence"), [
    (f"{GATE}.scales", b"\x00\x7e", "values that are not numbers"),
    (f"{GATE}.scales", b"\x00\x00", "scales of zero"),
    (EMBED, b"\xc0\x7f", "values that are not numbers"),
    ("mtp.norm.weight", b"\x80\xff", "values that are not numbers or infinite"),
], ids=["NaN scale", "zero scale", "NaN weight", "infinite norm"])  # fmt: skip
def test_what_only_the_data_tells_is_told_when_asked_for(name: str, value: bytes, sentence: str, made: Path) -> None:
    flipped(made, name, value)
    assert problems(made) == []
    assert [p for p in problems(made, deep=True) if name in p and sentence in p]


@pytest.mark.parametrize(("offset", "sentence"), [(0, "which loses precision"), (1, "zero point that is one off")])
def test_a_head_that_was_dequantized_by_hand_is_recognized(offset: int, sentence: str, made: Path, base: Path) -> None:
    """The reference card's script subtracted the stored zero point, which is one too low."""
    _, shape, data = all_tensors(base)["mtp.fc.weight"]
    parts, meant = rounded(from_bf16(data, shape))
    scales = np.frombuffer(parts["scales"][2], "<f2").reshape(parts["scales"][1]).T.astype(np.float32)
    weight = meant + offset * np.repeat(scales, 32, axis=1)
    change_tensors(made, lambda t: t | {"mtp.fc.weight": ("BF16", shape, to_bf16(weight))})
    assert problems(made) == []
    (problem,) = problems(made, deep=True)
    assert "mtp.fc.weight was dequantized from 4 bits" in problem and sentence in problem


def test_experts_count_as_there_whether_they_lie_fused_or_split(tmp_path: Path) -> None:
    """auto-round splits the main model's experts; the head's stay fused."""
    fused = {f"{p}.mlp.experts.{n}": ("BF16", (2, 4, 4), bytes(64)) for p in ("mtp.layers.0",) for n in
             ("gate_up_proj", "down_proj")}  # fmt: skip
    split = {f"model.layers.0.mlp.experts.{e}.{n}_proj.weight": ("BF16", (4, 4), bytes(32)) for e in range(2) for n in
             ("gate", "up", "down")}  # fmt: skip
    both = {f"{p}.self_attn.q_proj.weight": ("BF16", (4, 4), bytes(32)) for p in ("mtp.layers.0", "model.layers.0")}
    apart = {f"mtp.{n}.weight": ("BF16", (4,), bytes(8)) for n in
             ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}  # fmt: skip
    config = {"num_hidden_layers": 1, "mtp_num_hidden_layers": 1}
    tensors = {**fused, **split, **both, **apart}
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "x", {"model-1.safetensors": tensors}, config))
    assert checkpoint.head is not None and missing_parts(checkpoint, checkpoint.head) == []


@pytest.mark.parametrize("quantization", [
    {"extra_config": "mtp"}, {"extra_config": []}, {"extra_config": {"mtp.fc": "fp16"}},
    {"extra_config": {"mtp.fc": {"bits": None}}},
    {"extra_config": {".*[": {"bits": 16}}}, {"bits": None}, {"bits": "four"},
    {"block_name_to_quantize": 5}, {"block_name_to_quantize": [None]}, {"quant_method": 5}, {},
    {"config_groups": [1]}, {"config_groups": {"a": {"weights": {"num_bits": []}}}},
], ids=repr)  # fmt: skip
def test_a_quantization_config_of_nonsense_is_looked_at_without_a_traceback(
    quantization: dict[str, Any], base: Path
) -> None:
    change_config(base, quantization_config=quantization)
    assert inspect_checkpoint(base).mtp.present is True


def test_the_text_for_a_person_says_the_same(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    text = as_text("x", inspect_checkpoint(folder))
    assert "14 INT4, group 32, auto_round:auto_gptq" in text and "1 layers, mtp, F32+INT4" in text
    assert "does not draft" in text and "problem       mtp.fc.qweight" in text
