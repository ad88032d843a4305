"""Write the reference pages that are made from the code: `python -m infra.dev.docs`.

The pages are committed, and not made when the site is built. So they can be read in the repository, a review shows
changes of options and defaults, and building the site needs neither torch nor Prefect. A test compares them with the
code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from requant.flows.cli.main import cli
from requant.tasks.checkpoint.compat.sglang import VERSION as SGLANG
from requant.tasks.checkpoint.compat.vllm import VERSION as VLLM
from requant.tasks.checkpoint.heads.drafters import ARCHITECTURES as DRAFTER_ARCHITECTURES
from requant.tasks.checkpoint.heads.layout import HeadLayout
from requant.tasks.checkpoint.heads.layouts import LAYOUTS
from requant.tasks.recipe.quantize_section import PRESETS
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.settings import rows

FOLDER = Path(__file__).parent.parent.parent / "docs" / "reference"
GENERATED_NOTE = "\n<!-- Made from the code by `python -m infra.dev.docs`: change it there. -->\n"
COMMANDS = """# Commands

`requant COMMAND --help`, or `-h`, prints the same. Every command but `worker` and `webhook` takes `--json`: see
[JSON documents](json.md). Exit status: 0 done, 1 a gate failed or the work failed, 2 wrong usage or recipe,
130 interrupted.
"""
RECIPE = """# Recipe keys

A recipe is a YAML file with these keys. [Write a recipe](../how-to/recipe.md) shows one with all groups and explains
calibration texts, FP8 and mixture-of-experts bases.
"""
HEADS = """# MTP heads

A Multi-Token-Prediction head is a small model that drafts tokens which the large one checks. Each family stores it in
its own way. Requant finds a head by the names of its tensors and never takes it for a decoder block; `mtp: keep` copies
it bit for bit.

- Names are without what comes before them, such as `model.` or `language_model.model.`; `*` is a number, and `layers.*`
  are decoder layers behind the last one of the model.
- An engine does not draft for an architecture that it has no draft model for. That is no problem of the checkpoint.
- Every other tensor below a name that begins with `mtp` or `nextn`, and every other layer behind the last one, is a
  head of the layout `unknown`. It is kept as it is, nothing is said to be missing, and nothing is refused: whether an
  engine drafts with it is not judged.
- `validate` runs heads of the layout `mtp`, and of `inlined` for DeepSeek and GLM. The draft acceptance rate of others
  is not measured in torch.
"""
DRAFTERS = """
## Draft models in repos of their own

Engines load these beside their base. `requant inspect` names them, judges nothing about them, and calls nothing in them
broken. They are no bases: `requant plan` refuses them.

"""
PRESET_MEANING = "Stands for several keys of this section: see [Presets](#presets)"
PRESET_TEXT = """
`quantize.preset` and `outputs[].preset` stand for these keys. Keys that are given beside a preset win.

"""
WIDTH_CHARACTERS = 80  # fit the column of the site; by default, click uses the width of the terminal
Schema = Mapping[str, Any]


def command_pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """Yield the help of a command and of all commands below it."""
    settings = {**command.context_settings, "terminal_width": WIDTH_CHARACTERS}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    if isinstance(command, click.Group):
        for sub_name in command.list_commands(context):
            sub_command = command.get_command(context, sub_name)
            if sub_command is not None:
                yield from command_pages(sub_command, sub_name, context)
        return
    without_help = copy.copy(command)
    without_help.add_help_option = False  # click caches that option with the spelling of its first use
    help_text = "\n".join(line.rstrip() for line in without_help.get_help(context).splitlines())
    yield f"\n## {context.command_path}\n\n```text\n{help_text}\n```\n"


def commands_page() -> str:
    """Return the page of the command line."""
    return COMMANDS + GENERATED_NOTE + "".join(command_pages(cli, "requant"))


def recipe_page() -> str:
    """Return the page of the recipe's keys, from the JSON schema that Prefect's form uses too."""
    schema = Recipe.model_json_schema()
    groups: dict[str, Schema] = {"": schema}
    for name, field in schema["properties"].items():
        section = _section(field, schema["$defs"])
        if section is not None:
            # What two keys have in common says nothing of the second one, which has a description of its own.
            described = {**section, "description": field["description"]} if section in groups.values() else section
            groups[f"{name}[]" if field.get("type") == "array" else name] = described
    parts = [RECIPE, GENERATED_NOTE]
    for name, group in groups.items():
        title = name or "Top level"
        text = "" if not name else f"\n{_cell(group['description'])}\n"
        parts.append(f"\n## {title}\n{text}\n| Key | Type | Default | Meaning |\n|---|---|---|---|\n")
        required = group.get("required", [])
        parts += [_row(key, field, key in required, schema["$defs"]) for key, field in group["properties"].items()]
        for pattern, field in group.get("patternProperties", {}).items():  # a key that is no field: `preset`
            parts.append(f"| `{pattern.strip('^$')}` | {_type(field)} | absent | {PRESET_MEANING} |\n")
    keys = list(dict.fromkeys(key for preset in PRESETS.values() for key in preset))
    heads = ["", *(f"`{key}`" for key in keys)]
    parts.append(f"\n## Presets\n{PRESET_TEXT}| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    for name, preset in PRESETS.items():
        cells = [f"`{preset[key]}`" if key in preset else "" for key in keys]
        parts.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return "".join(parts)


def settings_page() -> str:
    """Return the page of the settings, with a new table of Requant's own variables."""
    before, heading, rest = (FOLDER / "settings.md").read_text().partition("\n## Requant\n")
    _, next_heading, after = rest.partition("\n## ")
    table = "".join(f"| `{name}` | {_cell(meaning)} |\n" for name, meaning in rows())
    return f"{before}{heading}{GENERATED_NOTE}\n| Variable | Meaning |\n|---|---|\n{table}{next_heading}{after}"


def _pattern(layout: HeadLayout) -> str:
    keys = " or ".join(f"`{key}`" for key in layout.patterns)
    return f"as many as {keys} has entries" if keys else ""


def heads_page() -> str:
    """Return the page of the layouts of MTP heads, from the table of layouts."""
    parts = [HEADS, GENERATED_NOTE, f"\nFrom vLLM {VLLM} and SGLang {SGLANG}.\n"]
    for layout in LAYOUTS:
        parts.append(f"\n## {layout.name}\n\n{', '.join(layout.families)}.\n\n| | |\n|---|---|\n")
        rows = {
            "Layers": f"`{layout.layers}`" if layout.layers else "one, without a number",
            "A complete head has": _names(layout.modules),
            "Taken from the main model": _names(layout.shared),
            "Layers counted by": _names(layout.counts) or "nothing: engines build one",
            "Layers of one draft": _pattern(layout),
        }
        for engine, drafter in layout.engines.items():
            models = _names(sorted({*drafter.architectures, *drafter.model_types}))
            by = "" if layout.method == "mtp" else f" by the method `{layout.method}`"
            rows[f"`{engine}` drafts{by} for"] = f"{models} ({drafter.source})"
        parts += [f"| {title} | {text} |\n" for title, text in rows.items() if text]
    parts.append(f"{DRAFTERS}| Kind | Values of `architectures` |\n|---|---|\n")
    parts += [f"| {kind} | {_names(sorted(names))} |\n" for kind, names in DRAFTER_ARCHITECTURES.items()]
    return "".join(parts)


def _names(names: Iterable[str]) -> str:
    return ", ".join(" or ".join(f"`{spelling}`" for spelling in name.split("|")) for name in names)


def _section(field: Schema, definitions: Schema) -> Schema | None:
    """Return the schema of a key's value, or of each entry of its list, if that is a group of keys."""
    choices = [field, *field.get("anyOf", []), *([field["items"]] if "items" in field else [])]
    names = [choice["$ref"].rpartition("/")[2] for choice in choices if "$ref" in choice]
    section: Schema | None = definitions[names[0]] if names else None
    return section


def _row(key: str, field: Schema, required: bool, definitions: Schema) -> str:
    """Return the table row of one key."""
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
    """Return the value of a key that a recipe leaves out."""
    value = field.get("default")
    if section is not None and isinstance(value, dict):
        return "its defaults"
    if section is not None and value is None:
        return "absent"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def _type(field: Schema) -> str:
    """Return the values that a key takes, in words."""
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
    """Return a description as a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"commands.md": commands_page, "recipe.md": recipe_page, "settings.md": settings_page, "heads.md": heads_page}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())


if __name__ == "__main__":
    main()
