"""Rows of texts: what is read of a file, and in which sentence it is told that nothing can be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.texts.forms import FORM_WORDS, Message, plain_chat
from requant.tasks.texts.rows import columns_of, lists_of, needs_template, read_rows

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def jsonl(folder: Path, *rows: Any) -> str:
    return write(folder, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def refused(path: str, *, chats: bool = False) -> str:
    """The sentence for a file that cannot be used."""
    with pytest.raises(RecipeError) as caught:
        list(read_rows([path], "my text", chats=chats))
    (line,) = str(caught.value).splitlines()
    return line


def test_documents_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    rows = '{"text": "ä", "id": 1}\n\n{"text": "b"}\n'
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["e", "ü"]}), tmp_path / "d.parquet")
    paths = [write(tmp_path, "a.txt", "one\n\ntwo"), write(tmp_path, "b.jsonl", rows), write(tmp_path, "c.json", rows)]
    found = [row.text for row in read_rows([*paths, str(tmp_path / "d.parquet")])]
    assert found == [
        "one\n\ntwo",
        "ä",
        "b",
        "ä",
        "b",
        "e",
        "ü",
    ]


def test_rows_of_messages_are_read_where_chats_are_asked_for(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a"}, {"messages": CHAT, "domain": "chat"}, {"text": "b", "messages": CHAT})
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT, None], "n": [1, 2]}), tmp_path / "a.parquet")
    rows = list(read_rows([path, str(tmp_path / "a.parquet")], chats=True))
    assert [(row.text, [message.fields for message in row.messages], row.domain) for row in rows] == [
        ("a", [], ""), ("", CHAT, "chat"), ("b", [], ""), ("", CHAT, ""),
    ]  # fmt: skip
    assert [row.text for row in read_rows([path])] == ["a", "b"]
    assert rows[1].characters == 4


def test_rows_that_have_neither_are_told_by_their_columns(tmp_path: Path) -> None:
    expected = (
        f"the rows of my text have the columns prompt, answer; a row needs {FORM_WORDS}: "
        "name one column with field, rename a column, or name another text"
    )
    assert refused(jsonl(tmp_path, {"prompt": "a", "answer": "b"})) == expected
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": ["b"]}), tmp_path / "a.parquet")
    assert refused(str(tmp_path / "a.parquet"), chats=True) == expected


def test_columns_that_would_move_the_cursor_are_escaped_and_a_thousand_are_counted(tmp_path: Path) -> None:
    told = refused(jsonl(tmp_path, {f"\x1b[2J{n}": n for n in range(1000)}))
    assert told.isprintable() and "and 980 more" in told and len(told) < 1000


def test_rows_with_nothing_in_their_text_are_told_so(tmp_path: Path) -> None:
    assert "hold nothing in text: name" in refused(jsonl(tmp_path, {"text": ""}, {"text": None}))
    assert refused(write(tmp_path, "a.txt", "")) == f"my text is empty: name a text with rows of {FORM_WORDS}"


BROKEN = {
    "no JSON": "{",
    "no object": "[1, 2]",
    "a text that is a number": '{"text": 5}',
    "nested beyond all bounds": '{"text": ' + "[" * 100_000,
    "messages that are a word": '{"messages": "hello"}',
    "a message without a role": '{"messages": [{"content": "hello"}]}',
    "too many messages": json.dumps({"messages": [{"role": "user"}] * 10_001}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_read_is_a_sentence(content: str, tmp_path: Path) -> None:
    assert "my text cannot be read" in refused(write(tmp_path, "a.jsonl", content), chats=True)


def test_what_is_no_parquet_and_what_is_no_utf_8_is_a_sentence(tmp_path: Path) -> None:
    assert "my text cannot be read" in refused(write(tmp_path, "a.parquet", "PAR1 and no more"))
    for content, found in {
        b"\xff\xfex\0": "the mark of UTF-16",
        "caf\u00e9 au".encode("latin-1"): "a byte 0xe9",
    }.items():
        (tmp_path / "b.txt").write_bytes(content)
        told = refused(str(tmp_path / "b.txt"))
        assert told.startswith(f"my text cannot be read (it is not UTF-8: found {found}): save it as UTF-8, or")


def test_a_file_is_known_to_need_a_chat_template_by_its_rows(tmp_path: Path) -> None:
    assert needs_template([jsonl(tmp_path, {"text": "a"}, {"messages": CHAT})])
    assert not needs_template([jsonl(tmp_path, {"text": 'a word: "messages"', "messages": CHAT})])
    assert not needs_template([write(tmp_path, "a.jsonl", '{"messages": [')])
    assert not needs_template([write(tmp_path, "a.txt", '{"messages": [1]}')])


@pytest.mark.parametrize("compress", [".gz", ".zst"])
def test_chats_in_a_compressed_file_are_known_too(compress: str, tmp_path: Path) -> None:
    plain = Path(jsonl(tmp_path, {"messages": CHAT})).read_bytes()
    path = tmp_path / f"chats.jsonl{compress}"
    path.write_bytes(gzip.compress(plain) if compress == ".gz" else pyarrow.compress(plain, "zstd", asbytes=True))
    assert needs_template([path]) and needs_template([path], "messages") and not needs_template([path], "text")
    (row,) = read_rows([path], chats=True)
    assert [message.text for message in row.messages] == ["hi", "ho"]


@pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list, lambda value: pyarrow.list_(value, 2)])
def test_a_column_of_a_parquet_file_is_a_list_in_every_layout_of_arrow(kind: Any, tmp_path: Path) -> None:
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    table = pyarrow.table({"talk": pyarrow.array([CHAT], kind(message)), "id": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert lists_of(b"", (tmp_path / "a.parquet").read_bytes(), ".parquet") == ("talk",)


def test_the_columns_of_a_file_are_known_from_its_ends(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"messages": [CHAT], "n": [1]}), tmp_path / "a.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    assert columns_of(b"", raw[-len(raw) + 8 :], ".parquet") == ("messages", "n")
    assert columns_of(b'\n{"a": 1, "b": 2}\n{"c": ', b"", ".jsonl") == ("a", "b")
    assert columns_of(b'{"a": "cut', b"", ".jsonl") == columns_of(b"", b"no parquet", ".parquet") == ()


@pytest.mark.parametrize("indent", [None, 2])
def test_the_columns_of_a_list_are_those_of_its_first_row(indent: int | None) -> None:
    rows = json.dumps([{"messages": CHAT, "id": 'a "text" {'}, {"words": 1}], indent=indent).encode()
    assert columns_of(rows, b"", ".json") == ("messages", "id")
    second = rows.index(b'"words"')
    assert columns_of(rows[:second], b"", ".json") == ("messages", "id")
    assert columns_of(rows[:60], b"", ".json") == ()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_that_is_longer_than_what_is_read_still_names_its_first_columns(name: str) -> None:
    row = json.dumps(
        {"id": {"messages": [1, "}"]}, "messages": [{"role": "user", "content": 'ä\\" ' * 99}], "text": ""}
    )
    head = (f"[\n {row}" if name == "a.json" else row).encode()[:200]
    suffix = name[1:]
    assert columns_of(head, b"", suffix) == ()
    assert columns_of(head, b"", suffix, cut=True) == ("id", "messages")
    # Of a row that is cut before its text, nothing is said that would refuse it.
    assert columns_of(b'[{"id": 1, "prompt": "ab', b"", ".json", cut=True) == ()
    assert columns_of(b"{{{[]", b"", suffix, cut=True) == columns_of(b"", b"", suffix, cut=True) == ()


def test_messages_that_were_not_taken_for_chats_are_told_so(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "", "messages": CHAT})
    assert refused(path) == (
        "the rows of my text (columns text, messages) hold no text, and their messages are not read: a data set has "
        "chats if the first row of its first file has messages and no text column: mend that row, or "
        "name another text"
    )
    assert "hold nothing in messages: name" in refused(jsonl(tmp_path, {"messages": []}))


def test_a_chat_without_a_template_is_role_and_content() -> None:
    parts = [{"type": "text", "text": "look"}, {"type": "image"}]
    messages = [*CHAT, {"role": "user", "content": parts}, {"role": "tool", "content": None}]
    assert plain_chat([*map(Message, messages)]) == "user: hi\n\nassistant: ho\n\nuser: look\n\ntool: "


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_an_emoji_is_replaced_in_every_string_of_a_row(name: str, tmp_path: Path) -> None:
    """JSON can escape it, for instance where a string was cut, and no file and no tokenizer takes it."""
    tools = json.dumps([{"name": "look \ud83d"}])
    rows = [
        {"text": "cut \ud83d", "domain": "a\ude00", "\ud83d": 1},
        {"text": "whole \U0001f600"},
        {"messages": [{"role": "user", "content": "hi \ude00"}], "tools": tools},
    ]
    path = write(tmp_path, name, json.dumps(rows) if name == "rows.json" else "\n".join(map(json.dumps, rows)))
    cut, whole, chat = read_rows([path], chats=True)
    assert (cut.text, cut.domain, whole.text) == ("cut \ufffd", "a\ufffd", "whole \U0001f600")
    assert chat.messages[0].text == "hi \ufffd" and chat.tools[0]["function"] == {"name": "look \ufffd"}
