"""How many tokens validate measures of a recipe's text, by which its time and memory are estimated."""

from __future__ import annotations

import functools
import json

from requant.tasks.recipe.recipe import BUILTIN_EVALUATION, Recipe
from requant.tasks.texts.text import BUILTIN_FOLDER
from requant.tasks.validating import DOMAIN_TOKENS, LENGTH, WINDOWS

WHOLE_TEXT_TOKENS = WINDOWS * LENGTH


def measured_tokens(recipe: Recipe) -> int:
    """Estimate the tokens that are measured of each model.

    The rows of other texts are not read here: such a text counts as one without domains, which is too little if its
    rows name some.
    """
    asked = recipe.validation
    if isinstance(asked.text, dict):
        return len(asked.text) * (asked.tokens or DOMAIN_TOKENS)
    if asked.text == BUILTIN_EVALUATION[0]:
        return _builtin_domains() * (asked.tokens or DOMAIN_TOKENS)
    return asked.tokens or WHOLE_TEXT_TOKENS


@functools.cache
def _builtin_domains() -> int:
    name = BUILTIN_EVALUATION[0].removeprefix("builtin:")
    lines = (BUILTIN_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return len({json.loads(line)["domain"] for line in lines if line})
