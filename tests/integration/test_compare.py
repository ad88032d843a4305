"""Checkpoints that auto-round made of the tiny base: two seeds of one recipe, and a body of 2 bits tuned on code."""

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


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A body of 2 bits that was tuned on code alone."""
    return made(tmp_path_factory.mktemp("made") / "coarse", bits=2)


def recipe_of(folder: Path, text: str) -> Path:
    """A recipe whose only limit of quality is that of the KL divergence."""
    gates = (
        "max_perplexity_increase: null, min_top1_agreement: null, min_mtp_acceptance_ratio: null, max_block_error: null"
    )
    path = folder / f"{text.removeprefix('builtin:')}.yaml"
    path.write_text(
        f"base: {{repo_id: a/b}}\nvalidation: {{text: {text}, tokens: 2048}}\n"
        f"gates: {{{gates}, max_kl_divergence: 2.5}}\n"
    )
    return path


def test_damage_outside_of_code_passes_on_code_and_fails_by_domain(coarse: Path, tmp_path: Path) -> None:
    on_code = requant.validate(coarse, base=TINY, recipe=recipe_of(tmp_path, "builtin:python-evaluation"))
    assert [gate for gate in on_code.gates if gate.failed] == []
    by_domain = requant.validate(coarse, base=TINY, recipe=recipe_of(tmp_path, "builtin:mixed-evaluation"))
    failed = {gate.name: gate.note for gate in by_domain.gates if gate.failed}
    assert failed.keys() == {"kl_divergence"} and "languages" in failed["kl_divergence"]


def test_two_seeds_of_a_recipe_are_not_different_and_fewer_bits_are_worse(coarse: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "builtin:python-evaluation")
    first, second = (made(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    seeds = requant.compare(first, second, base=TINY, recipe=recipe)
    assert seeds.answer == "no difference" and seeds.domains["text"].mtp_acceptance is not None
    bits = requant.compare(coarse, first, base=TINY, recipe=recipe)
    assert bits.answer == "b" and bits.domains["text"].kl_divergence.difference < -0.5
