"""The order in which the folders of the project import each other, and what the command line leaves unimported."""

from __future__ import annotations

import ast
import graphlib
import itertools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories.paths import ROOT
from tests.factories.pico import pico_base

STAGES = {
    "download", "merge", "quantize", "mtp_fix", "validate", "evaluate", "benchmark", "acceptance", "probe", "publish",
    "plan",
}  # fmt: skip
SOURCES = sorted(path.relative_to(ROOT) for top in ("flows", "tasks") for path in (ROOT / top).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(("requant", *path.with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, also inside of functions, with the line."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield node.lineno, full if full in MODULES else node.module


def part_of(path: Path) -> str:
    """Name the folder of a file. Each file at the root of tasks/ is a part of its own; those of flows/ are one."""
    if len(path.parts) > 2:
        return "/".join(path.parts[:2])
    return str(path) if path.parts[0] == "tasks" else path.parts[0]


def edges() -> Iterator[tuple[Path, int, Path]]:
    for path in SOURCES:
        for line, name in imports(path):
            if name in MODULES:
                yield path, line, MODULES[name]


def test_no_two_folders_import_each_other_not_even_by_way_of_others() -> None:
    graph = defaultdict[str, set[str]](set)
    where = dict[tuple[str, str], str]()
    for path, line, imported in edges():
        importer, part = part_of(path), part_of(imported)
        if part != importer:
            graph[importer].add(part)
            where.setdefault((importer, part), f"{path}:{line}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = error.args[1]
        pytest.fail("\n".join(f"{where[b, a]}: {b} imports {a}" for a, b in itertools.pairwise(cycle)))


def test_a_library_imports_no_stage() -> None:
    upward = [
        f"{path}:{line}: {imported}"
        for path, line, imported in edges()
        if len(imported.parts) == 2 and imported.parts[0] == "tasks" and imported.stem in STAGES
        if path.parts[0] == "tasks" and not (len(path.parts) == 2 and path.stem in STAGES)
    ]
    assert not upward, upward


@pytest.mark.parametrize(
    ("importer", "forbidden"),
    [("tasks", "requant.flows"), ("tasks", "prefect.flow"), ("flows", "infra"), ("tasks", "infra"), ("", "tests")],
)
def test_nothing_below_imports_what_is_above(importer: str, forbidden: str) -> None:
    for path in SOURCES:
        if importer in ("", path.parts[0]):
            for line, name in imports(path):
                assert name != forbidden and not name.startswith(f"{forbidden}."), f"{path}:{line}: {name}"


def test_a_stage_knows_nothing_of_prefect() -> None:
    """A plan imports the stages. `flows/stages.py` makes tasks of them."""
    knowing = {str(path) for path in SOURCES for _, name in imports(path) if name.split(".")[0] == "prefect"}
    of_stages = {path for path in knowing if path.startswith("tasks/")}
    assert of_stages == {"tasks/pipeline/log.py", "tasks/pipeline/prefect.py"}
    importers = {str(path) for path, _, imported in edges() if str(imported) == "tasks/pipeline/prefect.py"}
    assert importers and all(path.startswith("flows/") for path in importers), importers


@pytest.mark.parametrize("top", ["flows", "tasks", "infra", "tests"])
def test_our_modules_are_imported_under_the_name_of_the_package(top: str) -> None:
    """Otherwise one file would be two modules, and a `tasks.py` of the user's could take the place of ours."""
    for path in sorted((ROOT / top).rglob("*.py")):
        for line, name in imports(path):
            assert name.split(".")[0] not in {"flows", "tasks"}, f"{path}:{line}: {name}"


HEAVY = {"torch", "prefect", "transformers", "matplotlib", "httpx", "pydantic", "yaml", "rich"}
OF_A_RUN = {"torch", "prefect", "transformers", "matplotlib", "pyarrow", "boto3", "jsonschema", "jinja2", "lm_eval"}
CODE = """
import sys
from requant.flows.cli.main import cli
try:
    cli(sys.argv[2:], standalone_mode=False)
except (SystemExit, OSError, RuntimeError, ValueError):
    pass
print([name for name in sys.argv[1].split() if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("command", "forbidden"),
    [
        (["inspect", "--help"], HEAVY),
        (["plan", "missing.yaml"], OF_A_RUN | {"requant.tasks.plan"}),
        (["plan", "base/model"], OF_A_RUN),  # as far as the Hub, which does not answer
        (["inspect", "model"], OF_A_RUN | {"huggingface_hub"}),
        (["store", "ls"], OF_A_RUN),
        (["init", "base/model"], OF_A_RUN),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_imports_nothing_heavy_without_need(command: list[str], forbidden: set[str], tmp_path: Path) -> None:
    pico_base(tmp_path / "model", layers=1)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "REQUANT_STORE": str(tmp_path / "store"), "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", CODE, " ".join(sorted(forbidden)), *command]
    done = subprocess.run(
        arguments, cwd=tmp_path, env={**os.environ, **nowhere}, capture_output=True, text=True, check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_flow_of_a_run_imports_no_stage_that_it_may_reuse_and_no_flow_that_it_does_not_run() -> None:
    code = "import sys, requant.flows.requantize; print([name for name in sys.argv[1:] if name in sys.modules])"
    forbidden = ["torch", "transformers", "accelerate", "matplotlib", "prefect.server", "requant.flows.gpu_pool"]
    done = subprocess.run(
        [sys.executable, "-c", code, *forbidden], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
