"""Texts to calibrate on, pinned by what they hold."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from requant.tasks.artifact import file_of, sha256_of
from requant.tasks.errors import RecipeError
from requant.tasks.excerpt import text_files
from requant.tasks.hub.revision import HubFile, Revision
from requant.tasks.recipe.quantize_section import BUILTIN
from requant.tasks.recipe.recipe import BUILTIN_EVALUATION
from requant.tasks.store import Store
from requant.tasks.texts.forms import plain_chat
from requant.tasks.texts.rows import needs_template, read_rows
from requant.tasks.texts.text import Text, find_text


def test_a_builtin_text_is_pinned_by_its_content() -> None:
    text = find_text("builtin:python")
    assert text.path is not None and text.dataset is None and text.name == "builtin:python"
    assert text.digest == hashlib.sha256(text.path.read_bytes()).hexdigest()
    assert text.path.stat().st_size > 1_000_000


def test_a_builtin_text_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(RecipeError, match=r"builtin:prose does not exist: use builtin:mixed or builtin:python or"):
        find_text("builtin:prose")


def test_a_local_file_is_pinned_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    for folder, data in (("one", b"text"), ("two", b"text"), ("three", b"TEXT")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_bytes(data)
    one, two, three = (find_text(str(tmp_path / folder / "a.txt")) for folder in ("one", "two", "three"))
    assert one.digest == two.digest != three.digest
    assert one.name == "a.txt" and one.path == tmp_path / "one" / "a.txt"


def test_nothing_is_measured_on_the_text_that_was_calibrated_on() -> None:
    text = "\n".join(document for name in BUILTIN for document in documents(name)).encode()
    for name in BUILTIN_EVALUATION:
        pieces = [d[i : i + 200].encode() for d in documents(name) for i in range(0, max(1, len(d) - 200), 500)]
        assert len(pieces) > 150 and not [piece for piece in pieces if piece in text], name


def documents(name: str) -> list[str]:
    """The documents of a built-in text, chats as they would be without a template."""
    path = find_text(name).path
    assert path is not None
    return [row.text or plain_chat(row.messages) for row in read_rows([path], name, chats=True)]


@pytest.mark.parametrize("name", BUILTIN + BUILTIN_EVALUATION)
def test_a_builtin_text_can_be_read_whole(name: str) -> None:
    text = find_text(name)
    assert text.path is not None and text.digest.removeprefix("chats:") == sha256_of(text.path)
    assert text.chats == needs_template([text.path]) == ("mixed" in name)
    assert all(document.strip() for document in documents(name))


# What finished results of these texts are found by.
PINNED = {
    "builtin:python": "4514336409c55a2f17c81da7503aff6adcb090547758a8ed75ba495a2315dae7",
    "builtin:python-evaluation": "ca250e09c974d86c9a1e23184333aaae7070cb6332f5c79d62b9f211c12768a9",
}


@pytest.mark.parametrize(("name", "digest"), PINNED.items())
def test_a_builtin_text_of_old_is_what_it_was(name: str, digest: str) -> None:
    assert find_text(name).digest == digest


def test_chats_of_a_local_file_are_part_of_what_pins_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    texts, chats = (find_text(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert not texts.chats and texts.digest == sha256_of(tmp_path / "a.jsonl")
    assert chats.chats and chats.digest == f"chats:{sha256_of(tmp_path / 'b.jsonl')}"


def test_a_name_that_decides_how_rows_are_read_is_part_of_what_pins_them(tmp_path: Path) -> None:
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    for name in ("rows.jsonl", "rows.json", "rows.txt", "rows.md"):
        (tmp_path / name).write_bytes(rows)
    lines, whole = (find_text(str(tmp_path / name)).digest for name in ("rows.jsonl", "rows.txt"))
    assert lines == find_text(str(tmp_path / "rows.json")).digest == sha256_of(tmp_path / "rows.jsonl")
    assert whole == find_text(str(tmp_path / "rows.md")).digest != lines
    (tmp_path / "rows.txt.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "rows.jsonl.gz").write_bytes((tmp_path / "rows.txt.gz").read_bytes())
    whole, lines = (find_text(str(tmp_path / name)).digest for name in ("rows.txt.gz", "rows.jsonl.gz"))
    assert whole != lines == sha256_of(tmp_path / "rows.jsonl.gz")
    (tmp_path / "prose.txt").write_text("[Chapter 1]\n{a note}\n")
    assert find_text(str(tmp_path / "prose.txt")).digest == sha256_of(tmp_path / "prose.txt")


def test_what_describes_a_data_set_is_not_read(store: Store, tmp_path: Path) -> None:
    """Such files are pretty-printed, and no rows."""
    contents = {"dataset_infos.json": '{\n "default": {}\n}', "data/state.json": "{\n}", "data/my_state.json": "[]",
                "train.jsonl": '{"text": "a"}\n'}  # fmt: skip
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "set" / name).write_text(content)
    files = [file_of(tmp_path / "set", name) for name in contents]
    for file in files:
        store.put_blob(tmp_path / "set" / file.path, file)
    dataset = Revision("a/b", "1" * 40, tuple(HubFile(f.path, f.size, "", f.sha256) for f in files), "dataset")
    paths = text_files(store, Text("a/b", "d", dataset=dataset), tmp_path / "out")
    assert len(paths) == 1  # the rows of data/my_state.json, which has none, and of train.jsonl
    assert [row.text for row in read_rows(paths)] == ["a"]


@pytest.mark.parametrize("name", ["/nowhere/a.txt", "/", f"/{'a' * 300}.txt", "/a\0b.txt"])
def test_a_local_file_that_this_worker_cannot_read_is_a_sentence(name: str) -> None:
    """A run on a worker is given the whole path: load_recipe has looked on another machine, or not at all."""
    with pytest.raises(RecipeError, match=r"validation\.text: .* cannot be read \(.+\) on this machine"):
        find_text(name, "validation.text")
