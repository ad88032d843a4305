"""The gate of the draft acceptance in the real vLLM: the base against itself, and a head that drafts worse."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from requant.tasks.recipe.engine_flags import with_drafts
from requant.tasks.recipe.recipe import Gates
from requant.tasks.serving.drafts import count_drafts
from requant.tasks.serving.vllm import RunningVllm, serve_vllm
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validating.drafts import DraftComparison, DraftCount, EngineSetup
from requant.tasks.validating.engine_gate import EngineDrafts, judge_engine
from requant.tasks.validating.gates import Gate
from tests.engines.pipeline import RECIPE, engine_environment
from tests.engines.variants import Raw, make
from tests.factories.checkpoints import from_bf16, to_bf16
from tests.factories.measured import good
from tests.factories.paths import TINY

GROUP = 32
PRECISION = 0.05  # so coarse that each side takes as few batches as are allowed


def one_scale_too_high(tensors: Raw, config: dict[str, Any]) -> None:
    """Make of the fusion layer what the reference card's script makes of its 4 bits: all zero points are off by one."""
    dtype, shape, data = tensors["mtp.fc.weight"]
    groups = from_bf16(data, shape).reshape(-1, GROUP)
    scales = np.abs(groups).max(axis=1, keepdims=True) / 7
    wrong = (np.round(groups / scales) + 1) * scales
    tensors["mtp.fc.weight"] = (dtype, shape, to_bf16(wrong.reshape(shape).astype(np.float32)))


@pytest.fixture(scope="module")
def counts(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, DraftCount]]:
    """The drafts of the base, counted twice, and of the damaged head. Both servers start at once."""
    folder = tmp_path_factory.mktemp("acceptance")
    damaged = make(folder / "damaged", quantization=None, body=False, edit=one_scale_too_high, vision=True)
    flags = with_drafts(yaml.safe_load(RECIPE.read_text())["benchmark"]["flags"], 1)
    text = EVALUATION.read_text(encoding="utf-8")

    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        for name, value in engine_environment(vllm_python).items():
            patch.setenv(name, value)

        def serve(name: str, model: Path) -> RunningVllm:
            return running.enter_context(serve_vllm(model, flags, folder / f"{name}.log", chat=False))

        with ThreadPoolExecutor() as pool:
            servers = list(pool.map(serve, ("base", "damaged"), (TINY, damaged)))
        counted = [count_drafts(one.server, text, PRECISION, EngineSetup()) for one in (servers[0], *servers)]
    yield dict(zip(("again", "base", "damaged"), counted, strict=True))


def judged(counts: dict[str, DraftCount], name: str) -> Gate:
    compared = DraftComparison(text="t", quantized=counts[name], base=counts["base"])
    (gate,) = judge_engine(good(), Gates(), EngineDrafts(compared))
    print(f"{name}: {gate.value} {gate.interval} {gate.note}")
    return gate


def test_the_base_against_itself_passes(counts: dict[str, DraftCount]) -> None:
    gate = judged(counts, "again")
    assert gate.passed is True and counts["again"].tokens > 2000
    assert gate.value == pytest.approx(1, abs=0.02)


def test_a_head_with_scales_one_too_high_fails(counts: dict[str, DraftCount]) -> None:
    gate = judged(counts, "damaged")
    assert gate.passed is False and gate.interval is not None and gate.interval[1] < 0.95
