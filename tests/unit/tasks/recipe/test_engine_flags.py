"""An engine's flags: what a recipe may set, how it is handed over, and how a person types it."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.recipe.engine_flags import MODEL, arguments, checked_flags, command_line, with_drafts, without_drafts
from requant.tasks.recipe.loader import parse_recipe

GOOD: dict[str, tuple[Any, list[str]]] = {
    "kv-cache-dtype": ("fp8", ["--kv-cache-dtype", "fp8"]),
    "max-model-len": (32768, ["--max-model-len", "32768"]),
    "gpu-memory-utilization": (0.85, ["--gpu-memory-utilization", "0.85"]),
    "enforce-eager": (True, ["--enforce-eager"]),
    "enable-prefix-caching": (False, ["--no-enable-prefix-caching"]),
    "compilation-config.cudagraph_mode": ("none", ["--compilation-config.cudagraph_mode", "none"]),
    "limit-mm-per-prompt": ({"image": 0}, ["--limit-mm-per-prompt", '{"image":0}']),
    "cudagraph-capture-sizes": ([1, 2], ["--cudagraph-capture-sizes", "1", "2"]),
    "seed": ("-1", ["--seed", "-1"]),
    "reasoning-parser": ("qwen3; rm -rf /", ["--reasoning-parser", "qwen3; rm -rf /"]),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_flag_becomes_arguments_as_the_engine_spells_it(name: str) -> None:
    value, expected = GOOD[name]
    checked_flags({name: value})
    assert arguments({name: value}) == expected


BAD: list[tuple[dict[str, Any], str]] = [
    ({"port": 1}, "port cannot be set here: the benchmark finds a free port"),
    ({"por": 1}, "por cannot be set here"),  # argparse completes it
    ({"served_model_name": "x"}, "the benchmark names the model"),
    ({"Model": "x"}, "the checkpoint is what is measured"),
    ({"api-key": "secret"}, "secrets do not belong into a recipe"),
    ({"trust-remote-code": True}, "set allow_remote_code"),
    ({"middleware": "os.system"}, "it names Python code to run"),
    ({"no-config": "x"}, "write the flags themselves"),
    ({"--dtype": "half"}, "is not a flag: write it as the engine does, without the dashes"),
    ({"dtype=half --port": 1}, "is not a flag"),
    ({"": 1}, "is not a flag"),
    ({"a\nb": 1}, "is not a flag"),
    ({"dtype": "--port=1"}, "would be read as another flag"),
    ({"cudagraph-capture-sizes": [1, "--host"]}, "would be read as another flag"),
    ({"dtype": "a\x1b[2Jb"}, "would be read as another flag"),
    ({"dtype": None}, "needs a text, a number"),
    ({"dtype": [[1]]}, "needs a text, a number"),
    ({"max-model-len": 1, "max_model_len": 2}, "are one flag: write it once"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[str(flags) for flags, _ in BAD])
def test_a_flag_that_a_recipe_may_not_set_is_refused_with_the_reason(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": {"flags": flags}})
    assert str(refusal.value).startswith("benchmark.flags: ") and words in str(refusal.value)


def test_drafting_is_one_flag_and_a_recipes_own_stands_for_it() -> None:
    assert with_drafts({"dtype": "half"}, 2) == {
        "dtype": "half", "speculative-config": {"method": "mtp", "num_speculative_tokens": 2},
    }  # fmt: skip
    own = {"speculative-config.method": "mtp", "dtype": "half"}
    assert with_drafts(own, 2) == own and without_drafts(own) == {"dtype": "half"}


def test_a_command_is_typed_as_it_was_run() -> None:
    words = ["vllm", "serve", MODEL, *arguments({"enforce-eager": True, "x": {"a": "it's"}, "sizes": [1, 2]})]
    typed = command_line(words, "me/model")
    assert typed.split(" \\\n  ")[0] == "vllm serve me/model"
    assert shlex.split(typed.replace("\\\n", "")) == [w if w != MODEL else "me/model" for w in words]
