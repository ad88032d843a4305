"""Read a recipe from a YAML file and overrides, and say in a sentence each what is wrong with it."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from requant.tasks.errors import RecipeError
from requant.tasks.recipe.base_section import FOLDER_BEGINS, Base
from requant.tasks.recipe.quantize_section import (
    LIST_TAG,
    NAME_TAG,
    READABLE,
    SOURCE_TAG,
    CalibrationSetting,
    Output,
    Quantize,
    Source,
)
from requant.tasks.recipe.recipe import (
    DOMAINS_TAG,
    NOT_YAML,
    Benchmark,
    Eval,
    Gates,
    Hardware,
    Probes,
    Publish,
    Recipe,
    Validation,
)

# What pydantic puts between the keys of a location.
NO_KEYS = {
    "function-after[a_folder_has_no_revision(), function-before[written_as_a_name(), Base]]",
    "function-after[possible(), Quantize]",
    NAME_TAG,
    SOURCE_TAG,
    LIST_TAG,
    DOMAINS_TAG,
}

# A model in place of a recipe's file. Such a name with the end of a YAML file is a path with a typing error.
BASE_NAME = re.compile(r"(?!.*\.ya?ml$)[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}(@.{1,255})?")
SAME_WORD = 0.8  # of difflib: as like a key as that with a typing error
MAX_PROBLEMS = 20  # A recipe from outside may have any number.
log = logging.getLogger(__name__)


def load_recipe(given: str | Path, overrides: Sequence[str] = (), *, elsewhere: bool = False) -> Recipe:
    """Read the recipe file `given` and apply `overrides`, each `a.b=c` with a YAML value.

    `owner/name[@revision]` of a base, unless it is the path of a file, and a folder with a base stand for a recipe with
    this base and defaults. Paths in a recipe become absolute: they are relative to the folder of the recipe. With
    `elsewhere`, the recipe is for another machine, and this one need not have what they name.

    Raises RecipeError with a sentence for each problem: the file or key, the value and what is allowed.
    """
    path = Path(given)
    # As text, ./a/b is the path of a folder that is not there, and no repo.
    named = BASE_NAME.fullmatch(str(given)) is not None and not path.exists()
    is_folder = os.path.isdir(path)
    if is_folder and (found := _recipe_in(path)) is not None:
        raise RecipeError(f"{given} is a folder of recipes, and no model: name one of them, as {found}", path=path)
    document: dict[str, Any] = (
        {"base": {"folder": str(path)}} if is_folder else {"base": str(path)} if named else _read(given)
    )
    for override in overrides:
        _override(document, override)
    folder = Path.cwd() if named or is_folder else path.parent
    return with_absolute_paths(parse_recipe(document), folder, elsewhere=elsewhere)


def _read(given: str | Path) -> dict[str, Any]:
    """Read the mapping in a recipe file. Raises RecipeError."""
    path = Path(given)
    if not os.path.lexists(path):
        raise RecipeError(
            f"{given} does not exist: name the YAML file of a recipe, a model as owner/name, or a model's folder",
            path=path,
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(f"the recipe {path} cannot be read ({reason})", path=path) from error
    try:
        document = yaml.safe_load(text)
    except NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise RecipeError(f"the recipe {path} is not YAML ({problem}{where})", path=path) from error
    if not isinstance(document, dict):
        raise RecipeError(f"the recipe {path} is not a mapping: it needs at least base: owner/name", path=path)
    if document and not any(map(_resembles_a_key, document)):
        raise RecipeError(f"{path} is no recipe: it has none of its keys, as base: owner/name", path=path)
    return document


def _resembles_a_key(name: Any) -> bool:
    """Check whether a name is a key of a recipe, or may be meant as one."""
    text = str(name)
    return bool(places_of(text) or difflib.get_close_matches(text, Recipe.model_fields, 1, SAME_WORD))


def _recipe_in(folder: Path) -> Path | None:
    """Return the first recipe of a folder that holds no model; None if there is no recipe, or a model."""
    if any(folder.glob("*.safetensors")) or (folder / "config.json").exists():
        return None
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        with contextlib.suppress(RecipeError):
            if "base" in _read(path):
                return path
    return None


def with_absolute_paths(recipe: Recipe, folder: Path, *, elsewhere: bool = False) -> Recipe:
    """Make the names of the folders of base and adapter, of text files and of task definitions absolute.

    They are relative to this folder, so that a recipe means the same wherever it is sent on this machine.

    Raises RecipeError if one of them does not exist, unless the recipe is for a machine `elsewhere`.
    """
    recipe = _with_folder(_with_folder(recipe, folder, "base"), folder, "adapter")
    recipe = _with_calibration_files(recipe, folder)
    recipe = _with_validation_files(recipe, folder)
    recipe = _with_definitions(recipe, folder)
    if not elsewhere and (missing := next(missing_paths(recipe), None)):
        raise RecipeError(
            f"{missing.key}: the {missing.kind} {missing.path} does not exist: correct the path in the recipe",
            path=missing.path,
        )
    return recipe


@dataclass(frozen=True)
class MissingPath:
    """A file or folder that a recipe names and this machine lacks: its key, `file` or `folder`, and its path."""

    key: str
    kind: str
    path: Path


def missing_paths(recipe: Recipe) -> Iterator[MissingPath]:
    """Yield what a recipe with absolute paths names and this machine lacks."""
    folders = {"base.folder": recipe.base.folder}
    folders["adapter.folder"] = recipe.adapter.folder if recipe.adapter is not None else None
    folders["eval.definitions"] = recipe.eval.definitions if recipe.eval is not None else None
    for key, folder in folders.items():
        if folder is not None and not os.path.isdir(folder):
            yield MissingPath(key, "folder", Path(folder))
    asked, key = recipe.quantize.calibration, "quantize.calibration"
    entries = {f"{key}.{n}": one for n, one in enumerate(asked)} if isinstance(asked, list) else {key: asked}
    texts = [(k, one) if isinstance(one, str) else (f"{k}.source", one.source) for k, one in entries.items()]
    given = recipe.validation.text
    domains = (
        {"validation.text": given} if isinstance(given, str) else {f"validation.text.{k}": v for k, v in given.items()}
    )
    for key, name in (*texts, *domains.items()):
        if _is_local(name) and not os.path.exists(name):  # Path.exists raises for a name that is too long.
            yield MissingPath(key, "file", Path(name))


def parse_recipe(document: Mapping[str, Any]) -> Recipe:
    """Validate a recipe given as a mapping. Raises RecipeError with a sentence for each problem."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    problems = _with_unknown_keys_at_once(problems)
    # A key whose value may have several types has a problem for each of them.
    sentences = list({_location(problem): _sentence(problem) for problem in reversed(problems)}.values())[::-1]
    if len(sentences) == 1:
        raise RecipeError(sentences[0])
    more = [f"and {len(sentences) - MAX_PROBLEMS} more"] if len(sentences) > MAX_PROBLEMS else []
    lines = [f"the recipe has {len(sentences)} problems:", *sentences[:MAX_PROBLEMS], *more]
    raise RecipeError("\n- ".join(lines))


def recipe_of(given: Recipe | Mapping[str, Any]) -> Recipe:
    """Return the recipe in a flow's parameters, where Prefect passes it as JSON. Raises RecipeError."""
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, Mapping):
        raise RecipeError(f"the recipe {_short(given)} is not a mapping: it needs at least base: owner/name")
    return parse_recipe(given)


def _with_folder(recipe: Recipe, folder: Path, key: Literal["base", "adapter"]) -> Recipe:
    named = recipe.base if key == "base" else recipe.adapter
    if named is None or named.folder is None:
        if named is not None and os.path.isdir(folder / named.name):
            log.warning(
                f"{key}: {named.name} is taken as a repo of the Hub; for the folder of this name beside the recipe, "
                f"write ./{named.name}"
            )
        return recipe
    path = Path(named.folder)
    # A link keeps its name, which is that of the base, whichever folder it leads to now.
    path = (
        _absolute(folder, str(path.parent)) / path.name if path.name not in {"", ".."} else _absolute(folder, str(path))
    )
    return recipe.model_copy(update={key: named.model_copy(update={"folder": str(path)})})


def _with_validation_files(recipe: Recipe, folder: Path) -> Recipe:
    """Replace the names of local files and folders of `validation.text` by absolute paths."""
    given = recipe.validation.text
    found: str | dict[str, str]
    if isinstance(given, str):
        found = _text_path(given, folder)
    else:
        found = {domain: _text_path(name, folder) for domain, name in given.items()}
    if found == given:
        return recipe
    return recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"text": found})})


def _with_calibration_files(recipe: Recipe, folder: Path) -> Recipe:
    """Replace the names of local calibration files and folders by absolute paths."""

    def absolute(given: str | Source) -> str | Source:
        if isinstance(given, str):
            return _text_path(given, folder)
        return given.model_copy(update={"source": _text_path(given.source, folder)})

    given = recipe.quantize.calibration
    found: CalibrationSetting = [absolute(one) for one in given] if isinstance(given, list) else absolute(given)
    if found == given:
        return recipe
    return recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"calibration": found})})


def _text_path(name: str, folder: Path) -> str:
    """Return the absolute path of a local text file or folder, and all other names of texts as they are."""
    path = _absolute(folder, name) if _is_local(name) else Path(name)
    return str(path) if path.is_absolute() else name


def _is_local(text: str) -> bool:
    """Check whether the name of a text is a path, and not that of a built-in text or a data set."""
    return not text.startswith("builtin:") and (text.endswith(READABLE) or text.startswith(FOLDER_BEGINS))


def _with_definitions(recipe: Recipe, folder: Path) -> Recipe:
    if recipe.eval is None or recipe.eval.definitions is None:
        return recipe
    path = _absolute(folder, recipe.eval.definitions)
    if recipe.eval.allow_code is None:
        log.warning(
            "allow_remote_code allows eval.definitions, and also the Python of the base: where the tasks alone need "
            "it, write allow_code: true in eval instead"
        )
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"definitions": str(path)})})


def _absolute(folder: Path, name: str) -> Path:
    """Resolve a path that a recipe in this folder names."""
    try:
        return (folder / Path(name).expanduser()).resolve()
    except (RuntimeError, ValueError):  # The user after ~ does not exist, or the name has a NUL.
        return Path(name)


def _override(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"the override {override!r} is not KEY=VALUE: write for instance quantize.iters=50")
    try:
        parsed = yaml.safe_load(value)
    except NOT_YAML as error:
        raise RecipeError(f"the override of {key}: the value {value!r} is not YAML") from error
    *path, last = key.strip().split(".")
    part: Any = document
    for name in path:
        if isinstance(part, list) and name.isdecimal() and int(name) < len(part):
            part = part[int(name)]
        else:
            part = part.setdefault(name, {}) if isinstance(part, dict) else None
        if part is None:
            raise RecipeError(f"the override of {key}: {name} is not a group of keys")
    if not isinstance(part, dict):
        raise RecipeError(f"the override of {key}: {path[-1]} is not a group of keys")
    part[last] = parsed


def _sentence(problem: ErrorDetails) -> str:
    """Say a problem of a validation in one sentence: the key, the value and what is allowed."""
    location = list(_location(problem))
    key = _printable(".".join(location))
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        if close := _meant(location):
            return f"{key} is not a key of a recipe: did you mean {' or '.join(close)}?"
        others: list[str] = problem["ctx"]["others"]
        listed = [*map(_printable, others[:MAX_PROBLEMS]), *(["others"] if len(others) > MAX_PROBLEMS else [])]
        nor = f", nor {'is' if len(others) == 1 else 'are'} {', '.join(listed)}" if others else ""
        return f"{key} is not a key of a recipe{nor}: allowed are {', '.join(_keys_at(location[:-1]))}"
    if kind == "missing":
        return f"{key} is missing: {'every recipe needs it' if location[0] == 'base' else 'add it'}"
    if kind == "value_error":
        named = f"{key}: " if key else ""
        return f"{named}{problem['ctx']['error']}" + (f", not {_short(value)}" if not isinstance(value, dict) else "")
    allowed = problem["msg"][0].lower() + problem["msg"][1:]
    if kind == "string_pattern_mismatch" and location[-1] == "repo_id":
        allowed = "write a repo as owner/name"
    return f"{key}: {_short(value)} is not allowed: {allowed}"


def _with_unknown_keys_at_once(problems: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Return the problems with one for all keys of a section that are unknown and like no other: the first of them.

    Its context names the others, so that what is allowed stands in one sentence.
    """
    first, left = dict[tuple[str, ...], ErrorDetails](), list[ErrorDetails]()
    for problem in problems:
        location = _location(problem)
        if problem["type"] != "extra_forbidden" or _meant(location):
            left.append(problem)
        elif (known := first.get(location[:-1])) is not None:
            known["ctx"]["others"].append(location[-1])
        else:
            first[location[:-1]] = {**problem, "ctx": {"others": list[str]()}}
            left.append(first[location[:-1]])
    return left


def _meant(location: Sequence[str]) -> list[str]:
    """Return the keys that an unknown key may be meant as."""
    return places_of(location[-1]) or difflib.get_close_matches(location[-1], _keys_at(location[:-1]), 1)


def _location(problem: ErrorDetails) -> tuple[str, ...]:
    """Return the keys that lead to a problem, without what pydantic puts between them: the types of a union."""
    location = [str(part) for part in problem["loc"] if part not in NO_KEYS]
    if problem["type"] in {"extra_forbidden", "missing"}:
        return tuple(location)
    return tuple(p for p in location if p in _all_keys() or p == location[0] or p.isdecimal())


def _printable(key: str) -> str:
    """Make a key safe to print, whatever it contains: short and without control characters."""
    return key if key.isprintable() and len(key) <= 120 else reprlib.repr(key)


def _short(value: Any) -> str:
    short = reprlib.Repr()
    short.maxlevel = short.maxlist = short.maxdict = 2
    short.maxstring = 120
    return short.repr(value)


def _keys_at(location: Sequence[str]) -> list[str]:
    model: Any = Recipe
    for name in location:
        if name.isdecimal():  # an index into a list
            continue
        model = next(_sections_in(model.model_fields[name].annotation))
    keys = list(model.model_fields)
    return [*keys, "preset"] if model is Quantize else keys


def places_of(key: str) -> list[str]:
    """Return the full names of the keys of sections that have this name, as `quantize.iters` for `iters`."""
    sections = (name for name, field in Recipe.model_fields.items() if any(_sections_in(field.annotation)))
    return [f"{name}.{key}" for name in sections if name != "outputs" and key in _keys_at((name,))]


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a key's type allows, for instance one of them or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)


def _all_keys() -> set[str]:
    sections = (
        Recipe, Base, Quantize, Source, Validation, Gates, Eval, Benchmark, Probes, Publish, Hardware, Output,
    )  # fmt: skip
    return {name for section in sections for name in section.model_fields}
