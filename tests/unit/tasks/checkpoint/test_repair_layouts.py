"""requant mtp-fix on every layout of a head and every packing, with a base and without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.tasks.checkpoint.checkpoint import INDEX, QUANTIZATION, Checkpoint
from requant.tasks.checkpoint.config import HeadPrecision
from requant.tasks.checkpoint.head import HEAD_SHARD
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.checkpoint.untrusted import MAX_JSON_BYTES
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import all_tensors, raw_tensors, safetensors_bytes, to_bf16
from tests.factories.heads import LAYOUTS, PACKINGS, head_modules, make_base, packed, quantized, sharded, values_of
from tests.factories.repairs import snapshot

SERVED = [packing for packing in PACKINGS if packing != "auto_round"]  # no engine loads a model of that packing


def damaged(base: Path, folder: Path, layout: str, packing: str = "auto_round:auto_gptq", **options: Any) -> Path:
    """A checkpoint made of the base, the head's matrices packed as well."""
    tensors = all_tensors(base)
    config = json.loads((base / "config.json").read_text())
    options = {"head": head_modules(tensors, layout), "shards": 2, "single": False, **options}
    return quantized(tensors, folder, config, packing, **options)


def left_out(folder: Path, layout: str) -> Path:
    """The same with a config that says that the head is not quantized, so that no engine drafts with it."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    head = "mtp" if layout.startswith("mtp") else "model.layers.2"
    if quantization["quant_method"] == "gptq":
        quantization["dynamic"] = {f"-:.*{head}.*": {}, **quantization.get("dynamic", {})}
    elif quantization["quant_method"] == "awq":
        quantization["modules_to_not_convert"] = [head, *(["mlp.experts"] if layout == "mtp-moe" else [])]
    else:
        quantization["block_name_to_quantize"] = ["model.layers.0", "model.layers.1"]
    for name in ("quantization_config.json", "config.json"):
        if (folder / name).exists():
            (folder / name).write_text(json.dumps(config if name == "config.json" else quantization))
    return folder


def head_of(folder: Path, base: Path) -> dict[str, Any]:
    head = Checkpoint.open(base).head
    assert head is not None
    prefixes = tuple(f"{prefix}." for prefix in head.prefixes)
    return {n: raw for n, raw in all_tensors(folder).items() if n.startswith(prefixes)}


@pytest.mark.parametrize("packing", SERVED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_head_of_any_layout_and_packing_comes_back_bit_for_bit(
    layout: str, packing: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", layout)
    folder = damaged(base, tmp_path / "made", layout, packing)
    others = {n: raw for n, raw in all_tensors(folder).items() if n not in head_of(folder, base)}
    result = repair(folder, RepairSource(base))
    assert result.source == "base" and result.changed is True
    assert head_of(folder, base) == head_of(base, base) == raw_tensors(folder / HEAD_SHARD)
    assert all_tensors(folder) == others | head_of(base, base)
    assert Checkpoint.open(folder).problems == []
    head = inspect_checkpoint(folder).mtp
    experts = {"mtp-moe": "fused", "mtp-moe-split": "split", "inlined-moe": "split"}
    assert head.complete is True and head.experts == experts.get(layout)
    assert head.layout == layout.removesuffix("-split").removesuffix("-moe")
    before = snapshot(folder)
    assert repair(folder, RepairSource(base)).changed is False
    assert repair(folder, None).changed is False
    assert snapshot(folder) == before


@pytest.mark.parametrize("packing", SERVED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_base_a_packed_head_is_dequantized_with_the_zero_point_of_its_packing(
    layout: str, packing: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", layout)
    folder = left_out(damaged(base, tmp_path / "made", layout, packing), layout)
    result = repair(folder, None)
    assert result.source == "dequantized" and result.changed is True
    ours, theirs = head_of(folder, base), head_of(base, base)
    assert {n: raw[:2] for n, raw in ours.items()} == {n: raw[:2] for n, raw in theirs.items()}
    modules = {f"{m}.weight" for m in head_modules(all_tensors(base), layout)}
    assert result.tensors_restored == len(modules)
    for name, raw in ours.items():
        if name not in modules:
            assert raw == theirs[name]
            continue
        error = values_of(raw) - values_of(theirs[name])
        size = np.linalg.norm(values_of(theirs[name]))
        assert np.linalg.norm(error) < 0.13 * size  # a zero point that is one off makes it 0.4
    before = snapshot(folder)
    assert repair(folder, None).changed is False
    assert snapshot(folder) == before


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_no_engine_would_draft_with_is_not_put_in(layout: str, with_base: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", layout)
    folder = damaged(base, tmp_path / "made", layout, "auto_round")
    before = snapshot(folder)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match="nothing was changed") as caught:
            repair(folder, RepairSource(base) if with_base else None, dry_run=dry_run)
        assert "packing_format" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert snapshot(folder) == before


@pytest.mark.parametrize("inside", [False, True], ids=["exchanged", "moved in"])
def test_shards_in_subfolders_keep_their_places(inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp", shards=4)
    others = {n: raw for n, raw in all_tensors(folder).items() if n not in head_of(folder, base)}
    index = json.loads((folder / INDEX).read_text())
    with_head = {shard for name, shard in index["weight_map"].items() if name.startswith("mtp.")}
    moved = {*index["weight_map"].values()}
    (folder / "deep" / "er").mkdir(parents=True)
    for shard in moved:
        (folder / shard).rename(folder / "deep" / "er" / shard)
    index["weight_map"] = {name: f"deep/er/{shard}" for name, shard in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    if inside:
        monkeypatch.chdir(folder)
    result = repair(folder, RepairSource(base))
    assert result.removes == sorted(f"deep/er/{shard}" for shard in with_head)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == []
    assert {n: (t.dtype, t.shape, t.read()) for n, t in checkpoint.tensors.items()} == others | head_of(base, base)
    assert {path.name for path in (folder / "deep" / "er").iterdir()} == moved - with_head != set()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert repair(folder, RepairSource(base)).changed is False
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_tensors_that_no_head_has_are_removed_and_not_counted_as_restored(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    repair(folder, RepairSource(base))
    tensors = raw_tensors(folder / HEAD_SHARD)
    tensors["mtp.surplus.weight"] = tensors["mtp.norm.weight"]
    (folder / HEAD_SHARD).write_bytes(safetensors_bytes(tensors))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["mtp.surplus.weight"] = HEAD_SHARD
    (folder / INDEX).write_text(json.dumps(index))
    result = repair(folder, RepairSource(base))
    assert result.changed is True and result.tensors_restored == 0
    assert head_of(folder, base) == head_of(base, base) and Checkpoint.open(folder).problems == []


@pytest.mark.parametrize("damage", ["not JSON", "too large"])
def test_a_quantization_config_that_cannot_be_read_is_an_error_that_names_it(damage: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    with (folder / QUANTIZATION).open("w") as stream:
        stream.write("{")
        if damage == "too large":
            stream.truncate(MAX_JSON_BYTES + 1)
    pattern = "quantization_config.json is " + ("not JSON" if damage == "not JSON" else "larger than 64 MiB")
    with pytest.raises(CheckpointError, match=pattern):
        repair(folder, RepairSource(base))


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("layout", ["mtp", "mtp-moe", "inlined"])
def test_a_smaller_head_is_packed_from_the_base_with_the_fusion_layer_as_it_was(
    layout: str, precision: HeadPrecision, bits: int, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", layout)
    folder = damaged(base, tmp_path / "made", layout)
    repair(folder, RepairSource(base), precision=precision)
    result = inspect_checkpoint(folder)
    stored = result.mtp.modules
    prefix = "mtp.layers.0" if layout.startswith("mtp") else "model.layers.2"
    fusion = "mtp.fc" if layout.startswith("mtp") else "model.layers.2.eh_proj"
    assert stored[f"{prefix}.self_attn.q_proj"] == f"INT{bits}" and stored[fusion] == "BF16"
    assert result.mtp.complete is True and result.engines["vllm"].mtp is True
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]["extra_config"]
    assert entry[f"{prefix}.self_attn.q_proj"]["bits"] == bits
    before = snapshot(folder)
    assert repair(folder, RepairSource(base), precision=precision).changed is False
    assert repair(folder, None).changed is False
    assert snapshot(folder) == before


@pytest.mark.parametrize(("packing", "file"), [("gptq", "quantize_config.json"), ("awq", "quant_config.json")])
def test_a_config_that_stands_in_the_quantizers_own_file_alone_is_one_problem_and_one_repair(
    packing: str, file: str, tmp_path: Path
) -> None:
    folder = damaged(make_base(tmp_path / "base", "mtp"), tmp_path / "made", "mtp", packing, head=[])
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("quantization_config")
    del own["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(own))
    found = inspect_checkpoint(folder)
    assert found.quantized.storage == {"INT4": 14}
    (problem,) = [sentence for sentence in found.problems if "quantization_config, which engines read" in sentence]
    assert problem.startswith(file) and problem.endswith(f"quant_method '{packing}'")
    assert len(found.problems) <= 2  # the other one is that engines refuse it
    assert repair(folder, None).changed is True
    assert inspect_checkpoint(folder).problems == [] and repair(folder, None).changed is False


def test_a_smaller_head_needs_a_base_and_a_checkpoint_of_auto_round(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    with pytest.raises(CheckpointError, match="--base"):
        repair(damaged(base, tmp_path / "one", "mtp"), None, precision="int4")
    with pytest.raises(CheckpointError, match="auto-round"):
        repair(damaged(base, tmp_path / "two", "mtp", "gptq"), RepairSource(base), precision="int4")


def test_a_dry_run_says_what_would_change_and_changes_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    before = snapshot(folder)
    promised = repair(folder, RepairSource(base), dry_run=True)
    assert snapshot(folder) == before and promised.changed is False
    done = repair(folder, RepairSource(base))
    assert {"writes": done.writes, "removes": done.removes, "tensors_restored": done.tensors_restored} == {
        key: getattr(promised, key) for key in ("writes", "removes", "tensors_restored")
    }
    assert all((folder / name).is_file() for name in done.writes)
    assert not any((folder / name).exists() for name in done.removes)


def test_links_of_a_hub_cache_are_replaced_and_what_they_lead_to_stays(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    blobs = damaged(base, tmp_path / "blobs", "mtp")
    before = snapshot(blobs)
    folder = tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    (folder / "tokenizer.json").symlink_to("../../blobs/nowhere")
    repair(folder, RepairSource(base))
    assert snapshot(blobs) == before
    assert head_of(folder, base) == head_of(base, base) and Checkpoint.open(folder).problems == []
    assert not (folder / HEAD_SHARD).is_symlink() and not (folder / "config.json").is_symlink()


def test_other_files_folders_and_modes_of_the_checkpoint_stay(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    (folder / "assets" / "deep").mkdir(parents=True)
    (folder / "assets" / "deep" / "picture.png").write_bytes(b"png")
    (folder / ".gitattributes").write_text("x")
    folder.chmod(0o750)
    repair(folder, RepairSource(base))
    assert (folder / "assets" / "deep" / "picture.png").read_bytes() == b"png"
    assert (folder / ".gitattributes").read_text() == "x" and folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["base", "made"] or len(list(tmp_path.iterdir())) == 2


def test_missing_tokenizer_files_come_from_the_base_and_present_ones_stay(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    (folder / "generation_config.json").write_text('{"own": 1}')
    repair(folder, RepairSource(base))
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (folder / "generation_config.json").read_text() == '{"own": 1}'


def test_a_folder_that_cannot_change_places_gets_its_files_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    monkeypatch.chdir(folder)
    inode = folder.stat().st_ino
    repair(Path("."), RepairSource(base))
    assert folder.stat().st_ino == inode and os.listdir()
    assert head_of(folder, base) == head_of(base, base) and Checkpoint.open(folder).problems == []


def test_two_repairs_of_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    from requant.tasks.checkpoint.atomic_swap import locked

    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    with locked(folder), pytest.raises(CheckpointError, match="another process is repairing"):
        repair(folder, RepairSource(base))


def test_an_index_that_contradicts_the_shards_is_made_anew(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    index = json.loads((folder / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))
    name = next(n for n, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = second
    del index["weight_map"]["lm_head.weight"]
    (folder / INDEX).write_text(json.dumps(index))
    assert Checkpoint.open(folder).fatal
    repair(folder, RepairSource(base))
    assert Checkpoint.open(folder).problems == []


@pytest.mark.parametrize("how", ["lost", "cut"])
def test_a_head_whose_shard_is_lost_or_broken_comes_back(how: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    repair(folder, RepairSource(base))
    before = all_tensors(folder)
    raw = (folder / HEAD_SHARD).read_bytes()
    (folder / HEAD_SHARD).unlink()
    if how == "cut":
        (folder / HEAD_SHARD).write_bytes(raw[: len(raw) // 2])
    repair(folder, RepairSource(base))
    assert all_tensors(folder) == before and Checkpoint.open(folder).problems == []


def test_a_broken_shard_of_the_head_under_another_name_is_taken_away(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    repair(folder, RepairSource(base))
    index = json.loads((folder / INDEX).read_text())
    other = "model-00009-of-00009.safetensors"
    index["weight_map"] = {n: other if s == HEAD_SHARD else s for n, s in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / HEAD_SHARD).unlink()
    (folder / other).write_bytes(b"broken")
    result = repair(folder, RepairSource(base))
    assert result.removes == [other] and not (folder / other).exists()
    assert Checkpoint.open(folder).problems == []


def test_an_index_in_which_a_name_stands_twice_is_written_anew(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    repair(folder, RepairSource(base))
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"mtp.fc.weight": "x.safetensors",'))
    assert Checkpoint.open(folder).problems != []
    assert repair(folder, RepairSource(base)).changed is True
    assert Checkpoint.open(folder).problems == []


def test_a_config_in_which_a_key_stands_twice_stops_the_repair(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"hidden_size": 64, ', 1))
    before = snapshot(folder)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        repair(folder, RepairSource(base))
    assert snapshot(folder) == before


def test_a_lost_tensor_of_the_main_model_stops_the_repair(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    folder = damaged(base, tmp_path / "made", "mtp")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.7.lost.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    before = snapshot(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.lost\.weight"):
        repair(folder, RepairSource(base))
    assert snapshot(folder) == before


def test_a_head_without_tensors_and_without_a_base_is_not_made_up(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    tensors = {n: raw for n, raw in all_tensors(base).items() if not n.startswith("mtp.")}
    config = json.loads((base / "config.json").read_text())
    folder = quantized(tensors, tmp_path / "made", config, "gptq", head=[], shards=1, single=False)
    with pytest.raises(CheckpointError, match="--base"):
        repair(folder, None)


def test_an_incomplete_head_is_not_called_repaired_without_a_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "mtp")
    tensors = {n: raw for n, raw in all_tensors(base).items() if n != "mtp.norm.weight"}
    config = json.loads((base / "config.json").read_text())
    folder = quantized(tensors, tmp_path / "made", config, "gptq", head=["mtp.fc"], shards=1, single=False)
    with pytest.raises(CheckpointError, match=r"mtp\.norm.*--base"):
        repair(folder, None)


@given(data=st.data())
def test_after_a_repair_the_head_is_the_bases_and_all_else_is_untouched(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any layout, packing, sharding, dtype of what is not packed, choice of packed modules, and loss of tensors."""
    root = tmp_path_factory.mktemp("property")
    layout = data.draw(st.sampled_from(LAYOUTS))
    layers = data.draw(st.integers(1, 2)) if layout == "mtp" else 1
    base = make_base(root / "base", layout, seed=data.draw(st.integers(0, 99)), layers=layers,
                     shards=data.draw(st.integers(1, 5)))  # fmt: skip
    tensors = all_tensors(base)
    head = head_of(base, base)
    packing = data.draw(st.sampled_from(sorted(SERVED)))
    choice = data.draw(st.lists(st.sampled_from(head_modules(tensors, layout)), unique=True))
    retyped = data.draw(st.sampled_from(["BF16", "F32", "F16"]))
    kinds = {"F32": "<f4", "F16": "<f2"}
    if retyped != "BF16":
        tensors = {n: (retyped, raw[1], values_of(raw).astype(kinds[retyped]).tobytes()) if n in head and
                   n.removesuffix(".weight") not in choice else raw for n, raw in tensors.items()}  # fmt: skip
    lost = data.draw(st.lists(st.sampled_from(sorted(head)), unique=True, max_size=5))
    tensors = {n: raw for n, raw in tensors.items() if n not in lost}
    order = data.draw(st.permutations(sorted(tensors)))
    config = json.loads((base / "config.json").read_text())
    folder = quantized({n: tensors[n] for n in order}, root / "made", config, packing, head=choice,
                       shards=data.draw(st.integers(1, 4)), single=data.draw(st.booleans()))  # fmt: skip
    others = {n: raw for n, raw in all_tensors(folder).items() if n not in head_of(folder, base)}
    repair(folder, RepairSource(base))
    assert all_tensors(folder) == others | head
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.problems == []
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        assert set(index["weight_map"]) == set(others | head)
        assert index["metadata"]["total_size"] == sum(len(raw[2]) for raw in (others | head).values())
    before = snapshot(folder)
    assert repair(folder, RepairSource(base)).changed is False
    assert snapshot(folder) == before


def test_the_helpers_pack_as_the_format_says() -> None:
    """The fixtures' packer, against numbers written out: 4 bit GPTQ holds zero minus one."""
    weight = np.full((64, 32), 0.5, np.float32)
    parts = packed("m", ("BF16", (64, 32), to_bf16(weight)), "gptq")
    assert set(np.frombuffer(parts["m.qzeros"][2], "<u4").tolist()) == {0x77777777}
    assert set(np.frombuffer(parts["m.qweight"][2], "<u4").tolist()) == {0xFFFFFFFF}
    assert list(sharded({"a": ("BF16", (1,), b"ab")}, 1)) == ["model-00001-of-00001.safetensors"]
