"""Text that a base writes: enough of it, the same after a kill, with its share for every expert."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.errors import EngineFailed, OutOfMemory, RecipeError
from requant.tasks.validating import model
from requant.tasks.writing import engine, write
from requant.tasks.writing.engine import WritingBase, open_writer, stop_ids
from requant.tasks.writing.rows import Row, Start
from requant.tasks.writing.write import Need, WrittenText, write_text
from tests.factories.pico import pico_base

STARTS = [Start(domain, (10 + number, 20)) for domain in ("prose", "code") for number in range(3)]
TOKENS, ROW_TOKENS = 120, 12


def base_of(folder: Path, experts: int = 0) -> WritingBase:
    return WritingBase(pico_base(folder / "base", experts=experts), frozenset({2}), ROW_TOKENS, {}, folder / "logs")


def written(base: WritingBase, folder: Path, seed: int = 1, shares: list[float] | None = None) -> WrittenText:
    return write_text(base, STARTS, Need(TOKENS, seed), folder, (shares if shares is not None else []).append)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REQUANT_VLLM", raising=False)
    monkeypatch.setattr("requant.tasks.writing.schedule.MAX_BATCH", 4)


def test_a_killed_run_goes_on_and_ends_with_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, shares = base_of(tmp_path), list[float]()
    whole = written(base, tmp_path / "whole", shares=shares)
    assert sum(len(row.tokens) for row in whole.rows) >= TOKENS and whole.choice is None
    assert {row.domain for row in whole.rows} == {"prose", "code"} and len({row.tokens for row in whole.rows}) >= 10
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) > 2
    kept, write_batch = [], write.write_batch

    def killed(folder: Path, number: int, rows: list[object]) -> None:
        if number == 2:
            raise KeyboardInterrupt
        kept.append(number)
        write_batch(folder, number, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(write, "write_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        written(base, tmp_path / "killed")
    monkeypatch.setattr(write, "write_batch", write_batch)
    assert kept == [0, 1]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "batches").iterdir()}
    assert written(base, tmp_path / "killed") == whole
    assert all(path.stat().st_mtime_ns == written_ns for path, written_ns in before.items())
    assert written(base, tmp_path / "other", seed=2).rows != whole.rows


def test_a_finished_text_is_read_without_loading_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(tmp_path)
    whole = written(base, tmp_path / "work")
    monkeypatch.setattr(write, "open_writer", None)
    assert written(base, tmp_path / "work") == whole


def test_more_is_written_until_it_is_enough(tmp_path: Path) -> None:
    base, asked = base_of(tmp_path), list[int]()

    def enough(rows: Sequence[Row]) -> bool:
        asked.append(sum(len(row.tokens) for row in rows))
        return len(asked) == 3

    text = write_text(base, STARTS, Need(TOKENS, 1, enough), tmp_path / "work", lambda share: None)
    assert asked == sorted(asked) and asked[0] < asked[-1] == sum(len(row.tokens) for row in text.rows) >= 187
    with pytest.raises(RecipeError, match=r"do not fill the samples: lower quantize.nsamples, or name another text"):
        write_text(base, STARTS, Need(24, 1, lambda rows: False), tmp_path / "never", lambda share: None)


def test_every_expert_gets_its_share(tmp_path: Path) -> None:
    text = written(base_of(tmp_path, experts=4), tmp_path / "work")
    tokens = sum(len(row.tokens) for row in text.rows)
    assert text.choice is not None and text.choice.starved == [] and text.choice.tokens.shape == (2, 4)
    assert (text.choice.tokens.sum(axis=1) == 2 * tokens).all() and TOKENS <= tokens < TOKENS + ROW_TOKENS
    assert sum(len(row.tokens) for row in text.written) < 2 * TOKENS


def test_four_times_as_much_is_written_to_choose_from_if_experts_lack_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a share that no router can keep to, each expert getting as much as any other."""
    caplog.set_level(logging.INFO, "requant")
    base = base_of(tmp_path, experts=4)
    monkeypatch.setattr("requant.tasks.writing.experts.SHARE", 1.0)
    text = written(base, tmp_path / "work")
    assert text.choice is not None and text.choice.starved
    assert f"get less than their share ({text.choice.starved[0]}" in caplog.text
    assert sum(len(row.tokens) for row in text.written) >= 4 * TOKENS
    assert TOKENS <= sum(len(row.tokens) for row in text.rows) < TOKENS + ROW_TOKENS
    in_order = [text.written[number] for number in range(len(text.rows))]
    assert text.rows != tuple(in_order), "rows are chosen for their experts"
    assert written(base, tmp_path / "work").rows == text.rows, "a run that goes on chooses the same rows"


def test_no_weights_stay_in_memory_once_the_text_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, freed, begin = list[model.Skeleton](), list[object](), model.Skeleton.__init__

    def begun(skeleton: model.Skeleton, *args: Any) -> None:
        made.append(skeleton)
        begin(skeleton, *args)

    monkeypatch.setattr(model.Skeleton, "__init__", begun)
    monkeypatch.setattr(model, "free", freed.append)
    base = base_of(tmp_path, experts=4)
    written(base, tmp_path / "work")
    with pytest.raises(KeyboardInterrupt), open_writer(base):
        raise KeyboardInterrupt
    assert len(made) == 3 and freed == [skeleton.device for skeleton in made], "to write, to count experts, to write"
    assert all(parameter.is_meta for skeleton in made for parameter in skeleton.model.parameters())


def test_a_base_that_writes_nothing_useful_is_told_so(tmp_path: Path) -> None:
    base = WritingBase(pico_base(tmp_path / "base"), frozenset(range(2048)), ROW_TOKENS, {}, tmp_path / "logs")
    with pytest.raises(RecipeError, match="0 in rows that neither loop nor are empty"):
        write_text(base, STARTS, Need(20, seed=1), tmp_path / "work", lambda share: None)


def test_a_base_that_does_not_fit_the_memory_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "room", lambda device: 1000)
    with pytest.raises(OutOfMemory, match=r"weights need .* use a larger machine, or name another text"):
        written(base_of(tmp_path), tmp_path / "work")


def test_where_vllm_does_not_start_transformers_writes_what_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(tmp_path)
    monkeypatch.setenv("REQUANT_VLLM", "/bin/false serve")
    with open_writer(base) as (_, name):
        assert name.startswith("transformers ")
    assert "vLLM did not start" in caplog.text and "transformers writes the text" in caplog.text
    monkeypatch.setattr(engine, "SMALL_BASE_BYTES", 0)
    with pytest.raises(EngineFailed, match="would take days: name another text"), open_writer(base):
        pass


def test_an_answer_ends_with_any_of_the_tokens_that_the_base_names(tmp_path: Path) -> None:
    class Tokenizer:
        eos_token_id = 5

    folder = pico_base(tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4, true, "x", -1]}')
    assert stop_ids(folder, Tokenizer()) >= {3, 4, 5} and -1 not in stop_ids(folder, Tokenizer())
    (folder / "generation_config.json").unlink()
    assert 5 in stop_ids(folder, Tokenizer())
