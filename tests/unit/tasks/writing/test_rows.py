"""Rows that a base wrote: which are used, and how they outlive a killed process."""

from __future__ import annotations

import random
from pathlib import Path

from requant.tasks.writing.rows import (
    Order,
    Row,
    Start,
    batch_files,
    loops,
    more_offered,
    read_batches,
    write_batch,
)

STOPS = frozenset({2})


def row(number: int, answer: list[int]) -> Row:
    return Row.of(Order(number, Start("math", (5, 6)), seed=1), answer, STOPS, "an engine 1.0")


def test_a_row_has_the_tokens_of_its_prompt_and_of_its_answer() -> None:
    written = row(3, [7, 8, 2])
    assert (written.tokens, written.prompt_tokens, written.problem) == ((5, 6, 7, 8, 2), 2, "")
    assert (written.number, written.domain, written.engine) == (3, "math", "an engine 1.0")


def test_an_answer_that_ends_at_once_is_not_used() -> None:
    assert row(0, []).problem == row(0, [2]).problem == "empty"


def test_an_answer_that_repeats_itself_to_its_end_is_not_used() -> None:
    sound = random.Random(0).choices(range(1000), k=400)
    for period in (1, 7, 40):
        assert loops(sound + (sound[:period] * 300)[:256]), period
        assert row(0, sound + (sound[:period] * 300)[:256]).problem == "loops"


def test_an_answer_that_repeats_some_lines_is_used() -> None:
    lines = random.Random(0).choices(range(1000), k=120)
    assert not loops(lines) and not loops(lines + lines) and not loops([9] * 60)


def test_batches_are_read_up_to_the_first_that_is_missing_or_damaged(tmp_path: Path) -> None:
    for number in range(4):
        write_batch(tmp_path, number, [row(2 * number, [7]), row(2 * number + 1, [8])])
    assert [[one.number for one in batch] for batch in read_batches(tmp_path)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    (tmp_path / "batches" / "batch-00002.jsonl").write_text('{"number": 4}\n')
    assert len(list(read_batches(tmp_path))) == 2
    (tmp_path / "batches" / "batch-00001.jsonl").unlink()
    assert batch_files(tmp_path) == ["batches/batch-00000.jsonl"]


def test_the_stores_batches_are_fetched_only_if_they_are_more(tmp_path: Path) -> None:
    write_batch(tmp_path, 0, [row(0, [7])])
    assert not more_offered(tmp_path, ["batches/batch-00000.jsonl"])
    assert more_offered(tmp_path, ["batches/batch-00000.jsonl", "batches/batch-00001.jsonl"])
