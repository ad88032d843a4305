"""Compare the declared and the installed versions of the packages that shape results.

The process that quantizes imports this module too, so it needs only the standard library.
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
    """Return the declared version of a tool. Stage keys contain it, so all machines compute the same keys."""
    return _lock()[package]


def installed_version(package: str) -> str:
    """Return the installed version of a package; `absent` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


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
