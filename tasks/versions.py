"""Compare the declared and the installed versions of the packages that shape results.

The process that quantizes imports this module too, so it needs only the standard library.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from pathlib import Path

ABSENT = "absent"


@cache
def _lock() -> dict[str, str]:
    lines = resources.files("requant.tasks").joinpath("lock.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def locked_version(package: str) -> str:
    """Return the declared version of a tool. Stage keys contain it, so all machines compute the same keys."""
    return _lock()[package]


def installed_version(package: str) -> str:
    """Return the installed version of a package; `absent` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


@cache
def source_commit() -> str | None:
    """Return the commit of Requant that runs: of its git checkout, or the one that pip installed.

    A checkout whose files were changed since its commit is said to be so. None if neither is known.
    """
    root = Path(__file__).resolve().parent.parent
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        return f"{commit} with changes" if commit and changed else commit
    try:
        installed = json.loads(metadata.distribution("requant").read_text("direct_url.json") or "{}")
        commit = installed.get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        return None
    return commit if isinstance(commit, str) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None without git, or if it fails."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_problem(stage: str, declared: Mapping[str, str]) -> str | None:
    """Say in one sentence which installed tools differ from the declared versions; None if none does.

    Local version labels are ignored: 5.23.0+cpu is a build of 5.23.0.
    """
    installed = {package: installed_version(package) for package in declared}
    wrong = [package for package, version in declared.items() if installed[package].split("+")[0] != version]
    if not wrong:
        return None
    wanted = " and ".join(f"{package} {declared[package]}" for package in wrong)
    found = " and ".join(f"{p} {installed[p]}" if installed[p] != ABSENT else f"no {p}" for p in wrong)
    packages = " ".join(f"'{package}=={declared[package]}'" for package in wrong)
    return (
        f"stage {stage} needs {wanted}, under which its result would be kept for every machine, and this one has "
        f"{found}: run pip install {packages}"
    )
