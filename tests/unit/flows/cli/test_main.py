"""What every command of `requant` refuses before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from requant.flows.cli.main import cli


@pytest.mark.parametrize("arguments", [["run", "--report"], ["run", "--checkout"], ["plan", "--markdown"]])
def test_a_place_below_a_file_is_refused_before_any_work(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome = CliRunner().invoke(cli, [*arguments, str(tmp_path / "file" / "new" / "x"), "recipe.yaml"])
    assert outcome.exit_code == 2 and f"{tmp_path / 'file'} is a file, and no folder" in outcome.output
