"""What is said of a repo names the repo and its files, and never the temporary folder that they were fetched into."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.flows import api
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.errors import RequantError
from requant.tasks.recipe.recipe import Recipe
from tests.factories.hub_cache import cached_repo, switch_hub_off
from tests.factories.pico import pico_base


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def remove_weights(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a config that is cut off": lambda folder: (folder / "config.json").write_text("{"),
    "a config that is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "a config that says nothing": lambda folder: (folder / "config.json").write_text("{}"),
    "an index that is cut off": lambda folder: (folder / INDEX).write_text("{"),
    "an index of nothing": lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'),
    "no weights": remove_weights,
    "an empty shard": lambda folder: first_shard(folder).write_bytes(b""),
    "a shard that is cut off": lambda folder: first_shard(folder).write_bytes(first_shard(folder).read_bytes()[:-9]),
    "a shard that is none": lambda folder: first_shard(folder).write_bytes(b"\xff" * 99),
    "a pointer of LFS": lambda folder: first_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_temporary_folder_is_in_a_sentence_about_a_repo(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    base, sound = pico_base(tmp_path / "base"), pico_base(tmp_path / "sound")
    DAMAGE[damage](base)
    cached_repo(tmp_path / "cache", base)
    switch_hub_off(monkeypatch, tmp_path / "cache")
    recipe = Recipe.model_validate({"base": {"repo_id": "a/b"}})
    said = [
        saying(lambda: api.inspect("a/b").problems),
        saying(lambda: api.mtp_fix(sound, base="a/b")),
        saying(lambda: api.plan(recipe).problems),
    ]
    assert all(said), "each of them says something"
    assert not [sentence for sentence in said if str(temporary) in sentence or "requant-" in sentence]


def saying(call: Callable[[], object]) -> str:
    """Return all that a call says, as a result or as an error that is expected."""
    try:
        return str(call())
    except RequantError as error:
        return str(error)
