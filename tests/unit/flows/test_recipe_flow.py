"""Flows that get a recipe."""

from __future__ import annotations

import pytest

from requant.flows.recipe_flow import run_name


def test_the_name_of_a_run_has_the_bits_that_override_the_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"base": {"repo_id": "a/b"}, "quantize": {"bits": 8}}
    monkeypatch.setattr("prefect.runtime.flow_run.parameters", {"recipe": given}, raising=False)
    assert run_name() == "b W8A16"
