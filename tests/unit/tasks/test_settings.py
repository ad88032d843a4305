"""The variables of the environment: each is read in one place, and a wrong value is one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from requant.tasks.errors import SECRET_VARIABLES, RecipeError
from requant.tasks.settings import read_settings, rows
from tests.factories.paths import ROOT

SECRET = "sk-AbCdEfGhIjKl"


def test_without_variables_everything_is_as_it_comes() -> None:
    found = read_settings()
    assert found.store is None and found.gpu_gb is None and found.deterministic is False and found.vllm is None


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUANT_STORE", "REQUANT_GPU_GB", "REQUANT_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    assert read_settings() == read_settings().model_copy(update={"store": None, "gpu_gb": None})


def test_what_is_set_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_GPU_GB", "23.5")
    monkeypatch.setenv("REQUANT_DETERMINISTIC", "1")
    monkeypatch.setenv("REQUANT_PROFILE", "/tmp/profile.json")
    found = read_settings()
    assert (found.gpu_gb, found.deterministic, found.profile) == (23.5, True, Path("/tmp/profile.json"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("REQUANT_GPU_GB", "all"), ("REQUANT_GPU_GB", "0"), ("REQUANT_GPU_GB", "nan"), ("REQUANT_DETERMINISTIC", "maybe")],
)
def test_a_value_that_cannot_be_is_one_sentence_with_its_name(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=f"^{name} cannot be used .*: correct or unset it$"):
        read_settings()


def test_a_secret_is_not_shown_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUANT_API_KEY", "REQUANT_WEBHOOK_SECRET"):
        assert name in SECRET_VARIABLES
        monkeypatch.setenv(name, SECRET)
    assert SECRET not in f"{read_settings()!r} {read_settings().model_dump()}"


def test_every_variable_of_ours_that_the_code_names_is_a_setting_with_a_meaning() -> None:
    sources = [path for top in ("flows", "tasks", "infra") for path in (ROOT / top).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"\bREQUANT_[A-Z0-9_]*[A-Z0-9]\b(?!_)", path.read_text())}
    assert named <= {name for name, _ in rows()}


def test_our_variables_are_read_by_settings_alone() -> None:
    for top in ("flows", "tasks"):
        for path in (ROOT / top).rglob("*.py"):
            assert not re.search(r"environ(\.get\(|\[)\s*\"REQUANT_", path.read_text()), path
