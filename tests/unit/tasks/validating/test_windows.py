"""Windows of a text: spread over each domain, as many as are asked for, and the long text without a gap."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import TooFewTokens
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validating import LONG_CONTEXT, OTHER, WHOLE_TEXT
from requant.tasks.validating.model import load_tokenizer
from requant.tasks.validating.windows import Windows, windows
from tests.factories.paths import TINY

PYTHON = EVALUATION.read_text()


def cut(folder: Path, tokens: int | None = None, **domains: str) -> Windows:
    """Cut the windows of a text with these domains."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"domain": name, "text": text}) + "\n" for name, text in domains.items()))
    return windows(TINY, path, Checkpoint.open(TINY), tokens=tokens)


def test_a_text_without_domains_has_the_windows_that_it_always_had() -> None:
    found = windows(TINY, EVALUATION, Checkpoint.open(TINY))
    ids = load_tokenizer(TINY)(PYTHON, add_special_tokens=False)["input_ids"]
    stride = (len(ids) - 512) // 23
    assert found.domains == (WHOLE_TEXT,) * 24 and found.separate == 24
    assert found.tokens.tolist() == [ids[i * stride : i * stride + 512] for i in range(24)]


def test_each_domain_has_as_many_tokens_as_are_asked_for_or_all_that_it_has(tmp_path: Path) -> None:
    found = cut(tmp_path, 2048, code=PYTHON, short=PYTHON[:4000])
    assert Counter(found.domains) == {"code": 4, "short": 2} and found.tokens.shape == (6, 512)
    assert Counter(cut(tmp_path, code=PYTHON, again=PYTHON).domains) == {"code": 16, "again": 16}


def test_domains_too_short_for_a_window_are_measured_together(tmp_path: Path) -> None:
    found = cut(tmp_path, 2048, code=PYTHON, one=PYTHON[:900], two=PYTHON[900:1800])
    assert Counter(found.domains) == {"code": 4, OTHER: 1}
    assert Counter(cut(tmp_path, 2048, code=PYTHON, one="x = 1\n").domains) == {"code": 4}


def test_a_text_that_is_too_short_in_all_domains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TooFewTokens, match=r"makes only \d+ tokens of the text text\.jsonl, and measuring needs"):
        cut(tmp_path, one="x = 1\n", two="y = 2\n")


def test_the_long_text_comes_last_without_gaps_and_is_cut_to_what_fits(tmp_path: Path) -> None:
    found = cut(tmp_path, 2048, **{LONG_CONTEXT: PYTHON, "code": PYTHON})
    assert found.domains == ("code",) * 4 + (LONG_CONTEXT,) * 4 and found.separate == 4
    ids = load_tokenizer(TINY)(PYTHON, add_special_tokens=False)["input_ids"]
    assert found.tokens[4:].flatten().tolist() == ids[:2048]
    assert found.up_to(1500).domains == ("code",) * 4 + (LONG_CONTEXT,) * 2
    assert found.up_to(3).domains == ("code",) * 4 + (LONG_CONTEXT,)


def test_continuations_begin_in_different_domains(tmp_path: Path) -> None:
    found = cut(tmp_path, 1024, code=PYTHON, prose=PYTHON, chat=PYTHON)
    assert [found.domains[i] for i in found.varied] == ["code", "prose", "chat", "code", "prose", "chat"]
    assert windows(TINY, EVALUATION, Checkpoint.open(TINY)).varied == list(range(24))
