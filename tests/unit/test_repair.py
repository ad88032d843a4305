"""requant mtp-fix: checkpoints made elsewhere get their head back, in place and once."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tasks.checkpoint.assemble import assemble
from tasks.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint
from tasks.checkpoint.head import HEAD_SHARD
from tasks.checkpoint.inspect import as_text, inspect_checkpoint
from tasks.checkpoint.repair import repair
from tasks.errors import CheckpointError
from tests.pico import TINY, pico_base
from tests.unit.making import (
    all_tensors,
    from_bf16,
    raw_tensors,
    rounded,
    safetensors_bytes,
    write_checkpoint,
    write_packed,
)

FULL = {"bits": 16, "data_type": "fp"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base")


def head_of(folder: Path) -> dict[str, Any]:
    return {n: raw for n, raw in all_tensors(folder).items() if n.startswith("mtp.")}


def elsewhere(base: Path, folder: Path, *, packed: tuple[str, ...] = (), single: bool = False) -> Path:
    """What auto-round alone writes: head tensors as F32, some of them packed, no word of them in the config."""
    write_packed(base, folder)
    tensors = raw_tensors(folder / SINGLE)
    for module in packed:
        _, shape, data = all_tensors(base)[f"{module}.weight"]
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": raw for part, raw in rounded(from_bf16(data, shape))[0].items()}
    config = json.loads((folder / "config.json").read_text())
    (folder / SINGLE).unlink()
    if single:
        write_checkpoint(folder, {SINGLE: tensors}, config, index=False)
    else:
        names = list(tensors)
        half = {n: tensors[n] for n in names[: len(names) // 2]}
        rest = {n: tensors[n] for n in names[len(names) // 2 :]}
        write_checkpoint(
            folder, {"model-00001-of-00002.safetensors": half, "model-00002-of-00002.safetensors": rest}, config
        )
    for path in TINY.iterdir():
        if path.name != "config.json" and not path.name.startswith("model") and path.suffix != ".md":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


KINDS: dict[str, dict[str, Any]] = {
    "packed fc": {"packed": ("mtp.fc",)},
    "packed layers": {"packed": ("mtp.layers.0.mlp.up_proj", "mtp.layers.0.self_attn.q_proj")},
    "retyped": {},
    "a single file": {"single": True, "packed": ("mtp.fc",)},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_head_comes_back_bit_for_bit_and_everything_else_stays(kind: Any, base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", **kind)
    others = {n: raw for n, raw in all_tensors(folder).items() if not n.startswith("mtp.")}
    result = repair(folder, base)
    assert result["changed"] is True and result["tensors_restored"] == 15 and result["source"] == "base"
    assert raw_tensors(folder / HEAD_SHARD) == head_of(base)
    assert all_tensors(folder) == others | head_of(base)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == [] and not (folder / SINGLE).exists()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantization_config.json").read_text())
    assert config["extra_config"]["mtp.fc"] == config["extra_config"][".*mtp.*"] == FULL
    assert all(result["engines"][e]["mtp"] for e in ("vllm", "sglang"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_second_repair_changes_nothing(kind: Any, base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", **kind)
    repair(folder, base)
    before = snapshot(folder)
    assert repair(folder, base)["changed"] is False
    assert snapshot(folder) == before


def test_a_repaired_checkpoint_needs_no_base_any_more(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    with pytest.raises(CheckpointError, match=r"mtp\.fc\.qweight is packed.*--base"):
        repair(folder, None)
    repair(folder, base)
    assert repair(folder, None) | {"engines": None} == {
        "changed": False, "tensors_restored": 0, "source": "base", "engines": None,
    }  # fmt: skip


def test_a_head_that_is_missing_altogether_is_put_in(base: Path, tmp_path: Path) -> None:
    bits = write_packed(base, tmp_path / "packed")
    assemble(Checkpoint.open(base), Checkpoint.open(tmp_path / "packed"), bits, tmp_path / "made")
    assert repair(tmp_path / "made", base)["tensors_restored"] == 15
    assert head_of(tmp_path / "made") == head_of(base)
    assert Checkpoint.open(tmp_path / "made").problems == []


def test_one_flipped_bit_in_the_head_is_restored(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    repair(folder, base)
    tensors = raw_tensors(folder / HEAD_SHARD)
    dtype, shape, data = tensors["mtp.norm.weight"]
    tensors["mtp.norm.weight"] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    (folder / HEAD_SHARD).write_bytes(safetensors_bytes(tensors))
    assert repair(folder, base)["tensors_restored"] == 1
    assert head_of(folder) == head_of(base)


def test_an_index_with_a_wrong_total_size_is_corrected(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    repair(folder, base)
    index = json.loads((folder / INDEX).read_text())
    index["metadata"]["total_size"] = 0
    (folder / INDEX).write_text(json.dumps(index))
    assert repair(folder, base)["changed"] is True
    assert Checkpoint.open(folder).problems == []


def test_a_missing_processor_file_is_copied_from_the_base(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    repair(folder, base)
    (folder / "video_preprocessor_config.json").unlink()
    result = repair(folder, base)
    assert (result["changed"], result["tensors_restored"]) == (True, 0)
    name = "video_preprocessor_config.json"
    assert (folder / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("single", [True, False], ids=["single", "sharded"])
def test_a_repair_killed_at_any_step_is_finished_by_the_next_one(
    step: int, single: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change of a folder is a rename or an unlink: the process dies before the one with this number."""
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",), single=single)
    others = {n: raw for n, raw in all_tensors(folder).items() if not n.startswith("mtp.")}
    replace, unlink, left = os.replace, Path.unlink, step

    class Killed(BaseException):
        pass

    def count() -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1

    def replacing(source: Any, target: Any) -> None:
        count()
        replace(source, target)

    def unlinking(path: Path, missing_ok: bool = False) -> None:
        if not path.name.endswith(".part"):
            count()
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replacing)
        patch.setattr(Path, "unlink", unlinking)
        with contextlib.suppress(Killed):
            repair(folder, base)
    repair(folder, base)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == []
    named = {n: (t.dtype, t.shape, t.read()) for n, t in checkpoint.tensors.items()}
    assert named == others | head_of(base)


def test_a_base_of_another_size_or_without_a_head_is_refused_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    before = snapshot(folder)
    headless = pico_base(tmp_path / "headless", head=False)
    with pytest.raises(CheckpointError, match="has no MTP head"):
        repair(folder, headless)
    other = pico_base(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] = 128
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not the base"):
        repair(folder, other)
    assert snapshot(folder) == before


# inspect


def test_a_base_is_said_to_be_what_it_is(base: Path) -> None:
    result = inspect_checkpoint(base)
    assert result["tensors"] == len(all_tensors(base)) and result["dtypes"] == {"BF16": len(all_tensors(base))}
    assert result["bytes"] == sum(len(data) for _, _, data in all_tensors(base).values())
    assert result["quantized"] == {"count": 0, "bits": None, "group_size": None}
    assert result["mtp"] == {"present": True, "layout": "mtp", "layers": 1, "precision": "BF16"}
    assert result["problems"] == [] and result["engines"]["vllm"]["mtp"] is True
    assert result["engines"]["transformers"] == {
        "loads": True, "mtp": False, "reason": "transformers ignores the MTP head",
    }  # fmt: skip


def test_a_packed_fc_is_said_not_to_draft_in_any_engine(base: Path, tmp_path: Path) -> None:
    result = inspect_checkpoint(elsewhere(base, tmp_path / "made", packed=("mtp.fc",)))
    assert result["quantized"] == {"count": 14, "bits": 4, "group_size": 32}
    for engine in ("vllm", "sglang"):
        assert result["engines"][engine]["mtp"] is False
        assert "mtp.fc.qweight is packed" in result["engines"][engine]["reason"]


def test_a_head_that_engines_would_take_for_packed_is_said_not_to_draft(base: Path, tmp_path: Path) -> None:
    """Without a block list every layer counts as quantized, and the head's plain weights find no parameter."""
    folder = elsewhere(base, tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["block_name_to_quantize"]
    (folder / "config.json").write_text(json.dumps(config))
    verdict = inspect_checkpoint(folder)["engines"]["vllm"]
    assert verdict["mtp"] is False and "quantization_config says otherwise" in verdict["reason"]


def test_a_missing_processor_file_is_said_to_keep_vllm_from_loading(base: Path) -> None:
    (base / "video_preprocessor_config.json").unlink()
    engines = inspect_checkpoint(base)["engines"]
    assert (
        engines["vllm"]["loads"] is False and "video_preprocessor_config.json is missing" in engines["vllm"]["reason"]
    )
    assert engines["transformers"]["loads"] is True


def test_a_promised_head_that_is_not_there_is_a_problem(base: Path, tmp_path: Path) -> None:
    tensors = {n: raw for n, raw in all_tensors(base).items() if not n.startswith("mtp.")}
    config = json.loads((base / "config.json").read_text())
    write_checkpoint(tmp_path / "cut", {"model-00001-of-00001.safetensors": tensors}, config)
    result = inspect_checkpoint(tmp_path / "cut")
    assert result["problems"] == ["config.json promises 1 MTP layers, and there are no tensors of a head"]
    assert result["mtp"]["present"] is False and result["engines"]["vllm"]["mtp"] is False


def test_two_configs_that_disagree_are_a_problem(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made")
    (folder / "quantization_config.json").write_text('{"bits": 8}')
    assert "quantization_config.json and config.json disagree" in inspect_checkpoint(folder)["problems"][0]


@pytest.mark.parametrize("quantization", [
    {"extra_config": "mtp"}, {"extra_config": []}, {"extra_config": {"mtp.fc": "fp16"}},
    {"extra_config": {"mtp.fc": {"bits": None}}},
    {"extra_config": {".*[": FULL}}, {"bits": None}, {"bits": "four"},
    {"block_name_to_quantize": 5}, {"block_name_to_quantize": [None]}, {"quant_method": 5}, {},
], ids=repr)  # fmt: skip
def test_a_quantization_config_of_nonsense_is_looked_at_without_a_traceback(
    quantization: dict[str, Any], base: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    try:
        assert inspect_checkpoint(base)["mtp"]["present"] is True
    except CheckpointError as error:
        assert "quantization" in str(error)


def test_the_text_for_a_person_says_the_same(base: Path, tmp_path: Path) -> None:
    folder = elsewhere(base, tmp_path / "made", packed=("mtp.fc",))
    text = as_text("x", inspect_checkpoint(folder))
    assert "14 matrices, 4 bits, group 32" in text and "1 layers, mtp" in text and "does not draft" in text
    assert "problems      none" in text
