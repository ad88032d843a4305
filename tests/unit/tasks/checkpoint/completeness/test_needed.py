"""A model that transformers itself makes is complete, whatever of it is lost is named, and other forms of it count."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from requant.tasks.checkpoint.completeness import Completeness, missing_tensors
from requant.tasks.checkpoint.completeness.needs import FOLDER
from requant.tasks.checkpoint.completeness.sentences import lack_problems
from tests.factories.architectures import SIZES, Shapes, headers_only, pico_config, pico_shapes, stated

DENSE, HYBRID, VISION = "Qwen3ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3VLForConditionalGeneration"
MIXTRAL, FUSED, DEEPSEEK = "MixtralForCausalLM", "Qwen3VLMoeForConditionalGeneration", "DeepseekV3ForCausalLM"
MOE = "Qwen3_5MoeForConditionalGeneration"
QUICK = [
    DENSE, HYBRID, VISION, MIXTRAL, FUSED, DEEPSEEK, MOE, "LlamaForCausalLM", "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM", "NemotronHForCausalLM", "Qwen3NextForCausalLM", "Ernie4_5_MoeForCausalLM",
]  # fmt: skip
ALL = sorted(path.stem for path in FOLDER.iterdir())
FAMILIES = ("Deepseek", "Glm", "Gemma", "Qwen", "Olmo", "Exaone")
ONE_OF_A_TYPE = ("DeepseekV4ForCausalLM", "MiMoV2FlashForCausalLM")  # one of their few layers here is like no other
# Parts that only some configs have, in layers that differ in nothing else.
SINGLE = re.compile(r"Gemma4.*self_attn\.v_proj\.weight")


@cache
def pico(name: str, **changes: Any) -> tuple[dict[str, Any], Shapes]:
    config = pico_config(name, **changes)
    return stated(config), pico_shapes(config)


def completeness(config: dict[str, Any], shapes: Shapes) -> Completeness:
    return Completeness.of(headers_only(config, shapes))


def without(shapes: Shapes, *names: str) -> Shapes:
    assert set(names) <= set(shapes)
    return {name: shape for name, shape in shapes.items() if name not in names}


@pytest.mark.parametrize("name", QUICK)
def test_a_model_that_transformers_makes_lacks_nothing(name: str) -> None:
    config, shapes = pico(name)
    made = completeness(config, shapes)
    assert made.architecture == name and made.lacks == []


SHARING = ["full", "full", "shared", "full", "shared", "full"]


@pytest.mark.parametrize(
    "said",
    [
        {"indexer_types": SHARING},
        {"index_topk_pattern": "FFSFSF"},
        {"index_topk_freq": 2, "index_skip_topk_offset": 2},
        {},
    ],
    ids=["types", "pattern", "schedule", "nothing"],
)
def test_a_layer_that_shares_the_choice_of_another_needs_no_indexer(said: dict[str, Any]) -> None:
    made = pico_config("GlmMoeDsaForCausalLM")
    made.indexer_types = SHARING
    config, shapes = stated(made), pico_shapes(made)
    del config["indexer_types"]
    assert completeness(config | said, shapes).lacks == []
    lost = "model.layers.3.self_attn.indexer.wk.weight"
    assert missing_tensors(headers_only(config | said, without(shapes, lost))) == [lost]
    whole = {name for name in shapes if ".3.self_attn.indexer." in name}
    assert set(missing_tensors(headers_only(config | said, without(shapes, *whole))) or ()) == (
        whole if said else set()
    )


def unknown(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "architectures": ["SomethingNewForCausalLM"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in QUICK])
def test_every_other_known_model_that_transformers_makes_lacks_nothing(name: str) -> None:
    try:
        config, shapes = pico(name)
    except Exception as error:
        pytest.skip(f"transformers does not build it with these sizes: {error}")
    assert completeness(config, shapes).lacks == []


@pytest.mark.parametrize("name", QUICK)
def test_a_whole_model_of_an_unknown_architecture_is_not_judged(name: str) -> None:
    config, shapes = pico(name)
    assert missing_tensors(headers_only(unknown(config), shapes)) is None


@pytest.mark.parametrize("name", [DENSE, HYBRID, MIXTRAL, FUSED])
def test_any_lost_tensor_is_named(name: str) -> None:
    config, shapes = pico(name, tie_word_embeddings=False)
    for lost in shapes:
        assert missing_tensors(headers_only(config, without(shapes, lost))) == [lost]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(FAMILIES)])
def test_any_lost_tensor_of_many_families_is_named(name: str) -> None:
    config, shapes = pico(name, tie_word_embeddings=False)
    for lost in shapes:
        if not SINGLE.search(f"{name} {lost}"):
            assert lost in (missing_tensors(headers_only(config, without(shapes, lost))) or []), lost


@pytest.mark.parametrize("name", [DENSE, HYBRID, DEEPSEEK])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(name: str) -> None:
    config, shapes = pico(name)
    for other in [n for n in shapes if n.endswith(("o_proj.weight", "norm.weight"))]:
        changed = {**shapes, other: (shapes[other][0] + 1, *shapes[other][1:])}
        lacks = completeness(config, changed).lacks
        assert [(lack.name, lack.needed, lack.there) for lack in lacks] == [(other, shapes[other], changed[other])]


def test_the_output_layer_is_needed_unless_it_is_tied() -> None:
    for tied in (True, False):
        config, shapes = pico(DENSE, tie_word_embeddings=tied)
        assert ("lm_head.weight" in shapes) is not tied
        shapes = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
        assert missing_tensors(headers_only(config, shapes)) == ([] if tied else ["lm_head.weight"])


@pytest.mark.parametrize("old", ["model.language_model.", "model.visual."])
def test_a_lost_part_of_a_multimodal_model_is_named(old: str) -> None:
    config, shapes = pico(VISION)
    lost = [name for name in shapes if name.startswith(old)]
    assert sorted(missing_tensors(headers_only(config, without(shapes, *lost))) or []) == sorted(lost)


def test_a_text_model_needs_no_tower() -> None:
    config, shapes = pico(VISION)
    text_only = {key: value for key, value in config.items() if key != "vision_config"}
    left = {name: shape for name, shape in shapes.items() if "visual" not in name}
    assert missing_tensors(headers_only(text_only, left)) == []


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.model.", "model."])
def test_the_prefixes_that_engines_accept_are_accepted(prefix: str) -> None:
    config, shapes = pico(HYBRID)
    renamed = {name.replace("model.language_model.", prefix): shape for name, shape in shapes.items()}
    assert missing_tensors(headers_only(config, renamed)) == []
    lost = f"{prefix}layers.1.mlp.up_proj.weight"
    assert missing_tensors(headers_only(config, without(renamed, lost))) == [lost]


def test_a_prefix_that_no_engine_knows_is_one_problem() -> None:
    config, shapes = pico(DENSE)
    moved = headers_only(config, {f"module.{name}": shape for name, shape in shapes.items()})
    (problem,) = lack_problems(moved, Completeness.of(moved))
    assert "module.model." in problem and "engines look for" in problem


def test_names_of_another_scheme_are_not_judged() -> None:
    config, shapes = pico(DENSE)
    other = {f"stack.{number}.w": shape for number, shape in enumerate(shapes.values())}
    made = completeness(config, {**other, "norm.weight": (64,)})
    assert made.lacks == []


GEMMA = "Gemma3ForConditionalGeneration"
TOWERS = {  # other names of a vision tower, which engines load: as they were published, and as Pixtral has them
    "SigLIP or CLIP in a model of its own": {"vision_tower.": "vision_tower.vision_model."},
    "Pixtral": {
        "vision_tower.embeddings.patch_embedding": "vision_tower.patch_conv",
        "vision_tower.embeddings.": "vision_tower.",
        "vision_tower.encoder.layers": "vision_tower.transformer.layers",
    },
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("name", [GEMMA, "PaliGemmaForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_a_tower_with_other_names_is_passed_over_and_the_rest_is_judged(name: str, tower: str) -> None:
    config, shapes = pico(name)
    renamed: Shapes = {}
    for own, shape in shapes.items():
        for old, new in TOWERS[tower].items():
            own = own.replace(old, new)
        renamed[own] = shape
    assert missing_tensors(headers_only(config, renamed)) == []
    for lost in renamed:
        if "vision_tower" not in lost:
            assert missing_tensors(headers_only(config, without(renamed, lost))) == [lost]


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [
        ("InternVLForConditionalGeneration", "text_config", "qwen3"),
        ("InternVLForConditionalGeneration", "text_config", "qwen3_moe"),
        ("InternVLForConditionalGeneration", "text_config", "gpt_oss"),
        ("LlavaOnevisionForConditionalGeneration", "text_config", "qwen3"),
        ("LlavaForConditionalGeneration", "text_config", "phi3"),
        ("LlavaForConditionalGeneration", "vision_config", "siglip_vision_model"),
        ("PaliGemmaForConditionalGeneration", "text_config", "gemma2"),
    ],
)
def test_a_part_that_is_another_model_is_not_compared_with_the_usual_one(name: str, part: str, kind: str) -> None:
    made = pico_config(name, **{part: {**SIZES, "model_type": kind, "layer_types": None}})
    config, shapes = stated(made), pico_shapes(made)
    assert config[part]["model_type"] == kind
    assert missing_tensors(headers_only(config, shapes)) is None
    assert missing_tensors(headers_only(*pico(name))) == []


def split_experts(shapes: Shapes) -> Shapes:
    """The same with a matrix for each expert."""
    split: Shapes = {}
    for name, shape in shapes.items():
        stem, _, fused = name.rpartition(".")
        matrices = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(fused, ())
        if not matrices or not stem.endswith("experts"):
            split[name] = shape
        for expert in range(shape[0]):
            split |= {f"{stem}.{expert}.{m}.weight": shape[1:] for m in matrices if stem.endswith("experts")}
    return split


def test_experts_count_fused_or_split() -> None:
    config, shapes = pico(FUSED)
    split = split_experts(shapes)
    assert len(split) > len(shapes) and missing_tensors(headers_only(config, split)) == []
    lost = next(name for name in split if ".experts.3.up_proj" in name)
    assert missing_tensors(headers_only(config, without(split, lost))) == [lost]

    config, split = pico(MOE)
    fused: Shapes = {name: shape for name, shape in split.items() if ".experts." not in name}
    for layer in range(6):
        stem = f"model.language_model.layers.{layer}.mlp.experts"
        fused |= {f"{stem}.gate_up_proj": (6, 64, 64), f"{stem}.down_proj": (6, 64, 32)}
    assert missing_tensors(headers_only(config, fused)) == []
    lost = "model.language_model.layers.2.mlp.experts.gate_up_proj"
    assert missing_tensors(headers_only(config, without(fused, lost))) == [lost]
    fewer = {**fused, lost: (5, 64, 64)}
    assert [lack.name for lack in completeness(config, fewer).lacks] == [lost]


def packed(shapes: Shapes, method: str) -> Shapes:
    """The same with the decoder layers' matrices quantized."""
    made: Shapes = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if "layers." not in name or not name.endswith("_proj.weight"):
            made[name] = shape
        elif method == "gptq":
            rows, columns = shape
            made |= {f"{module}.qweight": (columns // 8, rows), f"{module}.scales": (columns // 16, rows)}
            made |= {f"{module}.qzeros": (columns // 16, rows // 8)}
        elif method == "compressed-tensors":
            made |= {f"{module}.weight_packed": (shape[0], shape[1] // 8), f"{module}.weight_shape": (2,)}
            made |= {f"{module}.weight_scale": (shape[0], shape[1] // 16)}
        else:
            made |= {name: shape, f"{name}_scale_inv": (1, 1)}
    return made


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "fp8"])
@pytest.mark.parametrize("name", [DENSE, MIXTRAL, HYBRID])
def test_a_quantized_module_counts_as_its_weight(name: str, method: str) -> None:
    config, shapes = pico(name)
    quantization = {"quant_method": method, "bits": 4, "group_size": 16, "sym": True}
    config = {**config, "quantization_config": quantization}
    made = packed(shapes, method)
    assert missing_tensors(headers_only(config, made)) == []
    main = next(n for n in made if re.search(r"layers\.3\.self_attn\.k_proj\.(qweight|weight_packed|weight)$", n))
    lost = f"{main.rpartition('.')[0]}.weight"
    assert missing_tensors(headers_only(config, without(made, main))) == [lost]


# What a method keeps beside the packed weight, by the parts of a module; the first one holds the weight.
PARTS_OF_METHODS = {
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "mlx": ("weight", "scales", "biases"),
    "hqq": ("W_q", "scale", "zero"),
}


@pytest.mark.parametrize("method", PARTS_OF_METHODS)
def test_scales_do_not_stand_for_a_lost_weight_of_a_method_that_is_not_read(method: str) -> None:
    config, shapes = pico(DENSE)
    stated_as = {"bits": 4, "group_size": 16} if method == "mlx" else {"quant_method": method}
    config = {**config, "quantization_config": stated_as}
    made: Shapes = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        quantized = "layers." in name and name.endswith("_proj.weight")
        made |= {f"{module}.{part}": (8,) for part in PARTS_OF_METHODS[method]} if quantized else {name: shape}
    assert missing_tensors(headers_only(config, made)) == []
    module = "model.layers.3.self_attn.k_proj"
    lost = f"{module}.{PARTS_OF_METHODS[method][0]}"
    assert missing_tensors(headers_only(config, without(made, lost))) == [f"{module}.weight"]


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_experts_in_mxfp4_need_blocks_and_scales(part: str) -> None:
    config, shapes = pico("GptOssForCausalLM")
    config = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    made: Shapes = {}
    for name, shape in shapes.items():
        fused = name.endswith(("experts.down_proj", "experts.gate_up_proj"))
        made |= {f"{name}_blocks": (6, 8, 2, 16), f"{name}_scales": (6, 8, 2)} if fused else {name: shape}
    assert missing_tensors(headers_only(config, made)) == []
    lost = "model.layers.1.mlp.experts.down_proj"
    assert missing_tensors(headers_only(config, without(made, f"{lost}_{part}"))) == [lost]


def test_extra_tensors_and_layers_behind_the_last_are_no_problem() -> None:
    config, shapes = pico(DEEPSEEK)
    extra = {name.replace("layers.5.", "layers.6."): shape for name, shape in shapes.items()}
    assert missing_tensors(headers_only(config, {**shapes, **extra, "mtp.fc.weight": (1, 2)})) == []


def test_a_config_that_leaves_out_what_every_model_states_is_not_judged() -> None:
    config, shapes = pico(DENSE)
    short = {key: value for key, value in config.items() if key != "num_attention_heads"}
    assert completeness(short, shapes).architecture is None
    assert missing_tensors(headers_only(short, shapes)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9}, {"num_hidden_layers": -1}, {"num_hidden_layers": "6"},
        {"num_hidden_layers": None}, {"num_local_experts": 10**12}, {"num_attention_heads": 0}, {"head_dim": 1.5},
        {"layer_types": 3}, {"layer_types": [[1]] * 6}, {"tie_word_embeddings": "no"}, {"architectures": [["x"]]},
        {"architectures": ["../x"]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [MIXTRAL, "Qwen3NextForCausalLM"])
def test_a_hostile_config_is_answered(name: str, changes: dict[str, Any]) -> None:
    config, shapes = pico(name)
    made = completeness({**config, **changes}, shapes)
    assert len(made.lacks) < 100_000
