"""Which commit of Requant runs."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from requant.tasks import versions
from requant.tasks.versions import source_commit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def at(monkeypatch: pytest.MonkeyPatch, root: Path) -> str | None:
    """The commit if Requant lay in this folder."""
    monkeypatch.setattr(versions, "__file__", str(root / "tasks" / "versions.py"))
    return source_commit.__wrapped__()


def test_a_checkout_has_its_commit_and_says_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=me", "-c", "user.email=me@localhost", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "-A")
    git("commit", "-m", "first")
    (tmp_path / "notes").write_text("a file that git does not know")
    assert at(monkeypatch, tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("b")
    assert at(monkeypatch, tmp_path) == f"{git('rev-parse', 'HEAD')} with changes"


@pytest.mark.parametrize(
    ("direct_url", "commit"),
    [
        (json.dumps({"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}), COMMIT),
        (json.dumps({"url": "file:///x", "dir_info": {}}), None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_an_installed_package_has_the_commit_that_pip_noted(
    direct_url: str | None, commit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "requant-0.1.0.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: requant\nVersion: 0.1.0\n")
    if direct_url is not None:
        (site / "direct_url.json").write_text(direct_url)
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(site))
    assert at(monkeypatch, tmp_path) == commit
