"""The forms of rows: what is read of each, and which one counts where a row has several."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from requant.tasks.texts.forms import FORMS, Row, explain_unusable, form_of, is_chat, parse_row
from requant.tasks.texts.rows import read_rows

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CHAT = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "be brief"}
SCHEMA = {
    "name": "add",
    "description": "Add",
    "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
}
WRAPPED = {"type": "function", "function": SCHEMA}


def messages(columns: Mapping[str, Any], field: str | None = None) -> list[dict[str, Any]]:
    row = parse_row(columns, field)
    assert row is not None and not row.text
    return [dict(message.fields) for message in row.messages]


READ_AS_CHAT: list[dict[str, Any]] = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"conversation": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "ho"}]},
    {"conversations": CHAT},
    {"messages": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
    {"prompt": "hi", "completion": "ho"},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"prompt": "hi", "response": "ho"},
    {"instruction": "hi", "output": "ho"},
    {"instruction": "hi", "input": "", "output": "ho"},
    {"instruction": "hi", "context": None, "response": "ho"},
    {"question": "hi", "answer": "ho"},
    {"question": "hi", "answers": {"text": ["ho", "hm"], "answer_start": [1, 2]}},
    {"question": "hi", "answers": ["ho"]},
    {"question": "hi", "response": "ho"},
]


@pytest.mark.parametrize("columns", READ_AS_CHAT, ids=lambda columns: " ".join(columns))
def test_every_form_of_a_chat_becomes_its_messages(columns: dict[str, Any]) -> None:
    assert messages(columns) == CHAT and is_chat(columns)
    assert parse_row(columns, chats=False) is None


def test_an_instruction_has_its_input_behind_it() -> None:
    (asked, _) = messages({"instruction": "add", "input": "1 and 2", "output": "3"})
    assert asked["content"] == "add\n\n1 and 2"


def test_of_several_forms_the_first_that_is_filled_counts() -> None:
    """In the order of FORMS: a row that has all of them is a text, and so on as the first ones are emptied."""
    columns: dict[str, Any] = {
        "text": "a", "messages": [{**USER, "content": "m"}], "conversations": [{"from": "human", "value": "c"}],
        "prompt": "p", "completion": "x", "instruction": "i", "output": "x", "question": "q", "answer": "x",
    }  # fmt: skip
    found = []
    for form, parts in FORMS.items():
        assert form_of([name for name, value in columns.items() if value]) == form
        row = parse_row(columns)
        assert row is not None
        found.append(row.text or row.messages[0].text)
        columns[parts[0][0]] = None if form != "messages" else []
    assert found == ["a", "m", "c", "p", "i", "q"]
    assert parse_row(columns) is None and not is_chat(columns)


def test_a_system_prompt_and_tools_beside_a_chat_belong_to_it() -> None:
    row = parse_row({"system": "be brief", "tools": json.dumps([SCHEMA]), "question": "hi", "answer": "ho"})
    assert row is not None and [m.fields for m in row.messages] == [SYSTEM, *CHAT] and row.tools == (WRAPPED,)
    assert messages({"system": "other", "messages": [SYSTEM, *CHAT]}) == [SYSTEM, *CHAT]
    for tools in ([WRAPPED], [SCHEMA], [json.dumps(SCHEMA)], json.dumps([WRAPPED])):
        row = parse_row({"messages": CHAT, "tools": tools})
        assert row is not None and row.tools == (WRAPPED,)
    for tools in (None, "", "[]", []):
        row = parse_row({"messages": CHAT, "tools": tools})
        assert row is not None and row.tools == ()


CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}


def test_tool_calls_have_their_arguments_as_an_object() -> None:
    """Templates of Qwen 3.5 iterate over them, and those of other models write them as JSON."""
    as_text = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}
    for call in (CALL, as_text, {"id": "1", "name": "add", "arguments": '{"a": 1}'}):
        (said,) = messages({"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]})
        assert said == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    talk = [
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "2"},
    ]
    called, told = messages({"conversations": talk})
    assert called["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    assert told == {"role": "tool", "content": "2"}
    (plain,) = messages({"conversations": [{"from": "function_call", "value": "add(1)"}]})
    assert plain == {"role": "assistant", "content": "add(1)"}


def test_what_parquet_adds_to_a_message_is_taken_away_again(tmp_path: Path) -> None:
    """All messages of a column have the same keys, of which a template asks whether they are there."""
    asked = {"role": "user", "content": "hi", "reasoning_content": None, "tool_calls": None}
    called = {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]}
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[asked, called]]}), tmp_path / "a.parquet")
    (row,) = read_rows([tmp_path / "a.parquet"], chats=True)
    assert [dict(m.fields) for m in row.messages] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
    ]


def test_a_column_that_is_named_is_read_whatever_else_there_is() -> None:
    columns = {"text": "a", "essay": "b", "chosen": CHAT, "domain": "prose"}
    assert parse_row(columns, "essay") == Row(text="b", domain="prose")
    assert messages(columns, "chosen") == CHAT and is_chat(columns, "chosen") and not is_chat(columns, "essay")
    assert parse_row(columns, "gone") is None


def test_a_question_without_an_answer_as_in_squad_2_is_passed_over() -> None:
    without = {"question": "hi", "answers": {"text": [], "answer_start": []}}
    assert parse_row(without) is None and not is_chat(without)
    assert messages({**without, "response": "ho"}) == CHAT and is_chat({**without, "response": "ho"})
    assert parse_row({**without, "text": "a"}) == Row(text="a")


BROKEN: dict[str, dict[str, Any]] = {
    "a row has int as text": {"text": 5},
    "a row has list as question": {"question": ["a"], "answer": "b"},
    "messages of a row must be a list": {"messages": "hello"},
    "conversations of a row must be a list": {"conversations": [{"value": "hello"}]},
    "a message is from stranger, and known are human,": {"conversations": [{"from": "stranger", "value": "a"}]},
    "a row has 10,001 messages": {"messages": [USER] * 10_001},
    "tools of a row must be a list of schemas": {"messages": CHAT, "tools": "a calculator"},
    "a row has 1,001 tools": {"messages": CHAT, "tools": [SCHEMA] * 1001},
}


@pytest.mark.parametrize("told", BROKEN)
def test_a_value_of_a_wrong_type_is_told_with_its_column(told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        parse_row(BROKEN[told])


def test_rows_of_an_unknown_form_are_told_by_their_columns_and_with_what_would_do() -> None:
    told = explain_unusable("my text", ["prompt", "chosen"])
    assert told.startswith("the rows of my text have the columns prompt, chosen; a row needs text, messages, ")
    assert "question and answer: name one column with field" in told
    assert "have the columns a, and none is called essay: correct field" in explain_unusable("my text", ["a"], "essay")
    assert "hold nothing in essay" in explain_unusable("my text", ["essay"], "essay")
