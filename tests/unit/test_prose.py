"""What a script can check of how the code reads."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.factories.paths import ROOT

FOLDERS = ("flows", "tasks", "infra", "requant")
MAX_PARAMETERS = 7
# How a noun phrase or a clause begins. A function's docstring begins with an imperative: Return, Read, Raise.
NOT_IMPERATIVE = re.compile(
    r"(the|an?|this|these|those|that|it|its|all|every|each|some|no|none|one|two|several|what|whether|why|how|where|who"
    r"|which|when|of|by|for|with|as|in|on|at|from|into|so|only|\w+s)\b|[^A-Z]",
    re.IGNORECASE,
)
IMPERATIVES_ON_S = {"Process", "Pass", "Express", "Compress", "Address", "Discuss", "Focus", "Access", "Guess", "Miss"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions() -> Iterator[tuple[str, Function]]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, Function):
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def parameters_of(function: Function) -> list[str]:
    arguments = function.args
    return [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def is_property(function: Function) -> bool:
    return any(
        "property" in ast.unparse(decorator) or "computed_field" in ast.unparse(decorator)
        for decorator in function.decorator_list
    )


def test_the_docstring_of_a_function_begins_with_an_imperative() -> None:
    found = []
    for name, function in functions():
        words = (ast.get_docstring(function) or "Return").split()
        if (
            NOT_IMPERATIVE.match(words[0])
            and words[0].rstrip(".,:") not in IMPERATIVES_ON_S
            and not is_property(function)
        ):
            found.append(f"{name}: {' '.join(words[:6])}")
    assert found == []


def test_no_function_has_many_parameters() -> None:
    many = [
        name
        for name, function in functions()
        if len([parameter for parameter in parameters_of(function) if parameter not in {"self", "cls"}])
        > MAX_PARAMETERS
    ]
    assert many == []


@pytest.mark.parametrize("sentence", ["The bytes of a shard.", "Whether it is there.", "Bytes that move.", "`x` is y."])
def test_other_beginnings_are_seen(sentence: str) -> None:
    assert NOT_IMPERATIVE.match(sentence.split()[0])
