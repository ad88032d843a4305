"""Python files of a base's repo: whatever loads a part of it runs them only where the recipe allows that."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.quantizing import child
from requant.tasks.serving.in_torch import measure_in_torch
from requant.tasks.texts import rendering_child
from requant.tasks.validating import model
from tests.factories.paths import TINY

LOADERS: dict[str, Callable[[Path, bool], object]] = {
    "the tokenizer of chats": rendering_child._tokenizer,
    "the tokenizer of a measurement": lambda folder, allowed: model.load_tokenizer(folder, remote_code=allowed),
    "the model of a measurement": lambda folder, allowed: model.family_of(Checkpoint.open(folder), allowed),
    "the config of quantizing": lambda folder, allowed: child._load_config(folder, allowed),
    "the model of a benchmark": lambda folder, allowed: measure_in_torch(folder, remote_code=allowed),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose config, model and tokenizer are code of its own, which leaves a file behind and fails."""
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'has run')!r}, 'w')\nraise ValueError('own code')\n")
    classes = {
        "config.json": {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForImageTextToText")},
        "tokenizer_config.json": {"AutoTokenizer": ["own.Tokenizer", None]},
    }
    for name, named in classes.items():
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**document, "auto_map": named}))
    return folder


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_code_of_a_base_runs_only_where_it_is_allowed(
    load: Callable[[Path, bool], object], allowed: bool, base: Path, tmp_path: Path
) -> None:
    with contextlib.suppress(Exception):  # whether it can be loaded at all is another question
        load(base, allowed)
    assert (tmp_path / "has run").exists() == allowed
