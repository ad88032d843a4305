"""`--help` of `requant` and of each command: whole lines on a narrow terminal, and examples that are right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from requant.flows.cli.main import cli
from requant.tasks.recipe.loader import load_recipe
from tests.factories.command_lines import check_requant, commands_in, leaf_of
from tests.factories.paths import ROOT

COLUMNS = [80, 120]  # of a terminal
RECIPES = ROOT / "deployments" / "recipes"


def names_of(command: click.Command, *names: str) -> Iterator[tuple[str, ...]]:
    """Yield the names of a command and of each command below it, as they are typed."""
    yield names
    if isinstance(command, click.Group):
        for name, each in command.commands.items():
            yield from names_of(each, *names, name)


def help_of(names: tuple[str, ...], columns: int) -> str:
    """Return what `requant NAMES --help` prints on a terminal of this width."""
    outcome = CliRunner(env={"COLUMNS": str(columns)}).invoke(cli, [*names, "--help"], prog_name="requant")
    assert outcome.exit_code == 0
    return outcome.stdout


def id_of(names: tuple[str, ...]) -> str:
    return "-".join(["requant", *names])


NAMES = list(names_of(cli))
GROUPS = [(), ("store",)]
EVERY = pytest.mark.parametrize("names", NAMES, ids=id_of)
LEAVES = pytest.mark.parametrize("names", [each for each in NAMES if each not in GROUPS], ids=id_of)


@pytest.mark.parametrize("columns", COLUMNS)
@EVERY
def test_every_line_fits_the_terminal(names: tuple[str, ...], columns: int) -> None:
    assert [line for line in help_of(names, columns).splitlines() if len(line) > columns] == []


@pytest.mark.parametrize("columns", COLUMNS)
@EVERY
def test_no_sentence_and_no_default_is_cut(names: tuple[str, ...], columns: int) -> None:
    """Click ends the sentence of a command with dots where it does not fit the list of commands."""
    _, _, text = help_of(names, columns).partition("\n")  # The first line is the usage, which has dots of its own.
    assert "..." not in text
    assert not [line for line in text.splitlines() if line.endswith("[default:")]


@LEAVES
def test_a_help_begins_with_a_sentence_on_one_line(names: tuple[str, ...]) -> None:
    command, _ = leaf_of(list(names))
    first, _, rest = (command.help or "").partition("\n")
    assert first[:1].isupper() and first.endswith(".") and rest.startswith("\n")
    assert f"\n\n  {first}\n\n" in help_of(names, COLUMNS[0])


@LEAVES
def test_every_option_is_explained_by_sentences(names: tuple[str, ...]) -> None:
    command, _ = leaf_of(list(names))
    for option in command.params:
        if isinstance(option, click.Option):
            text = option.help or ""
            assert text[:1].isupper() and text.endswith("."), option.name


@LEAVES
def test_every_example_is_a_command_that_click_can_parse(names: tuple[str, ...]) -> None:
    _, heading, rest = help_of(names, COLUMNS[0]).partition("\n  Examples:\n")
    assert heading
    examples = list(commands_in(rest.partition("\n\n")[0]))
    assert len(examples) >= 2
    for program, *words in examples:
        assert program == "requant" and tuple(words[: len(names)]) == names
        check_requant(words)
        assert all((ROOT / word).exists() for word in words if word.startswith("deployments"))
        overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
        load_recipe(RECIPES / "demo.yaml", overrides)  # which raises RecipeError for a key that no recipe has


def test_an_option_that_does_not_exist_is_noticed_in_an_example() -> None:
    with pytest.raises(click.NoSuchOption):
        check_requant(["run", "recipe.yaml", "--no-such-option"])


@pytest.mark.parametrize("group", GROUPS, ids=id_of)
def test_the_help_lists_the_commands_in_the_order_of_the_readme(group: tuple[str, ...]) -> None:
    _, _, table = (ROOT / "README.md").read_text().partition("| Command | Purpose |")
    _, _, listed = help_of(group, COLUMNS[0]).partition("\nCommands:\n")
    places = [table.index(f"`{' '.join(['requant', *group, line.split()[0]])}") for line in listed.splitlines()]
    assert places and places == sorted(places)
