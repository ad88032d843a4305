"""Tool calls in the forms of chat templates."""

from __future__ import annotations

import json

import pytest

from requant.tasks.probing.tool_calls import MALFORMED, ToolCall, read_calls

WEATHER = {"city": "Oslo", "days": 3}
TEXT = {"city": "Oslo", "days": "3"}
BODY = json.dumps(WEATHER)
BEGIN, END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"  # noqa: RUF001


@pytest.mark.parametrize(
    ("answer", "as_text"),
    [
        (f'<tool_call>\n{{"name": "weather", "arguments": {BODY}}}\n</tool_call>', False),
        (f'<tool_call>{{"name": "weather", "arguments": {json.dumps(BODY)}}}</tool_call>', False),
        ("<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
         "</function>\n</tool_call>", True),
        ("<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n"
         "<arg_value>3</arg_value>\n</tool_call>", True),
        (f'[TOOL_CALLS] [{{"name": "weather", "arguments": {BODY}}}]', False),
        (f"[TOOL_CALLS]weather[ARGS]{BODY}", False),
        (f'<|python_tag|>{{"name": "weather", "parameters": {BODY}}}', False),
        (f'{{"name": "weather", "parameters": {BODY}}}', False),
        (f'```json\n[{{"name": "weather", "arguments": {BODY}}}]\n```', False),
        (f"{BEGIN}function{SEP}weather\n```json\n{BODY}\n```{END}", False),
        (f"{BEGIN}weather{SEP}{BODY}{END}", False),
        (f"<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{BODY}<|tool_call_end|>", False),
        (f"commentary to=functions.weather <|constrain|>json<|message|>{BODY}", False),
    ],
)  # fmt: skip
def test_each_form_is_read(answer: str, as_text: bool) -> None:
    assert read_calls(answer) == [ToolCall("weather", TEXT if as_text else WEATHER, as_text)]


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Os',
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo",
        "<tool_call>\n",
        "[TOOL_CALLS] [{name: weather}]",
        '{"name": "weather", "parameters": {"city":',
        '{"name": "weather"}; ',
        f"{BEGIN}weather",
    ],
)
def test_a_call_that_is_begun_and_not_well_formed_is_malformed(answer: str) -> None:
    calls = read_calls(answer)
    assert calls and all(call.arguments is None for call in calls)


@pytest.mark.parametrize("answer", ["", "No tool fits.", "A set {1, 2} has a name.", '{"city": "Oslo"}'])
def test_words_are_no_call(answer: str) -> None:
    assert read_calls(answer) == []


def test_several_calls_are_read_in_their_order() -> None:
    one = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
    assert [call.name for call in read_calls(one + "\n" + one.replace('"a"', '"b"'))] == ["a", "b"]
    assert [call.name for call in read_calls('{"name": "a", "parameters": {}}; {"name": "b", "parameters": {}}')] == [
        "a",
        "b",
    ]


def test_a_call_nested_deeper_than_python_goes_is_malformed() -> None:
    assert read_calls('<tool_call>{"name": "a", "arguments": ' + "[" * 100_000) == [MALFORMED]
