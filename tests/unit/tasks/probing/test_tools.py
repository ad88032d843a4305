"""The rows of the probe `tools`, and how answers to them are judged."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest

from requant.tasks.probing.question import Prompt, Reply
from requant.tasks.probing.tools import ROWS, ToolRow, judge_reply, load_rows
from tests.factories.paths import ROOT

ROW = ToolRow(
    id="one",
    category="simple_python",
    messages=({"role": "user", "content": "?"},),
    tools=(
        {
            "name": "math.area",
            "parameters": {
                "type": "object",
                "properties": {
                    "base": {"type": "integer"},
                    "unit": {"type": "string"},
                    "exact": {"type": "boolean"},
                    "sides": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["base"],
            },
        },
    ),
    calls=({"math.area": {"base": [10], "unit": ["New York", ""], "exact": [True, ""], "sides": [[1, 2], ""]}},),
)


def reply(text: str, *, ended: bool = True) -> Reply:
    return Reply((), text, ended, Prompt((), "", 4096))


def call(name: str = "math.area", /, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def example(row: ToolRow) -> str:
    """The expected calls of a row, with the first possible values, as a model would write them."""
    written = []
    for wanted in row.calls:
        ((name, parameters),) = wanted.items()
        values = {k: next((v for v in of if v != ""), "") for k, of in parameters.items() if "" not in of}
        written.append(call(name, **{k: first(value) for k, value in values.items()}))
    return "".join(written)


def first(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: v[0] for k, v in value.items() if isinstance(v, list) and "" not in v}


def test_the_expected_calls_of_every_row_are_right_and_those_of_another_row_are_not() -> None:
    rows = load_rows()
    assert len(rows) == 210 and len({row.id for row in rows}) == 210
    for row, other in itertools.pairwise(rows):
        measures = judge_reply(row, reply(example(row))).measures
        assert all(measures.values()) and measures["tool_calls_right"], row.id
        if row.calls != other.calls:
            assert not judge_reply(row, reply(example(other))).measures["tool_calls_right"], row.id


def test_the_rows_are_small_valid_schemas_and_name_their_origin() -> None:
    assert ROWS.stat().st_size < 400_000
    for row in load_rows():
        for tool in row.tools:
            jsonschema.Draft202012Validator.check_schema(tool["parameters"])
    assert "bfcl-eval" in (ROOT / "NOTICE").read_text()
    assert "bfcl-eval" in (ROWS.parent / "README.md").read_text()


@pytest.mark.parametrize(
    "answer",
    [
        call(base=10),
        call("math_area", base=10),
        call(base=10, unit="new york."),
        call(base=10, exact=True, sides=[1, 2.0]),
        "<tool_call><function=math.area><parameter=base>10</parameter><parameter=exact>True</parameter></function></tool_call>",
        f"<think>\nI call it.\n</think>\n{call(base=10)}",
    ],
)
def test_an_expected_call_is_right(answer: str) -> None:
    assert judge_reply(ROW, reply(answer)).measures == {"tool_calls_valid": True, "tool_calls_right": True}


@pytest.mark.parametrize(
    ("answer", "reason", "valid"),
    [
        (call(base=11), "other arguments, function or number of calls", True),
        (call(base=10) * 2, "other arguments, function or number of calls", True),
        (call(base="10"), "against the schema: type", False),
        (call(unit="New York"), "against the schema: required", False),
        (call(base=10, colour="red"), "unknown parameter", False),
        (call("area_of", base=10), "unknown function", False),
        ("<tool_call>{'name'}", "malformed call", False),
        ("It is 10.", "no call", False),
        (f"<think>{call(base=10)}", "no call", False),
    ],
)
def test_other_answers_say_what_is_wrong(answer: str, reason: str, valid: bool) -> None:
    outcome = judge_reply(ROW, reply(answer))
    assert (outcome.reason, outcome.measures) == (reason, {"tool_calls_valid": valid, "tool_calls_right": False})


@pytest.mark.parametrize(
    ("answer", "ended", "right"), [("None fits.", True, True), (call(base=10), True, False), ("Well", False, False)]
)
def test_where_no_tool_fits_an_answer_without_a_call_is_right(answer: str, ended: bool, right: bool) -> None:
    row = ToolRow(ROW.id, "irrelevance", ROW.messages, ROW.tools, ())
    assert judge_reply(row, reply(answer, ended=ended)).measures == {"tool_calls_right": right}


def test_true_is_not_one() -> None:
    assert not judge_reply(ROW, reply(call(base=10, exact=1))).measures["tool_calls_valid"]
