"""The files of a Hub data set's configurations and splits, found as the library `datasets` finds them.

Source: datasets 4.0.0, data_files.py and utils/metadata.py (its patterns of names, the key `configs` of a card). A data
set's code is never run. What differs: without a card's `configs`, a configuration is a folder of the repo; and without
a name of a split, the split `train` is read if there is one.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import yaml

from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.recipe.recipe import NOT_YAML

FRONT_MATTER = re.compile(r"---\r?\n(.{0,262144}?)\r?\n---", re.DOTALL)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\b.*")
# Words of a folder's or file's name that tell its split, and what separates them from other words.
SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "dev": "validation",
    "val": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SEPARATORS = re.compile(r"[-._ 0-9]+")
TRAIN = "train"
MAX_SHOWN_NAMES = 20
MAX_PATTERNS = 1000


@dataclass(frozen=True)
class Config:
    """A configuration of a card. patterns: of its files in `folder`, by split; folder: where its files lie."""

    name: str
    default: bool = False
    patterns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    folder: str = ""


@dataclass(frozen=True)
class DatasetCard:
    """What the card of a data set says that matters here."""

    license: str | None = None
    configs: tuple[Config, ...] = ()


def read_card(text: str) -> DatasetCard:
    """Read the front matter of a card. What a stranger wrote in another form than expected is left out."""
    match = FRONT_MATTER.match(text)
    try:
        document = yaml.safe_load(match[1]) if match else None
    except NOT_YAML:
        document = None
    if not isinstance(document, dict):
        return DatasetCard()
    given, listed = document.get("license"), document.get("configs")
    first = given[0] if isinstance(given, list) and given else given
    license_id = first if isinstance(first, str) and LICENSE.fullmatch(first) else None
    rows = listed if isinstance(listed, list) else []
    return DatasetCard(license_id, tuple(config for row in rows if (config := _config(row)) is not None))


def _config(row: object) -> Config | None:
    if not isinstance(row, dict) or not isinstance(name := row.get("config_name"), str):
        return None
    folder = row.get("data_dir")
    return Config(
        name,
        default=row.get("default") is True or name == "default",
        patterns=_patterns(row.get("data_files")),
        folder=folder.strip("./") if isinstance(folder, str) else "",
    )


def _patterns(given: object) -> dict[str, list[str]]:
    """Return the patterns of a configuration's files by split."""
    if isinstance(given, dict):
        entries = [(split, paths) for split, paths in given.items()]
    else:
        rows = given if isinstance(given, list) else [given]
        entries = [(row.get("split"), row.get("path")) if isinstance(row, dict) else (TRAIN, row) for row in rows]
    found: dict[str, list[str]] = {}
    for split, paths in entries[:MAX_PATTERNS]:
        listed = paths if isinstance(paths, list) else [paths]
        patterns = [path.removeprefix("./") for path in listed if isinstance(path, str)]
        if isinstance(split, str) and patterns:
            found.setdefault(split, []).extend(patterns[:MAX_PATTERNS])
    return found


def choose_files(paths: Sequence[str], card: DatasetCard, wanted: Sequence[str]) -> list[str]:
    """Choose the data files of a configuration and split among the `paths` of a repo's data files.

    `wanted` has what stands behind the colons of a data set's name: configuration, split, or one of them; an empty name
    leaves the choice open. Raises ValueError with a part of a sentence if there is no such choice.
    """
    first, second = [*wanted, "", ""][:2]
    configs = _splits_by_config(paths, card)
    if first in configs or second:
        config, split = first, second
    else:
        config, split = "", first  # one name alone may be a split
    if config and config not in configs:
        raise ValueError(f"has no configuration {shown(config)}: {_there_are('configurations', configs)}")
    if split and not second and not _has_default(card):
        raise ValueError(f"has no {shown(split)}: {_there_are('configurations', configs)}")
    splits = configs[config] if config else _default_splits(paths, card, configs)
    if split and split not in splits:
        among = f"{_there_are('configurations', configs)}, and " if first and not second and configs else ""
        raise ValueError(f"has no {shown(split)}: {among}{_there_are('splits', splits)}")
    if split:
        return splits[split]
    return splits[TRAIN] if TRAIN in splits else [path for files in splits.values() for path in files]


def _splits_by_config(paths: Sequence[str], card: DatasetCard) -> dict[str, dict[str, list[str]]]:
    """Return the files of each configuration by split. Without any in the card, each folder is a configuration."""
    if not card.configs:
        folders = dict.fromkeys(path.split("/")[0] for path in paths if "/" in path)
        return {folder: by_split([p for p in paths if p.startswith(f"{folder}/")]) for folder in folders}
    found = {}
    for config in card.configs:
        inside = [path for path in paths if not config.folder or path.startswith(f"{config.folder}/")]
        if config.patterns:
            found[config.name] = {
                split: _matching(inside, patterns, config.folder) for split, patterns in config.patterns.items()
            }
        else:
            found[config.name] = by_split(inside)
    return found


def _default_splits(
    paths: Sequence[str], card: DatasetCard, configs: Mapping[str, dict[str, list[str]]]
) -> dict[str, list[str]]:
    """Return the splits of the configuration that is read if no one is named. Raises ValueError if it is open."""
    if not card.configs:
        return by_split(paths)
    if not _has_default(card):
        raise ValueError(f"has no default configuration: add :NAME to it; {_there_are('configurations', configs)}")
    return configs[next((config.name for config in card.configs if config.default), card.configs[0].name)]


def _has_default(card: DatasetCard) -> bool:
    """Check whether one configuration is read if none is named."""
    return len(card.configs) < 2 or any(config.default for config in card.configs)


def by_split(paths: Sequence[str]) -> dict[str, list[str]]:
    """Tell the splits of files by their names: of shards, else of folders, else of files. Without any, all is train."""
    for split_of in (_split_of_shard, _split_of_folders, _split_of_file):
        found: dict[str, list[str]] = {}
        for path in paths:
            if (split := split_of(PurePosixPath(path))) is not None:
                found.setdefault(split, []).append(path)
        if found:
            return found
    return {TRAIN: list(paths)}


def _split_of_shard(path: PurePosixPath) -> str | None:
    match = SHARD.fullmatch(path.name) if path.parent.name == "data" else None
    return match[1] if match else None


def _split_of_folders(path: PurePosixPath) -> str | None:
    return next((split for part in path.parts[:-1] if (split := _split_in(part)) is not None), None)


def _split_of_file(path: PurePosixPath) -> str | None:
    return _split_in(path.name)


def _split_in(name: str) -> str | None:
    """Return the split that a word of a name tells; None if none does."""
    return next((SPLIT_WORDS[word] for word in SEPARATORS.split(name) if word in SPLIT_WORDS), None)


def _matching(paths: Sequence[str], patterns: Sequence[str], folder: str) -> list[str]:
    """Return the paths that match a pattern below a folder."""
    below = f"{folder}/" if folder else ""
    return [path for path in paths if any(matches(path.removeprefix(below), pattern) for pattern in patterns)]


def matches(path: str, pattern: str) -> bool:
    """Check whether a path matches a pattern in which * stands for a part of a name and ** for any folders.

    Time follows the product of the numbers of folders: a pattern of a stranger cannot make it long.
    """
    names, reached = path.split("/"), {0}  # how many names the parts of the pattern so far may cover
    parts = pattern.split("/")
    for number, part in enumerate(parts):
        if part == "**":
            first = min(reached, default=len(names) + 1)
            reached = set(range(first, len(names) + 1))
            if number == len(parts) - 1:
                reached.discard(first)  # it covers a name at least
        else:
            fits = {n for n in reached if n < len(names) and fnmatch.fnmatchcase(names[n], part)}
            reached = {n + 1 for n in fits}
    return len(names) in reached


def _there_are(kind: str, names: Iterable[str]) -> str:
    listed = list(names)
    if not listed:
        return f"it has no {kind}"
    more = f" and {len(listed) - MAX_SHOWN_NAMES} more" if len(listed) > MAX_SHOWN_NAMES else ""
    return f"its {kind} are {', '.join(shown(name) for name in listed[:MAX_SHOWN_NAMES])}{more}"
