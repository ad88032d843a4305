"""The first recipe of a model that huggingface_hub's cache has, while the Hub is switched off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from requant.flows.cli.main import cli
from requant.tasks.errors import CheckpointError
from requant.tasks.recipe.loader import load_recipe
from tests.factories.hub_cache import cached_repo, switch_hub_off
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base")


@pytest.fixture
def snapshot(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base in the cache, and the Hub switched off."""
    switch_hub_off(monkeypatch, tmp_path / "cache")
    return cached_repo(tmp_path / "cache", base)


def init(folder: Path) -> Result:
    return CliRunner().invoke(cli, ["init", "a/b", "--recipe", str(folder / "new" / "b.yaml")])


@pytest.mark.usefixtures("snapshot")
def test_a_recipe_is_written_for_a_model_of_the_cache(tmp_path: Path) -> None:
    assert init(tmp_path).exit_code == 0
    recipe = load_recipe(tmp_path / "new" / "b.yaml")
    assert recipe.base.repo_id == "a/b" and recipe.publish is None, "whose account it is, only the Hub knows"


def no_config(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()


def broken_config(snapshot: Path) -> None:
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text("{")


def broken_shard(snapshot: Path) -> None:
    shard = min(snapshot.glob("*.safetensors"))
    size = shard.stat().st_size
    shard.unlink()
    shard.write_bytes(b"\1" * size)


@pytest.mark.parametrize(
    ("breaks", "names"),
    [
        (no_config, "config.json is missing"),
        (broken_config, "config.json"),
        (broken_shard, ".safetensors"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused_without_a_file(
    snapshot: Path, tmp_path: Path, breaks: Callable[[Path], None], names: str
) -> None:
    breaks(snapshot)
    error = init(tmp_path).exception
    assert isinstance(error, CheckpointError) and names in str(error)
    assert "/requant-" not in str(error) and is_one_sentence(str(error))
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("snapshot")
def test_a_recipe_is_written_for_a_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base.rename(tmp_path / "my tuné")
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(cli, ["init", "./my tuné", "--json"])
    assert outcome.exit_code == 0, outcome.output
    recipe = load_recipe(tmp_path / "my-tune.yaml")
    assert recipe.base.folder == str(folder)
    assert "me/my-tune-W4A16" not in (text := (tmp_path / "my-tune.yaml").read_text()) and "YOU/my-tune-W4A16" in text


@pytest.mark.usefixtures("snapshot")
def test_a_folder_that_is_no_checkpoint_gets_no_recipe(base: Path, tmp_path: Path) -> None:
    no_config(base)
    error = CliRunner().invoke(cli, ["init", str(base), "--recipe", str(tmp_path / "new" / "b.yaml")]).exception
    assert isinstance(error, CheckpointError) and "config.json is missing" in str(error)
    assert not (tmp_path / "new").exists()
