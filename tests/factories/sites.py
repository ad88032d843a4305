"""What a Python process finds before its first line: code of a test in place of the program that was started."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from requant.tasks.errors import SECRET_VARIABLES

TELL = "import json, os; json.dump(dict(os.environ), open('environment.json', 'w'))"


def begin_with(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the Python processes that are started from now on run `code` and nothing else."""
    site = folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(textwrap.dedent(code) + "\nimport os\nos._exit(0)\n")
    monkeypatch.setenv("PYTHONPATH", str(site))


def give_secrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a value into every secret variable, and let the processes that are started tell what they were given."""
    for name in SECRET_VARIABLES:
        monkeypatch.setenv(name, f"value of {name}")
    begin_with(TELL, folder, monkeypatch)


def secrets_given(folder: Path) -> list[str]:
    """The secrets that the process had which was started in `folder`."""
    values = set(json.loads((folder / "environment.json").read_text()).values())
    return [name for name in SECRET_VARIABLES if f"value of {name}" in values]
