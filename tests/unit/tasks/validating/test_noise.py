"""The noise floor, and what follows from it: a base passes every gate against itself, computed in any way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validating import LONG_CONTEXT
from requant.tasks.validating.compare import compare, side_by_side
from requant.tasks.validating.gates import QUALITY_GATES, judge
from requant.tasks.validating.measure import measure
from requant.tasks.validating.measured import Measured
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings, load_model
from requant.tasks.validating.noise import NOISE_WINDOWS, noise_floor
from tests.factories.measured import measuring_little
from tests.factories.paths import TINY
from tests.factories.pico import pico_base

FLOAT32 = RunSettings(torch.device("cpu"), torch.float32)
BFLOAT16 = replace(FLOAT32, dtype=torch.bfloat16)
TOKENS = 6 * 48  # of each domain


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with measuring_little(windows=4, length=48, probe=16, prompts=1, generated=4, longest=96):
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of two domains and a long one."""
    path, words = tmp_path_factory.mktemp("text") / "text.jsonl", EVALUATION.read_text()
    domains = {"one": words[:20_000], LONG_CONTEXT: words[50_000:60_000], "two": words[20_000:40_000]}
    path.write_text("".join(json.dumps({"domain": name, "text": part}) + "\n" for name, part in domains.items()))
    return path


@pytest.fixture(scope="module")
def of_tiny(text: Path) -> Measurement:
    return measure(TINY, text, FLOAT32, TOKENS)


def test_the_floor_is_small_above_zero_and_measured_in_each_domain(of_tiny: Measurement) -> None:
    floor = noise_floor(TINY, of_tiny, FLOAT32)
    assert list(floor.domains) == ["one", "two", LONG_CONTEXT] and floor.dtype == "bfloat16"
    assert all(1e-6 < value < 0.01 for value in (floor.kl_divergence, *floor.domains.values()))
    assert floor == noise_floor(TINY, of_tiny, FLOAT32)


def test_windows_computed_in_other_batches_are_the_same_windows(
    of_tiny: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same precision, almost nothing is left of the difference."""
    monkeypatch.setattr("requant.tasks.validating.noise._other_dtype", lambda checkpoint, settings: torch.float32)
    floor = noise_floor(TINY, of_tiny, FLOAT32)
    assert all(abs(value) < 1e-6 for value in floor.domains.values())


def test_a_part_of_the_windows_is_enough(of_tiny: Measurement) -> None:
    first = [i for rows in of_tiny.windows_by_domain.values() for i in rows[:NOISE_WINDOWS]]
    assert len(first) == 12 < len(of_tiny.tokens)
    assert noise_floor(TINY, of_tiny.of_windows(first), FLOAT32) == noise_floor(TINY, of_tiny, FLOAT32)


def test_the_long_text_is_one_text(of_tiny: Measurement, text: Path) -> None:
    """Its second window knows the first one."""
    rows = of_tiny.windows_by_domain[LONG_CONTEXT]
    tokens = of_tiny.tokens[rows].reshape(1, -1)
    assert len(rows) == 6
    with torch.inference_mode():
        logits = load_model(Checkpoint.open(TINY), FLOAT32)(input_ids=torch.from_numpy(tokens).long()).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(tokens[0, 1:]).long(), reduction="none")
    second = expected.numpy()[48 : 48 + 47]
    np.testing.assert_allclose(of_tiny.nll[rows[1]], second, rtol=1e-3, atol=1e-3)


def against_itself(base: Path, of_base: Measurement, again: Measurement, settings: RunSettings) -> set[str]:
    """Return the gates of quality that a base fails against itself; `again`: measured in another way."""
    again = replace(again, hidden=again.hidden.to(settings.dtype))
    divergence = compare(base, base, again, of_base, settings)
    measured = Measured(divergence=divergence, behaviour=side_by_side(of_base, again), head_kept=True)
    measured = measured.with_noise_floor(noise_floor(base, of_base, settings))
    gates = [gate for gate in judge(measured, Gates()) if gate.name in {*QUALITY_GATES, "mtp_acceptance_ratio"}]
    assert len(gates) == 4 and all(gate.value is not None for gate in gates)
    return {gate.name for gate in gates if not gate.passed}


def test_a_base_passes_every_gate_against_itself_in_any_precision(of_tiny: Measurement, text: Path) -> None:
    coarse = measure(TINY, text, BFLOAT16, TOKENS)
    assert against_itself(TINY, of_tiny, of_tiny, FLOAT32) == set()
    assert against_itself(TINY, of_tiny, coarse, FLOAT32) == set()
    assert against_itself(TINY, coarse, of_tiny, BFLOAT16) == set()


@pytest.mark.parametrize("seed", range(3))
def test_a_base_of_any_seed_passes_every_gate_against_itself(seed: int, text: Path, tmp_path: Path) -> None:
    """Random weights accept hardly any draft, so that a ratio of acceptance rates is noise."""
    base = pico_base(tmp_path / "base", seed=seed)
    of_base, again = (measure(base, text, settings, TOKENS) for settings in (FLOAT32, BFLOAT16))
    assert against_itself(base, of_base, again, FLOAT32) == set()
