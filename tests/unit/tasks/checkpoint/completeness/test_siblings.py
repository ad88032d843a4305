"""Where an architecture is not known, what a checkpoint says of itself shows what it lacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.completeness import missing_tensors
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from tests.factories.architectures import Shapes, headers_only
from tests.factories.checkpoints import write_checkpoint

CONFIG: dict[str, Any] = {
    "model_type": "someone_new", "architectures": ["SomeoneNewForCausalLM"], "num_hidden_layers": 4,
    "tie_word_embeddings": False, "num_experts": 4,
}  # fmt: skip
ENDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
DENSE = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def model(layers: int = 4, experts: int = 0) -> Shapes:
    names = list(ENDS)
    for n in range(layers):
        layer = f"model.layers.{n}"
        names += [f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        names += [f"{layer}.self_attn.{part}.weight" for part in ATTENTION]
        if experts and n:  # the first layer is dense
            names += [f"{layer}.mlp.experts.{e}.{part}.weight" for e in range(experts) for part in DENSE]
            names.append(f"{layer}.mlp.gate.weight")
        else:
            names += [f"{layer}.mlp.{part}.weight" for part in DENSE]
    return dict.fromkeys(names, (8, 8))


def found(shapes: Shapes, **changes: Any) -> list[str] | None:
    return missing_tensors(headers_only({**CONFIG, **changes}, shapes))


@pytest.mark.parametrize(("layers", "experts"), [(2, 0), (4, 0), (4, 4)])
def test_any_lost_tensor_is_named(layers: int, experts: int) -> None:
    shapes = model(layers, experts)
    assert found(shapes, num_hidden_layers=layers) is None
    for lost in shapes:
        if experts and "layers.0." in lost:
            continue  # no other layer is like the first
        left = {name: shape for name, shape in shapes.items() if name != lost}
        assert found(left, num_hidden_layers=layers) == [lost]


def test_a_lost_expert_is_named_with_all_of_its_matrices() -> None:
    lost = [name for name in model(4, 4) if "layers.2.mlp.experts.3." in name]
    left = {name: shape for name, shape in model(4, 4).items() if name not in lost}
    assert sorted(found(left) or []) == sorted(lost)


def test_layers_of_another_type_are_no_loss() -> None:
    without = [f"layers.{number}.self_attn.{part}_proj" for number in (5, 6, 7) for part in "kv"]
    shared = {n: s for n, s in model(8).items() if not any(part in n for part in without)}
    assert found(shared, num_hidden_layers=8) is None
    mixed = {n.replace("self_attn", "mamba") if "layers.2." in n else n: s for n, s in model(8).items()}
    assert found(mixed, num_hidden_layers=8) is None


@pytest.mark.parametrize("name", ["LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "DFlashDraftModel", "SomeModel"])
def test_a_drafter_or_a_bare_model_has_no_ends_of_its_own(name: str) -> None:
    layers = {name: shape for name, shape in model().items() if name not in ENDS}
    assert found(layers, architectures=[name]) is None


def test_a_tied_or_silent_config_asks_for_no_output_layer() -> None:
    left = {name: shape for name, shape in model().items() if name != "lm_head.weight"}
    assert found(left, tie_word_embeddings=True) is None
    assert found(left, tie_word_embeddings=None) is None


def renamed(names: dict[str, str]) -> Shapes:
    """The model with other names, the first that fits; one without a name is left out."""
    made = ((next((names[old] for old in names if old in name), name), shape) for name, shape in model().items())
    return {name: shape for name, shape in made if name}


@pytest.mark.parametrize("output", ["model.transformer.ff_out.weight", "model.to_logits.weight"])
def test_an_output_layer_of_another_name_is_not_missed(output: str) -> None:
    assert found(renamed({"lm_head": output})) is None
    assert found(renamed({"lm_head": ""})) == ["lm_head.weight"]


def test_norms_without_weights_are_not_missed() -> None:
    assert found(renamed({"norm": ""})) is None


def test_a_norm_of_the_mtp_head_is_not_the_last_norm() -> None:
    left = {name: shape for name, shape in model().items() if name != "model.norm.weight"}
    assert found({**left, "mtp.norm.weight": (8,), "mtp.fc.weight": (8, 16)}) == ["model.norm.weight"]


def test_a_tower_of_an_unknown_architecture_has_sizes_of_its_own(tmp_path: Path) -> None:
    """The language model's are still compared with the config."""
    tower = {f"vpm.encoder.layers.0.self_attn.{part}.weight": (16, 16) for part in ATTENTION}
    shapes: Shapes = {f"llm.{name}": (8,) if "norm" in name else shape for name, shape in model().items()}
    shapes |= tower
    assert told_of_shapes(tmp_path / "sound", shapes) == []
    shapes["llm.model.layers.1.self_attn.q_proj.weight"] = (8, 16)
    assert told_of_shapes(tmp_path / "wrong", shapes) == [
        "llm.model.layers.1.self_attn.q_proj has shape 8 x 16, and the sizes of config.json need any x 8"
    ]


def told_of_shapes(folder: Path, shapes: Shapes) -> list[str]:
    sizes = {"hidden_size": 8, "vocab_size": 8, "intermediate_size": 8}
    tensors = {name: ("BF16", shape, bytes(2 * math.prod(shape))) for name, shape in shapes.items()}
    write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, {**CONFIG, **sizes})
    return [problem for problem in inspect_checkpoint(folder).problems if "has shape" in problem]
