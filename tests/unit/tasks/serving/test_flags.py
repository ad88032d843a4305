"""With which flags vLLM serves a base and a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.engine_flags import SPECULATION
from requant.tasks.recipe.recipe import Benchmark
from requant.tasks.serving.flags import can_draft, serving_flags
from tests.factories.checkpoints import write_quantized
from tests.factories.head_families import FAMILIES
from tests.factories.pico import pico_base

DRAFTS = {SPECULATION: {"method": "mtp", "num_speculative_tokens": 3}}


def test_vllm_is_not_asked_to_draft_for_a_model_for_which_it_has_no_draft_model(tmp_path: Path) -> None:
    known, foreign = (Checkpoint.open(FAMILIES[n].write(tmp_path / n)) for n in ("mimo", "iquest-flat"))
    assert can_draft(known, Benchmark()) and not can_draft(foreign, Benchmark())
    assert can_draft(foreign, Benchmark(flags={"speculative-config": {"method": "draft_model"}}))


@pytest.mark.parametrize("name", ["deepseek-v4.1", "deepseek-v4-dspark"])
def test_stages_of_dspark_are_not_served_as_an_mtp_head(name: str, tmp_path: Path) -> None:
    staged = Checkpoint.open(FAMILIES[name].write(tmp_path / name))
    assert staged.head is not None and not can_draft(staged, Benchmark())


def test_a_checkpoint_drafts_if_it_has_a_head_or_the_recipe_says_so(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    headless = Checkpoint.open(write_quantized(base, tmp_path, head=False))
    assert can_draft(Checkpoint.open(base), Benchmark()) and not can_draft(headless, Benchmark())
    assert can_draft(headless, Benchmark(flags={"speculative-config": {"method": "eagle3"}}))


def test_only_a_quantized_checkpoint_is_served_with_the_flags_that_say_how() -> None:
    asked = Benchmark(flags={"max-model-len": 512, "quantization": "gptq_marlin"}, draft_tokens=3)
    base, result = {"hidden_size": 8}, {"hidden_size": 8, "quantization_config": {"bits": 4}}
    assert serving_flags(result, asked, drafts=False) == asked.flags
    assert serving_flags(result, asked, drafts=True) == {**asked.flags, **DRAFTS}
    assert serving_flags(base, asked, drafts=False) == {"max-model-len": 512}
    assert serving_flags(base, asked, drafts=True) == {"max-model-len": 512, **DRAFTS}


@pytest.mark.parametrize("quantized", [{}, {"quantization_config": {"bits": 4}}], ids=["base", "result"])
def test_a_checkpoint_is_served_in_the_dtype_that_its_scales_are_judged_in(quantized: dict[str, Any]) -> None:
    config = {"torch_dtype": "bfloat16", **quantized}
    assert serving_flags(config, Benchmark(), drafts=False) == {"dtype": "bfloat16"}
    asked = Benchmark(flags={"dtype": "half"})
    assert serving_flags(config, asked, drafts=False) == asked.flags, "what the recipe says comes first"
