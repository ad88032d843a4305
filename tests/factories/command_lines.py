"""Command lines of `requant` in texts: taken out of a text, and parsed as click does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from requant.flows.cli.main import cli


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the commands of a block: continued lines are joined, comments and redirections left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if ">" in words:
            words = words[: words.index(">")]
        while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def leaf_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command of `requant` that these words begin with, and the rest of them."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        assert words and words[0] in command.commands, f"requant has no command {' '.join(words[:1])}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def leaves(command: click.Command) -> Iterator[click.Command]:
    """Yield the commands below a group, of its groups too; a command that is no group is yielded itself."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            yield from leaves(each)
    else:
        yield command


def check_requant(words: list[str]) -> None:
    """Parse the arguments of `requant` as click does, but for files that exist on nobody's machine."""
    command, rest = leaf_of(words)
    context = click.Context(command, info_name=command.name, **command.context_settings)
    values, left, _ = command.make_parser(context).parse_args(list(rest))
    assert not left or command.name == "worker", left
    for parameter in command.params:
        value = values.get(parameter.name or "")
        given = isinstance(value, str | tuple | list) and len(value) > 0
        assert not parameter.required or given, f"{command.name} needs {parameter.name}"
        if given and not isinstance(parameter.type, click.Path):
            parameter.type_cast_value(context, value)
