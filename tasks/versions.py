"""The packages that shape results: which versions are declared, which are installed, and whether they agree.

Imported by the process that quantizes too: it needs the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources

ABSENT = "absent"


@cache
def _lock() -> dict[str, str]:
    lines = resources.files("requant.tasks").joinpath("lock.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def locked_version(package: str) -> str:
    """Look up the declared version of a tool. Stage keys are made of it, so that all machines compute the same key."""
    return _lock()[package]


def installed_version(package: str) -> str:
    """Look up the version that is installed here; `absent` if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def version_problem(stage: str, declared: Mapping[str, str]) -> str | None:
    """Say in one sentence which installed tools differ from the declared versions; None if none does.

    A local version label is no difference: 5.23.0+cpu is a build of 5.23.0.
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
