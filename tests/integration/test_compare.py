"""Comparing checkpoints that auto-round made of the tiny base: two seeds of one recipe, and fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import requant
from requant.tasks.mtp_fix import mtp_fix
from requant.tasks.quantize import quantize
from tests.factories.bases import prepared
from tests.factories.paths import TINY

pytestmark = pytest.mark.usefixtures("quantize_forks")


def made(folder: Path, **settings: Any) -> Path:
    """Quantize the tiny base, with its MTP head kept, and check the result out."""
    folder.mkdir()
    store, recipe, files, text = prepared(folder, TINY, **settings)
    recipe = recipe.model_copy(update={"mtp": "keep"})
    packed = quantize(store, recipe, files, text)
    return store.checkout(mtp_fix(store, recipe, files, packed.manifest).manifest, folder / "checkout")


def test_two_seeds_of_a_recipe_are_not_different_and_fewer_bits_are_worse(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: {repo_id: a/b}\nvalidation: {text: builtin:python-evaluation, tokens: 4096}\n")
    first, second = (made(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    seeds = requant.compare(first, second, base=TINY, recipe=recipe)
    assert seeds.answer == "no difference" and seeds.domains["text"].mtp_acceptance is not None
    bits = requant.compare(made(tmp_path / "coarse", bits=2), first, base=TINY, recipe=recipe)
    assert bits.answer == "b" and bits.domains["text"].kl_divergence.difference < -0.5
