"""Write the reference pages that follow from the code: `python -m infra.dev.docs`.

The pages are files of the project and not made while the site is built: so a reader on the forge sees them, a change of
an option or a default shows in the diff of a review, and the site needs no torch and no Prefect to be built. A test
compares them with the code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from requant.flows.cli.main import cli
from requant.tasks.recipe.quantize import PRESETS
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.settings import rows

FOLDER = Path(__file__).parent.parent.parent / "docs" / "reference"
MADE = "\n<!-- Made from the code by `python -m infra.dev.docs`: change it there. -->\n"
COMMANDS = """# Commands

`requant COMMAND --help`, or `-h`, prints the same. Every command but `worker` and `webhook` takes `--json`: see
[JSON documents](json.md). Exit status: 0 done, 1 a gate failed or the work failed, 2 wrong usage or recipe,
130 interrupted.
"""
RECIPE = """# Recipe keys

A recipe is a YAML file with these keys. [Write a recipe](../how-to/recipe.md) shows one with all groups and explains
calibration texts, FP8 and mixture-of-experts bases.
"""
PRESET_TEXT = """
`quantize.preset` and `outputs[].preset` stand for these keys. Keys that are given beside a preset win.

"""
WIDTH = 80  # characters, which fit the column of the site; otherwise click takes the width of the terminal at hand
Schema = Mapping[str, Any]


def command_pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """Yield the help of a command and of all commands below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            each = command.get_command(context, sub)
            if each is not None:
                yield from command_pages(each, sub, context)
        return
    without_help = copy.copy(command)
    without_help.add_help_option = False  # click keeps how --help was spelled when a command was first asked for it
    help_text = "\n".join(line.rstrip() for line in without_help.get_help(context).splitlines())
    yield f"\n## {context.command_path}\n\n```text\n{help_text}\n```\n"


def commands_page() -> str:
    """Return the page of the command line."""
    return COMMANDS + MADE + "".join(command_pages(cli, "requant"))


def recipe_page() -> str:
    """Return the page of the recipe's keys, from the JSON schema that Prefect's form is made of too."""
    schema = Recipe.model_json_schema()
    groups: dict[str, Schema] = {"": schema}
    for name, field in schema["properties"].items():
        section = _section(field, schema["$defs"])
        if section is not None:
            groups[f"{name}[]" if field.get("type") == "array" else name] = section
    parts = [RECIPE, MADE]
    for name, group in groups.items():
        title = name or "Top level"
        text = "" if not name else f"\n{_cell(group['description'])}\n"
        parts.append(f"\n## {title}\n{text}\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n")
        required = group.get("required", [])
        parts += [_row(key, field, key in required, schema["$defs"]) for key, field in group["properties"].items()]
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    heads = ["", *(f"`{key}`" for key in keys)]
    parts.append(f"\n## Presets\n{PRESET_TEXT}| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for name, preset in PRESETS.items():
        cells = [f"`{preset[key]}`" if key in preset else "" for key in keys]
        parts.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return "".join(parts)


def settings_page() -> str:
    """Return the page of the settings, whose table of our own variables follows from the code."""
    before, heading, rest = (FOLDER / "settings.md").read_text().partition("\n## Requant\n")
    _, next_heading, after = rest.partition("\n## ")
    table = "".join(f"| `{name}` | {_cell(meaning)} |\n" for name, meaning in rows())
    return f"{before}{heading}{MADE}\n| Variable | Meaning |\n|---|---|\n{table}{next_heading}{after}"


def _section(field: Schema, definitions: Schema) -> Schema | None:
    """Return the group of keys that a key holds, or that each entry of its list is; None for a single value."""
    choices = [field, *field.get("anyOf", []), *([field["items"]] if "items" in field else [])]
    names = [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]
    found: Schema | None = definitions[names[0]] if names else None
    return found


def _row(key: str, field: Schema, required: bool, definitions: Schema) -> str:
    """Return the row of one key."""
    section = _section(field, definitions)
    meaning = field.get("description", "")
    if section is not None:
        kind = f"a list of [{key}[]](#{key})" if field.get("type") == "array" else f"[{key}](#{key})"
        meaning = meaning or section["description"]
    else:
        kind = _type(field)
    default = "required" if required else _default(field, section)
    return f"| `{key}` | {kind} | {default} | {_cell(meaning)} |\n"


def _default(field: Schema, section: Schema | None) -> str:
    """Say what a key is if a recipe leaves it out."""
    value = field.get("default")
    if section is not None and isinstance(value, dict):
        return "its defaults"
    if section is not None and value is None:
        return "absent"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _type(field: Schema) -> str:
    """Say which values a key takes."""
    if "anyOf" in field:
        *others, last = (_type(choice) for choice in field["anyOf"])
        return f"{', '.join(others)} or {last}"
    if "enum" in field:
        return ", ".join(f"`{_yaml(value)}`" for value in field["enum"])
    if "const" in field:
        return f"`{_yaml(field['const'])}`"
    kind = str(field.get("type", "any"))
    if kind == "array":
        items = field["items"]
        return f"a list: {_type(items)}" if "enum" in items else f"a list of {_type(items)}s"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum")
    words = {"object": "mapping", "string": "text", "null": "`null`", "boolean": "`true`, `false`"}.get(kind, kind)
    if low is None or high is None:
        return words if low is None else f"{words}, at least {low}"
    return f"{words}, {'above ' if 'exclusiveMinimum' in field else ''}{low} to {high}"


def _yaml(value: Any) -> str:
    """Write a value as a recipe does."""
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    """Return a description as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"commands.md": commands_page, "recipe.md": recipe_page, "settings.md": settings_page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
