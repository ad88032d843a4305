"""A group size that does not divide a matrix' inputs: no engine loads what comes of it, and a plan refuses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from requant.flows.report.report import scheme_of
from requant.tasks.artifact import Manifest
from requant.tasks.card.facts import scheme_words
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.errors import RecipeError
from requant.tasks.plan import plan_of
from requant.tasks.planning.groups import resolve_group_size
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.output import plan_output
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import Text, find_text
from tests.factories.checkpoints import write_checkpoint
from tests.factories.pico import pico_base
from tests.factories.stores import held_base

LAYER = "model.layers.0.self_attn.o_proj"
DTYPES = {"qweight": "I32", "qzeros": "I32", "scales": "F16"}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}


def auto_round(**more: Any) -> dict[str, Any]:
    return {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128,
        "sym": True, "block_name_to_quantize": "model.layers", **more,
    }  # fmt: skip


METHODS: dict[str, dict[str, Any]] = {
    "auto-round": auto_round(),
    "auto-round AWQ": auto_round(packing_format="auto_round:auto_awq", sym=False),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
}


def packed(quantization: dict[str, Any], inputs: int, module: str = LAYER, **own: Any) -> Checkpoint:
    """One packed matrix with 64 outputs, its scheme the config's or its `own`, by shapes alone."""
    layout = "awq" if "awq" in str(quantization.values()) else "gptq"
    scheme = PackingScheme(
        **{"bits": quantization["bits"], "group_size": quantization["group_size"], **own}, packing=layout
    )
    shapes = scheme.shapes(64, inputs)
    tensors = {f"{module}.{p}": Tensor(f"{module}.{p}", d, shapes[p], Path("x"), 0, 0) for p, d in DTYPES.items()}
    return Checkpoint(Path("x"), ModelConfig({**CONFIG, "quantization_config": quantization}), tensors, (), None)


@pytest.mark.parametrize("method", METHODS)
def test_vllm_and_sglang_load_no_matrix_whose_inputs_the_group_does_not_divide(method: str) -> None:
    for engine in ("vllm", "sglang"):
        verdict = Judgement.of(packed(METHODS[method], 576)).verdicts[engine]
        assert verdict.loads is False
        assert f"{LAYER} has 576 inputs, no multiple of group_size 128" in verdict.reason
        assert Judgement.of(packed(METHODS[method], 640)).verdicts[engine].loads is True


@pytest.mark.parametrize("method", ["auto-round", "auto-round AWQ"])
def test_transformers_loads_none_of_auto_round_on_a_cpu(method: str) -> None:
    verdict = Judgement.of(packed(METHODS[method], 576)).verdicts["transformers"]
    assert verdict.loads is False and "on a CPU" in verdict.reason
    assert f"{LAYER} has 576 inputs, no multiple of group_size 128" in verdict.reason
    assert Judgement.of(packed(METHODS[method], 640)).verdicts["transformers"].loads is True


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_other_widths_are_compared_too(bits: int) -> None:
    found = Judgement.of(packed(auto_round(bits=bits), 576)).verdicts
    assert [verdict.loads for verdict in found.values()] == [False] * 3
    assert all("576 inputs" in verdict.reason for verdict in found.values())


@pytest.mark.parametrize(("group_size", "inputs"), [(-1, 576), (64, 576), (32, 96), (128, 128)])
def test_whole_rows_and_groups_that_divide_load_everywhere(group_size: int, inputs: int) -> None:
    found = Judgement.of(packed(auto_round(group_size=group_size), inputs)).verdicts
    assert [verdict.loads for verdict in found.values()] == [True] * 3


def test_a_matrix_that_is_smaller_than_a_group_loads_nowhere() -> None:
    assert not any(verdict.loads for verdict in Judgement.of(packed(auto_round(), 64)).verdicts.values())


@pytest.mark.parametrize(("own", "loads"), [(64, True), (128, False), (-1, True)])
def test_a_layer_of_its_own_group_size_is_compared_with_that_one(own: int, loads: bool) -> None:
    quantization = auto_round(group_size=32, extra_config={LAYER: {"bits": 4, "group_size": own}})
    found = Judgement.of(packed(quantization, 576, group_size=own)).verdicts
    assert [verdict.loads for verdict in found.values()] == [loads] * 3


def test_experts_are_compared_as_other_matrices_are() -> None:
    found = Judgement.of(packed(auto_round(), 704, "model.layers.0.mlp.experts.0.down_proj")).verdicts
    assert [verdict.loads for verdict in found.values()] == [False] * 3


def test_compressed_tensors_is_compared_too() -> None:
    weights = {"num_bits": 4, "group_size": 128, "symmetric": True, "strategy": "group", "type": "int"}
    quantization = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    for inputs, loads in ((576, False), (640, True)):
        shapes = {"weight_packed": ("I32", (64, inputs // 8)), "weight_scale": ("F16", (64, -(-inputs // 128)))}
        tensors = {f"{LAYER}.{p}": Tensor(f"{LAYER}.{p}", d, s, Path("x"), 0, 0) for p, (d, s) in shapes.items()}
        checkpoint = Checkpoint(
            Path("x"), ModelConfig({**CONFIG, "quantization_config": quantization}), tensors, (), None
        )
        assert Judgement.of(checkpoint).verdicts["vllm"].loads is loads


@pytest.mark.parametrize("size", [0, True, "128", [128, 128], None, 2**70])
def test_nonsense_for_a_group_size_gives_a_verdict_and_no_traceback(size: Any) -> None:
    checkpoint = packed(auto_round(), 576)
    extra = {LAYER: {"group_size": size}, "other": 5}
    for changed in ({"group_size": size}, {"extra_config": extra}):
        config = {**checkpoint.config, "quantization_config": auto_round(**changed)}
        assert all(
            verdict.reason
            for verdict in Judgement.of(
                Checkpoint(Path("x"), ModelConfig(config), checkpoint.tensors, (), None)
            ).verdicts.values()
        )


def test_inspect_says_of_an_existing_checkpoint_that_no_engine_loads_it(tmp_path: Path) -> None:
    checkpoint = packed(auto_round(), 576)
    sizes = {"I32": 4, "F16": 2}
    raw = {}
    for name, tensor in checkpoint.tensors.items():
        rows, columns = tensor.shape
        raw[name] = (tensor.dtype, tensor.shape, bytes(rows * columns * sizes[tensor.dtype]))
    folder = write_checkpoint(tmp_path / "made", {"model-00001-of-00001.safetensors": raw}, checkpoint.config)
    engines = inspect_checkpoint(folder).engines
    assert [verdict.loads for verdict in engines.values()] == [False] * 3
    assert json.dumps({engine: verdict.to_json() for engine, verdict in engines.items()})


# The plan, and group_size: auto


def recipe(**quantize: Any) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "quantize": quantize})


def base_of(tmp_path: Path, intermediate: int = 192) -> Checkpoint:
    """Inputs of 64 everywhere but in down_proj."""
    return Checkpoint.open(pico_base(tmp_path / "base", intermediate=intermediate))


@pytest.mark.parametrize(("quantize", "sentence"), [
    ({}, "quantize.group_size 128 does not divide the 64 inputs of "),
    ({"format": "auto_round:auto_awq"}, "use 64, 32, -1 (whole rows) or auto"),
    ({"group_size": 256}, "quantize.group_size 256 does not divide the 64 inputs of "),
    ({"group_size": 32, "layers": {"down_proj": {"group_size": 128}}},
     "quantize.layers: group_size 128 does not divide the 192 inputs of "),
    ({"group_size": 32, "layers": {"down_proj": {"group_size": 128}}}, "use 64, 32 or -1 (whole rows)"),
    ({"group_size": 32, "layers": {"down_proj": {"scheme": "W8A16"}}}, "quantize.layers: group_size 128"),
])  # fmt: skip
def test_a_plan_refuses_a_group_that_divides_not_all_inputs_and_names_those_that_do(
    quantize: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    output = plan_output(base_of(tmp_path), recipe(**quantize), {})
    (problem,) = output.problems
    assert sentence in problem and len(problem.splitlines()) == 1
    assert "model.language_model.layers.0." in problem and "no engine loads" in problem
    assert not any(verdict.loads for verdict in output.judgement.verdicts.values())


def test_only_groups_that_divide_all_inputs_are_named(tmp_path: Path) -> None:
    (problem,) = plan_output(base_of(tmp_path, 96), recipe(group_size=64), {}).problems
    assert "group_size 64 does not divide the 96 inputs of" in problem and "down_proj (and of 1 more)" in problem
    assert problem.endswith("use 32, -1 (whole rows) or auto")


@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_a_plan_takes_whole_rows_and_groups_that_divide(group_size: int, tmp_path: Path) -> None:
    assert plan_output(base_of(tmp_path), recipe(group_size=group_size), {}).problems == []


@pytest.mark.parametrize(("intermediate", "layers", "expected"), [
    (192, {}, 64),
    (96, {}, 32),
    (96, {"down_proj": {"bits": 4, "group_size": 32}}, 64),  # has one of its own
    (96, {"down_proj": {"bits": 16}}, 64),  # is not packed
    (96, {"down_proj": {"bits": 8}}, 32),
])  # fmt: skip
def test_auto_is_the_largest_group_that_divides_the_inputs_of_all_packed_layers(
    intermediate: int, layers: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    base = base_of(tmp_path, intermediate)
    found = resolve_group_size(base, recipe(group_size="auto", layers=layers))
    assert found.quantize.resolved == (4, expected, True)
    assert plan_output(base, found, {}).problems == []


def test_auto_is_128_where_that_divides_and_a_number_stays_what_it_is(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.mlp.{name}_proj.weight": (256, 256) for name in ("gate", "up", "down")}
    tensors = {name: Tensor(name, "BF16", shape, Path("x"), 0, 0) for name, shape in shapes.items()}
    base = Checkpoint(Path("x"), ModelConfig(CONFIG), tensors, (), None)
    assert resolve_group_size(base, recipe(group_size="auto")).quantize.resolved == (4, 128, True)
    for asked in (recipe(), recipe(group_size=1024)):
        assert resolve_group_size(base_of(tmp_path), asked) is asked


def test_auto_has_the_stage_key_of_the_number_that_it_comes_to_and_none_before(tmp_path: Path) -> None:
    text, files = Calibration.of(Text("t", "0" * 64)), Manifest.of([])
    found = resolve_group_size(base_of(tmp_path), recipe(group_size="auto"))
    assert quantize_key(found, files, text) == quantize_key(recipe(group_size=64), files, text)
    with pytest.raises(RecipeError, match="group_size auto is not settled yet"):
        quantize_key(recipe(group_size="auto"), files, text)


@pytest.mark.parametrize(("scheme", "number"), [("W4A16", 128), ("W4A16G64", 64)])
def test_auto_that_comes_to_what_the_scheme_has_reuses_what_the_scheme_made(scheme: str, number: int) -> None:
    text, files = Calibration.of(Text("t", "0" * 64)), Manifest.of([])
    found = recipe(scheme=scheme, group_size="auto").with_group_size(number)
    assert found.quantize.resolved == (4, number, True)
    assert quantize_key(found, files, text) == quantize_key(recipe(scheme=scheme), files, text)
    assert quantize_key(recipe(group_size=128), files, text) != quantize_key(recipe(), files, text)  # as always


def test_two_outputs_that_auto_makes_one_are_refused_by_the_plan(store: Store, tmp_path: Path) -> None:
    base = held_base(store, pico_base(tmp_path / "base", intermediate=192))
    document = {"base": {"repo_id": "a/b"}, "outputs": [{"group_size": "auto"}, {"group_size": 32}, {"group_size": 64}]}
    texts = Calibration.of(find_text("builtin:python")), find_text("builtin:python-evaluation")
    plan = plan_of(store, parse_recipe(document), Inputs(base, *texts), elsewhere=True)
    assert list(plan.problems) == [
        "W4A16G64-auto_round: for this base it comes to the same as output W4A16-auto_round, packed as "
        "auto_round:auto_gptq: take one of them out"
    ]


def test_the_words_for_auto_are_known_before_the_base_is() -> None:
    asked = recipe(group_size="auto")
    assert scheme_words(asked.quantize) == "W4A16, group size auto, symmetric" and scheme_of(asked) == "W4A16 gauto"
    several = parse_recipe({"base": {"repo_id": "a/b"}, "outputs": [{"group_size": "auto"}, {"scheme": "W8A16"}]})
    assert list(several.each) == ["W4A16-auto_round", "W8A16-auto_round"]
    assert asked.digest not in {recipe().digest, recipe(group_size=64).digest}


def test_a_form_offers_auto_beside_the_numbers() -> None:
    schema = Recipe.model_json_schema()
    for section in ("Quantize", "Output"):
        field = schema["$defs"][section]["properties"]["group_size"]
        assert ["auto", -1, 32, 64, 128, 256, 512, 1024] in [choice.get("enum") for choice in field["anyOf"]]
    for value in ("auto", 64, -1, None):
        jsonschema.validate({"base": {"repo_id": "a/b"}, "quantize": {"group_size": value}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"base": {"repo_id": "a/b"}, "quantize": {"group_size": "all"}}, schema)
