"""The package as others install it: built from its source distribution, and used in a folder full of its names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import requant
from tests.factories.paths import ROOT

LICENSES = ("LICENSE", "NOTICE")
NO_CACHES = shutil.ignore_patterns("__pycache__")
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for top in ("deployments", "flows", "tasks")
    for path in (ROOT / top).rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A source distribution of the checkout, and a wheel that was built from it."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    source.mkdir()
    for name in ("requant", "deployments", "flows", "tasks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=NO_CACHES)
    for name in ("pyproject.toml", "README.md", *LICENSES):
        shutil.copy(ROOT / name, source)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=source, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(archive)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return {"sdist": archive, "wheel": wheel}


def files_of(distribution: Path) -> set[str]:
    if distribution.suffix == ".whl":
        with zipfile.ZipFile(distribution) as wheel:
            return {name for name in wheel.namelist() if ".dist-info/" not in name}
    with tarfile.open(distribution) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_a_distribution_holds_every_file_of_the_linked_folders_and_nothing_outside_of_the_package(
    kind: str, distributions: dict[str, Path]
) -> None:
    held = files_of(distributions[kind])
    ours = {f"requant/{path}" for path in SOURCES}
    assert {"requant/__init__.py", "requant/py.typed", *ours} <= held
    if kind == "wheel":
        assert {name.split("/")[0] for name in held} == {"requant"}


def test_the_wheel_works_in_a_folder_that_has_flows_and_tasks_of_its_own(
    distributions: dict[str, Path], tmp_path: Path
) -> None:
    """Every Prefect project has a folder flows/, and a tasks.py is what invoke and Celery ask for."""
    site, project = tmp_path / "site", tmp_path / "project"
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        wheel.extractall(site)
    (project / "flows").mkdir(parents=True)
    for name in ("flows/__init__.py", "tasks.py"):
        (project / name).write_text("raise AssertionError('the module of a user is imported')\n")
    checkpoint = ROOT / "infra" / "dev" / "models" / "tiny-qwen3_5-mtp"
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(site), "HF_ENDPOINT": "http://127.0.0.1:9",
    }  # fmt: skip

    def run(*arguments: str, status: int = 0) -> str:
        command = [sys.executable, "-m", "requant", *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout

    where = "import requant.tasks.errors as e; print(e.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=project, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(site)
    assert run("--version").split()[-1] == requant.__version__
    assert '"vllm"' in run("inspect", str(checkpoint), "--json")
    run("deploy", "--example", "mine")  # The files of Requant's own deployments are in the wheel.
    assert "1 checked, 0 started, 1 problem" in run("watch", "--once", "--recipes", "mine/recipes", status=1)
