"""Record a hash of each module that shapes a stage's result: `python -m infra.dev.stage_hashes`.

A stage key names the version of the stage's code. So whoever changes what a stage makes must raise `STAGE.version`, or
stores keep serving the old result. A test compares the modules with the recorded hashes and asks for that.

The hash covers the syntax tree without docstrings and comments: rewording them asks for nothing.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "tests" / "unit" / "infra" / "dev" / "stage_hashes.json"
COMMAND = "python -m infra.dev.stage_hashes"
# For each stage the modules to start from. The modules below tasks/ that these import, directly or not, are added.
STAGES = {
    "download": ("tasks/download.py",),
    "merge": ("tasks/merge.py",),
    "self_calibration": ("tasks/self_calibration.py",),
    "excerpt": ("tasks/excerpt.py",),
    "quantize": ("tasks/quantize.py",),
    "mtp_fix": ("tasks/mtp_fix.py",),
    "validate": ("tasks/validate.py",),
    "measure": ("tasks/validating/measure.py", "tasks/texts/rendering.py"),
    "noise_floor": ("tasks/validating/noise.py", "tasks/texts/rendering.py"),
    "benchmark": ("tasks/benchmark.py",),
    "acceptance": ("tasks/serving/vllm.py", "tasks/validating/drafts.py"),
    "drafts": ("tasks/serving/drafts.py", "tasks/serving/vllm.py", "tasks/texts/rendering.py"),
    "evaluate": ("tasks/evaluate.py",),
    "probe": ("tasks/probe.py",),
    "probe_answers": ("tasks/probe.py",),
}
# Modules whose own code shapes a stage's result, while most of what they import does not.
WITHOUT_IMPORTS = {
    "measure": ("tasks/evaluation_text.py",),
    "noise_floor": ("tasks/evaluation_text.py",),
    "acceptance": ("tasks/acceptance.py",),
    "drafts": ("tasks/acceptance.py", "tasks/evaluation_text.py"),
}
# Modules and folders that no stage's result depends on, and whose imports are not followed.
SHAPES_NO_RESULT = (
    "tasks/pipeline/",  # keys, leases and records, which are the same for all stages
    "tasks/store/",  # The sha256 of each file proves that the store does not change it.
    "tasks/recipe/",  # The stage key holds the settings of a recipe.
    "tasks/environment.py",
    "tasks/errors.py",
    "tasks/hardware.py",
    "tasks/http.py",
    "tasks/hub/client.py",
    "tasks/hub/sparse_checkout.py",  # It reads headers for a plan.
    "tasks/quantizing/loop/profile.py",
    "tasks/redaction.py",
    "tasks/settings.py",
    "tasks/versions.py",
)


def modules_of(stage: str) -> list[str]:
    """List the modules that shape a stage's result, as paths below the root of the project."""
    pending, modules = list(STAGES[stage]), set[str]()
    while pending:
        module = pending.pop()
        if module not in modules and not module.startswith(SHAPES_NO_RESULT):
            modules.add(module)
            pending += imported_by(ROOT / module)
    return sorted({*modules, *WITHOUT_IMPORTS.get(stage, ())})


@functools.cache
def imported_by(path: Path) -> frozenset[str]:
    """Return the modules below tasks/ that a file imports, also inside functions, or starts as a process by name."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)  # It can be NAME of the command `python -m NAME`.
    ours = (name.removeprefix("requant.") for name in names if name.startswith("requant.tasks."))
    modules = (f"{name.replace('.', '/')}.py" for name in ours)
    return frozenset(module for module in modules if (ROOT / module).is_file())


def hash_of(source: str) -> str:
    """Hash a module's code: two sources that differ in docstrings, comments and layout alone have the same hash."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    dump = ast.dump(tree).replace(", type_params=[]", "")  # a field that Python 3.12 added
    return hashlib.sha256(dump.encode()).hexdigest()[:16]


def hashes() -> dict[str, str]:
    """Hash every module that shapes the result of a stage, by its path."""
    modules = {module for stage in STAGES for module in modules_of(stage)}
    return {module: hash_of((ROOT / module).read_text()) for module in sorted(modules)}


def problems(recorded: Mapping[str, str], current: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each module that has changed since it was recorded, or that was added or removed."""
    for module in sorted({*recorded, *current}):
        if module not in current:
            yield f"{module} shapes no stage's result any more: record that with `{COMMAND}`"
        elif recorded.get(module) != current[module]:
            stages = " or ".join(stage for stage in STAGES if module in modules_of(stage))
            yield (
                f"{module} changed: if the result of the stage {stages} can differ, raise STAGE.version; "
                f"in any case record the new hash with `{COMMAND}`"
            )


def main() -> None:
    """Write the current hashes."""
    RECORD.write_text(json.dumps(hashes(), indent=2) + "\n")


if __name__ == "__main__":
    main()
