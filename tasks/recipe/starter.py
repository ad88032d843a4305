"""The first recipe for a model: the text of a YAML file with the keys that people change, and what the base is."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.untrusted import shown
from requant.tasks.formatting import gigabytes
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.recipe.recipe import Gates

SCHEMA_FILE = "recipe.schema.json"
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]*")  # a name that YAML takes as it is


@dataclass(frozen=True)
class Target:
    """The repo that the recipe publishes to. `unknown` says why its owner is not known; empty if it is."""

    repo_id: str
    unknown: str = ""


def starter_recipe(name: str, sha: str | None, base: Checkpoint, target: Target, *, has_license: bool) -> str:
    """Return the text of a recipe for the base `name`, which is at the commit `sha` now.

    `name` is `repo_id[@revision]`, or the path of a folder (see `path_from`), which has no commit. `base` needs headers
    and configs alone, and `has_license` says whether its card names a license. The recipe leaves out what has a default
    that is rarely changed.
    """
    quantize, gates = Quantize(), Gates()
    written = name if PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {shown(name)}{f' (commit {sha[:8]})' if sha else ''}: {_description(base)}.",
        f"base: {written}",
        *(
            []
            if sha
            else [f"# or, so that the card names what it was tuned from: {{folder: {written}, repo_id: OWNER/NAME}}"]
        ),
        "",
        "quantize:",
        "  scheme: W4A16               # or W2A16, W3A16, W8A16",
        "  group_size: auto            # the largest of 128, 64 and 32 that divides the inputs of all layers",
        f"  iters: {quantize.iters:<20} # tuning steps of each block: 0 rounds only, 1000 is slower and closer",
        f"  calibration: {quantize.calibration!s:<14} # or self (the base writes the text), a Hub data set, a file",
        "",
    ]
    if base.head is not None:
        lines += ["mtp: keep                     # the draft head: keep (bit for bit), int8, int4 or drop", ""]
    if isinstance(base.config.get("auto_map"), dict):
        lines += ["allow_remote_code: false      # true runs the Python files of the base's repo", ""]
    lines += [
        "gates:                        # the result is published only if it passes; null: no limit",
        f"  max_perplexity_increase: {gates.max_perplexity_increase}",
        f"  max_kl_divergence: {gates.max_kl_divergence}     # nats, in each domain of the evaluation text",
        f"  min_top1_agreement: {gates.min_top1_agreement}",
    ]
    if base.head is not None:
        lines.append(f"  min_mtp_acceptance_ratio: {gates.min_mtp_acceptance_ratio}")
    lines += [
        "",
        "benchmark: {engine: auto}     # vllm where it is installed, otherwise torch; or none",
        "",
        *([] if has_license else ["# The base's card names no license: add license: to what is in the braces."]),
        *_publish_lines(target),
    ]
    return "\n".join(lines) + "\n"


def path_from(recipes: Path, folder: Path) -> str:
    """Return the path of a base's folder as a recipe in the folder `recipes` names it. An absolute one stays so.

    A link keeps its name, since it may lead to another folder next week.
    """
    if folder.is_absolute():
        return str(folder)
    lexical = Path(os.path.abspath(folder))
    relative = os.path.relpath(lexical.parent.resolve() / lexical.name, recipes.resolve())
    return relative if relative.startswith(".") else f"./{relative}"


def _publish_lines(target: Target) -> list[str]:
    """Return the section `publish`, as a comment if the owner of the repo is not known."""
    lines = [f"publish: {{repo_id: {target.repo_id}, private: true}}"]
    if not target.unknown:
        return lines
    because = target.unknown[0].upper() + target.unknown[1:]
    return [f"# {because}.", "# To publish, write your account's name and take the # away:", f"# {lines[0]}"]


def _description(base: Checkpoint) -> str:
    """Say what the base is, as `27.8 B parameters in 55.60 GB, with an MTP head`."""
    parameters = sum(math.prod(tensor.shape) for tensor in base.tensors.values())
    parts = [
        *(["a vision tower"] if isinstance(base.config.get("vision_config"), dict) else []),
        *(["experts"] if any(".experts." in name for name in base.tensors) else []),
        *(["an MTP head"] if base.head is not None else []),
    ]
    quantized = f", quantized already ({shown(str(base.quantization.method))})" if base.quantization else ""
    extras = f", with {', '.join(parts[:-1])}{' and ' if parts[:-1] else ''}{parts[-1]}" if parts else ""
    return f"{_count(parameters)} parameters in {gigabytes(base.nbytes)}{extras}{quantized}"


def _count(parameters: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.1f} {name}"
    return f"{parameters:,}"
