"""Damaged checkpoints of the trained tiny model: each is caught by the gate that is there for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validate import measured_values
from requant.tasks.validating.gates import Gate, judge
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings
from tests.factories.checkpoints import write_quantized
from tests.factories.damage import DAMAGES, damaged
from tests.factories.measured import measuring_little
from tests.factories.paths import TINY

LIMITS = Gates(max_perplexity_increase=0.15, min_top1_agreement=0.8)


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with measuring_little(windows=6, length=128, probe=64, prompts=2, generated=8, longest=256):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(TINY, tmp_path_factory.mktemp("quantized"))


@pytest.fixture(scope="module")
def of_base() -> dict[Path, Measurement]:
    return {}


def gates(folder: Path, of_base: dict[Path, Measurement]) -> dict[str, Gate]:
    """Every gate of a checkpoint; the base is measured once."""

    def kept(path: Path, settings: RunSettings) -> Measurement:
        if path != TINY:
            return measure(path, EVALUATION, settings)
        return of_base.setdefault(path, of_base.get(path) or measure(path, EVALUATION, settings))

    checkpoint, base = Checkpoint.open(folder), Checkpoint.open(TINY).sound()
    values = measured_values(checkpoint, base, kept, keep_head=True, pack_head=False, settings=run_settings(TINY))
    return {gate.name: gate for gate in judge(values, LIMITS)}


def test_an_undamaged_checkpoint_passes_every_gate(made: Path, of_base: dict[Path, Measurement]) -> None:
    found = gates(made, of_base)
    assert [gate for gate in found.values() if not gate.passed] == []
    assert len(found) == 17 and all(gate.value is not None for gate in found.values())


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_caught_by_its_gate(name: str, made: Path, of_base: dict[Path, Measurement], tmp_path: Path) -> None:
    found = gates(damaged(made, tmp_path / "damaged", name), of_base)
    failed = {gate.name for gate in found.values() if not gate.passed}
    assert DAMAGES[name][1] <= failed
    lossless = {"structure", "lossless", "finite", "files", "context"} - DAMAGES[name][1]
    if "number" not in name:
        assert not failed & lossless, "and what is whole is said to be"
