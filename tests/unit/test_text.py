"""Texts to calibrate on, pinned by what they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tasks.errors import RecipeError
from tasks.recipe_quantize import BUILTIN
from tasks.text import EVALUATION, find_text


def test_a_builtin_text_is_pinned_by_its_content() -> None:
    text = find_text("builtin:python")
    assert text.path is not None and text.dataset is None and text.name == "builtin:python"
    assert text.digest == hashlib.sha256(text.path.read_bytes()).hexdigest()
    assert text.path.stat().st_size > 1_000_000


def test_a_builtin_text_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"builtin:prose does not exist: use builtin:python"):
        find_text("builtin:prose")


def test_a_local_file_is_pinned_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    for folder, data in (("one", b"text"), ("two", b"text"), ("three", b"TEXT")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(data)
    one, two, three = (find_text(str(tmp_path / folder / "a.txt")) for folder in ("one", "two", "three"))
    assert one.digest == two.digest != three.digest
    assert one.name == "a.txt" and one.path == tmp_path / "one" / "a.txt"


def test_nothing_is_measured_on_the_text_that_was_calibrated_on() -> None:
    paths = [find_text(name).path for name in BUILTIN]
    assert EVALUATION not in paths
    text = "".join(path.read_text() for path in paths if path is not None)
    evaluation = EVALUATION.read_text()
    chunks = [evaluation[i : i + 400] for i in range(0, len(evaluation) - 400, 4000)]
    assert len(chunks) > 20 and not [c for c in chunks if c in text]


@pytest.mark.parametrize("name", ["/nowhere/a.txt", "/", f"/{'a' * 300}.txt", "/a\0b.txt"])
def test_a_local_file_that_this_worker_cannot_read_is_a_sentence(name: str) -> None:
    """A run on a worker is given the whole path: load_recipe has looked on another machine, or not at all."""
    with pytest.raises(RecipeError, match=r"validation\.text: .* cannot be read \(.+\) on this machine"):
        find_text(name, "validation.text")
