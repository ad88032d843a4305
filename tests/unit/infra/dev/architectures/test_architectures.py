"""The data of architectures are what the installed transformers says."""

from __future__ import annotations

import pytest

from infra.dev.architectures.__main__ import as_text, classes, describe
from infra.dev.architectures.formulas import fit
from requant.tasks.checkpoint.completeness.conditions import Values
from requant.tasks.checkpoint.completeness.needs import FOLDER
from requant.tasks.checkpoint.config import JsonObject

ALL = sorted(path.stem for path in FOLDER.iterdir())
QUICK = "Qwen3ForCausalLM"
NEEDED = {
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Gemma2ForCausalLM", "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration", "Phi3ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM", "GptOssForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "Ernie4_5ForCausalLM",
    "Ernie4_5_MoeForCausalLM", "Exaone4ForCausalLM", "ExaoneMoeForCausalLM", "SmolLM3ForCausalLM",
    "GraniteForCausalLM", "Cohere2ForCausalLM", "MiniMaxM2ForCausalLM", "NemotronHForCausalLM", "FalconH1ForCausalLM",
}  # fmt: skip


def test_the_architectures_that_people_bring_are_known() -> None:
    assert set(ALL) >= NEEDED


@pytest.mark.parametrize("name", [QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n != QUICK)])
def test_a_description_is_what_transformers_says_now(name: str) -> None:
    made = as_text(describe(name, classes()[name]))
    assert made == (FOLDER / f"{name}.json").read_text(encoding="utf-8"), "run make architectures"


@pytest.mark.parametrize(
    "formula", ["a", "2*a", "a*b", "a*b/c", "a + b", "2*a*b + c", "a*b + a*c", "a/2", "a*a", "a + b + c", "7"]
)
def test_a_formula_is_found_again_from_its_values(formula: str) -> None:
    rows = [
        {"a": 8 * x, "b": 24 * y, "c": 4 * z} for x, y, z in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 2, 2)]
    ]
    numbers = [Values(JsonObject(row)).size(formula) or 0 for row in rows]
    found = fit(list(zip(rows, numbers, strict=True)), [key for key in "abc" if key in formula])
    assert found is not None
    other = JsonObject(a=40, b=72, c=12)
    assert Values(other).size(found) == Values(other).size(formula)


def test_numbers_that_no_formula_gives_are_left_open() -> None:
    assert fit([({"a": 1}, 1), ({"a": 2}, 7), ({"a": 3}, 5), ({"a": 4}, 2)], ["a"]) is None


def test_a_class_that_is_no_decoder_is_not_described() -> None:
    with pytest.raises(ValueError, match="no decoder"):
        describe("BertLMHeadModel", ["bert"])
