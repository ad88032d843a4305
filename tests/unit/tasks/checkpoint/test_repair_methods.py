"""mtp-fix writes each method's own words into each of its files, and tells a true base from a foreign one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.repair import RepairSource, repair
from requant.tasks.errors import CheckpointError
from tests.factories.checkpoints import all_tensors, write_checkpoint
from tests.factories.fp8_bases import as_fp8
from tests.factories.heads import make_base, quantized
from tests.factories.repairs import snapshot

ONE = "model-00001-of-00001.safetensors"
HF_QUANT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", "mtp")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def without_head(folder: Path, quantization: dict[str, Any] | None) -> Path:
    """The checkpoint in one shard, without its head, with another quantization config."""
    tensors = {name: raw for name, raw in all_tensors(folder).items() if not name.startswith("mtp.")}
    config = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    return write_checkpoint(
        folder, {ONE: tensors}, config | ({"quantization_config": quantization} if quantization else {})
    )


@pytest.mark.parametrize(
    ("stated", "method"),
    [("config.json", "modelopt"), ("both", "modelopt"), ("both", "modelopt_fp8"), ("hf_quant_config.json", "modelopt")],
)
def test_modelopt_names_the_head_in_each_of_its_files_and_in_no_other_words(
    stated: str, method: str, base: Path, tmp_path: Path
) -> None:
    own = {"quant_method": method, "quant_algo": "FP8", "ignore": ["lm_head"]}
    folder = without_head(as_fp8(base, tmp_path / "made"), None if stated == "hf_quant_config.json" else own)
    if stated != "config.json":
        (folder / "hf_quant_config.json").write_text(json.dumps(HF_QUANT))
    result = repair(folder, RepairSource(base))
    assert result.changed and result.engines["sglang" if method == "modelopt_fp8" else "vllm"].mtp is not False
    if stated != "hf_quant_config.json":
        quantization = config_of(folder)["quantization_config"]
        assert {**quantization, "ignore": None} == {**own, "ignore": None} and "mtp*" in quantization["ignore"]
    if stated != "config.json":
        document = json.loads((folder / "hf_quant_config.json").read_text())
        assert {"lm_head", "mtp*", "mtp.fc"} <= {*document["quantization"]["exclude_modules"]}
        assert document["producer"] == HF_QUANT["producer"]
    before = snapshot(folder)
    assert repair(folder, RepairSource(base)).changed is False and snapshot(folder) == before


def hf_alone(folder: Path, quantization: dict[str, Any]) -> None:
    stated(folder, quantization_config=None)
    (folder / "hf_quant_config.json").write_text(json.dumps(HF_QUANT))


def stated(folder: Path, **values: Any) -> None:
    config = {**config_of(folder), **values}
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def without_total(folder: Path, quantization: dict[str, Any]) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))


def in_text_config(key: str) -> Callable[[Path, dict[str, Any]], None]:
    def change(folder: Path, quantization: dict[str, Any]) -> None:
        stated(folder, quantization_config=None)
        stated(folder, text_config={**config_of(folder), key: quantization})

    return change


SOUND: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "hf_quant_config.json": hf_alone,
    "no total_size": without_total,
    "text_config": in_text_config("quantization_config"),
    "compression_config": lambda f, q: stated(f, quantization_config=None, compression_config=q),
    "text_config.compression_config": in_text_config("compression_config"),
}


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("case", SOUND)
def test_where_inspect_finds_no_problem_nothing_is_repaired(
    case: str, with_base: bool, base: Path, tmp_path: Path
) -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "mtp*"]}
    folder = as_fp8(base, tmp_path / "made", head=False)
    stated(folder, quantization_config=quantization)
    SOUND[case](folder, quantization)
    if case == "hf_quant_config.json":
        repair(folder, RepairSource(base))  # which says that the head is not quantized
        assert "quantization_config" not in config_of(folder)
    assert inspect_checkpoint(folder).problems == []
    before = snapshot(folder)
    result = repair(folder, RepairSource(base) if with_base else None)
    assert (result.changed, result.writes) == (False, []) and snapshot(folder) == before


@pytest.mark.parametrize("case", ["text_config", "compression_config", "text_config.compression_config"])
def test_a_quantization_config_is_corrected_where_it_stands(case: str, base: Path, tmp_path: Path) -> None:
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    folder = as_fp8(base, tmp_path / "made", head=False)
    SOUND[case](folder, quantization)
    before = config_of(folder)
    repair(folder, RepairSource(base))
    after = config_of(folder)
    assert before.keys() == after.keys() and before != after
    place = after.get("text_config", after)
    assert "mtp*" in place["quantization_config" if case == "text_config" else "compression_config"]["ignore"]


def test_packed_weights_of_the_same_names_do_not_make_a_base_a_foreign_one(base: Path, tmp_path: Path) -> None:
    """As bitsandbytes and quark store 4 bits: U8, two values a byte."""
    folder = without_head(as_fp8(base, tmp_path / "made"), {"quant_method": "quark", "exclude": ["lm_head"]})
    tensors = all_tensors(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    rows, columns = tensors[name][1]
    tensors[name] = ("U8", (rows, columns // 2), bytes(rows * columns // 2))
    write_checkpoint(folder, {ONE: tensors}, config_of(folder))
    assert repair(folder, RepairSource(base)).changed
    cut = {**tensors, "model.norm.weight": ("BF16", (1,), b"ab")}
    write_checkpoint(folder, {ONE: cut}, config_of(folder))
    with pytest.raises(CheckpointError, match=r"is not the base of .*model\.norm\.weight"):
        repair(folder, RepairSource(base))


@pytest.mark.parametrize("same", ["architecture", "type, as the language model's", "nothing"])
def test_a_base_of_another_model_type_and_architecture_is_refused(same: str, base: Path, tmp_path: Path) -> None:
    folder = quantized(all_tensors(base), tmp_path / "made", config_of(base), "gptq", head=["mtp.fc"], shards=1,
                       single=False)  # fmt: skip
    config = config_of(base)
    own = config["model_type"]
    config["model_type"] = f"{own}_text" if same.startswith("type") else "another"
    if same != "architecture":
        config["architectures"] = ["AnotherForCausalLM"]
    (base / "config.json").write_text(json.dumps(config))
    before = snapshot(folder)
    if same == "nothing":
        with pytest.raises(CheckpointError, match=f"model_type is another there and {own} here"):
            repair(folder, RepairSource(base))
        assert snapshot(folder) == before
    else:
        assert repair(folder, RepairSource(base)).changed


def test_a_head_of_another_layout_is_refused(base: Path, tmp_path: Path) -> None:
    inlined = make_base(tmp_path / "inlined", "inlined")
    folder = quantized(all_tensors(base), tmp_path / "made", config_of(base), "gptq", head=["mtp.fc"], shards=1,
                       single=False)  # fmt: skip
    before = snapshot(folder)
    with pytest.raises(CheckpointError, match="is not the base of"):
        repair(folder, RepairSource(inlined))
    assert snapshot(folder) == before


def test_a_head_in_its_bases_dtype_is_no_problem_and_another_matrix_is(base: Path, tmp_path: Path) -> None:
    config = {**config_of(base), "dtype": "float16"}
    half = {n: (raw if n.startswith("mtp.") else ("F16", *raw[1:])) for n, raw in all_tensors(base).items()}
    folder = write_checkpoint(tmp_path / "half", {ONE: half}, config)
    assert not [problem for problem in inspect_checkpoint(folder).problems if "float16" in problem]
    half["lm_head.weight"] = all_tensors(base)["lm_head.weight"]
    write_checkpoint(folder, {ONE: half}, config)
    (problem,) = [problem for problem in inspect_checkpoint(folder).problems if "float16" in problem]
    assert problem.startswith("lm_head.weight is BF16") and "take them" not in problem


def test_a_count_that_is_null_is_set_to_the_layers_that_the_head_has(base: Path, tmp_path: Path) -> None:
    folder = quantized(all_tensors(base), tmp_path / "made", config_of(base), "gptq", head=[], shards=1, single=False)
    repair(folder, RepairSource(base))
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "mtp_num_hidden_layers": None}))
    result = repair(folder, None)
    assert result.writes == ["config.json"] and config_of(folder)["mtp_num_hidden_layers"] == 1
    assert result.problems == []
