"""Which adapters can be merged into which base, and what is said of all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.lora import CONFIG, WEIGHTS, Adapter
from requant.tasks.errors import CheckpointError
from tests.factories.adapters import MODULES, lora_config, lora_tensors, write_adapter
from tests.factories.fp8_bases import as_fp8
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence

FIRST_A = f"base_model.model.{MODULES[0]}.lora_A.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_base(tmp_path_factory.mktemp("lora") / "base")


def refusal(adapter: Path, base: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        Adapter.open(adapter).updates(Checkpoint.open(base))
    assert is_one_sentence(str(raised.value))
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "peft's type LOHA"),
        ({"peft_type": None}, "peft's type None"),
        ({"use_dora": True}, "use_dora: True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head']"),
        ({"bias": "all"}, "bias: all"),
        ({"lora_bias": True}, "lora_bias: True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: olora"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_key_of_next_year": {"on": True}}, "a_key_of_next_year"),
        ({"r": 0}, "r in the adapter's adapter_config.json is wrong"),
        ({"r": "many"}, "r in the adapter's adapter_config.json is wrong"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj in the adapter's"),
        ({"rank_pattern": {"(": 4}}, "the pattern '('"),
        ({"rank_pattern": {"(.|..)+[^.a-z_0-9]": 4}}, "cannot be matched"),
        ({"lora_alpha": float("nan")}, "lora_alpha in the adapter's"),
        ({"r": 8}, "it was made for another base"),
        ({"rank_pattern": {"q_proj": 2}}, "with rank 2 in the adapter"),
    ],
)
def test_a_config_of_anything_but_plain_lora_is_refused(
    changes: dict[str, Any], told: str, base: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(base), lora_config(**changes))
    assert told in refusal(adapter, base)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"base_model.model.{MODULES[0]}.lora_magnitude_vector", "is no LoRA matrix of a linear layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "is no LoRA matrix of a linear layer"),
        (f"{MODULES[0]}.lora_A.weight", "is no LoRA matrix of a linear layer"),
        (f"base_model.model.{MODULES[0]}.lora_A.default.weight", "is no LoRA matrix of a linear layer"),
        ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", "layers.9.mlp.up_proj, which the base does not"),
        (f"base_model.model.{MODULES[0]}s.lora_A.weight", "which the base does not have"),
        (f"base_model.model.{MODULES[0].replace('q_proj', 'o_proj')}.lora_A.weight", "one of the two matrices"),
    ],
)
def test_a_tensor_that_is_no_part_of_a_merge_is_refused(name: str, told: str, base: Path, tmp_path: Path) -> None:
    tensors = {**lora_tensors(base), name: np.zeros((4, 64), np.float32)}
    assert told in refusal(write_adapter(tmp_path / "adapter", tensors), base)


def test_shapes_dtypes_and_files_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    tensors = lora_tensors(base)
    other = write_adapter(tmp_path / "other", {**tensors, FIRST_A: np.zeros((4, 63), np.float32)})
    assert f"{MODULES[0]} is" in refusal(other, base) and "made for another base" in refusal(other, base)
    integers = write_adapter(tmp_path / "integers", {**tensors, FIRST_A: np.zeros((4, 64), np.int32)})
    assert "I32 and F32 in the adapter: only BF16, F16, F32 can be merged" in refusal(integers, base)
    assert "has no tensors" in refusal(write_adapter(tmp_path / "empty", {}), base)
    for name, content in ((CONFIG, b"{"), (CONFIG, b"[]"), (CONFIG, b" " * (2 << 20)), (WEIGHTS, b"\x80\x04pickle")):
        broken = write_adapter(tmp_path / "broken", tensors)
        (broken / name).write_bytes(content)
        assert name in refusal(broken, base)


def test_bases_that_store_their_weights_in_another_way_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(base))
    assert "the base is FP8" in refusal(adapter, as_fp8(base, tmp_path / "fp8"))
    transposed = shutil.copytree(base, tmp_path / "transposed")
    config = json.loads((base / "config.json").read_text())
    (transposed / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "the base is a gpt2, which stores its matrices transposed" in refusal(adapter, transposed)
    (transposed / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    of_head = write_adapter(tmp_path / "of head", lora_tensors(base, ("lm_head",)))
    assert "shares with its embedding" in refusal(of_head, transposed)
    assert [*Adapter.open(of_head).updates(Checkpoint.open(base))] == ["lm_head.weight"]


def test_a_module_is_found_by_the_names_of_the_text_model_alone(base: Path, tmp_path: Path) -> None:
    tensors = {name.replace("language_model.", ""): one for name, one in lora_tensors(base).items()}
    updates = Adapter.open(write_adapter(tmp_path / "adapter", tensors)).updates(Checkpoint.open(base))
    assert {*updates} == {f"{module}.weight" for module in MODULES}
    both = write_adapter(tmp_path / "both", {**tensors, **lora_tensors(base)})
    assert "of the base twice" in refusal(both, base)
