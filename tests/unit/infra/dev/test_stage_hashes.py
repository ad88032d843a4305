"""Whoever changes a module that shapes a stage's result is asked for a new version of the stage."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from infra.dev import stage_hashes
from infra.dev.stage_hashes import RECORD, ROOT, SHAPES_NO_RESULT, STAGES, hash_of, hashes, modules_of, problems

SAMPLES = "tasks/quantizing/samples.py"


def test_every_module_that_shapes_a_result_is_as_recorded() -> None:
    found = list(problems(json.loads(RECORD.read_text()), hashes()))
    assert not found, "\n" + "\n".join(found)


def test_a_changed_module_asks_for_the_version_of_its_stage_and_a_new_record() -> None:
    recorded = json.loads(RECORD.read_text())
    changed = (ROOT / SAMPLES).read_text().replace("count - 1", "count")
    assert list(problems(recorded, {**recorded, SAMPLES: hash_of(changed)})) == [
        f"{SAMPLES} changed: if the result of the stage self_calibration or quantize can differ, raise STAGE.version; "
        "in any case record the new hash with `python -m infra.dev.stage_hashes`"
    ]


def test_a_reworded_docstring_or_comment_asks_for_nothing() -> None:
    source = (ROOT / SAMPLES).read_text()
    reworded = re.sub(r'"""(?=[A-Z])', '"""More. ', source).replace("\n\n\n", "\n\n\n# A comment.\n")
    assert reworded != source and hash_of(reworded) == hash_of(source)


def test_a_module_that_came_or_went_is_named() -> None:
    found = list(problems({"tasks/gone.py": "0"}, {SAMPLES: "0"}))
    assert [sentence.split()[0] for sentence in found] == ["tasks/gone.py", SAMPLES]


def test_the_modules_of_a_stage_are_those_that_it_imports_or_runs_as_a_process() -> None:
    modules = modules_of("quantize")
    assert "tasks/quantizing/child.py" in modules and "tasks/texts/rendering_child.py" in modules
    assert "tasks/quantizing/loop/tune.py" in modules
    assert "tasks/evaluate.py" in modules_of("validate") and "tasks/evaluation_text.py" in modules_of("measure")


def test_the_lists_name_what_is_there_and_every_stage() -> None:
    named = [*SHAPES_NO_RESULT, *(start for starts in STAGES.values() for start in starts)]
    assert [name for name in named if not (ROOT / name).exists()] == []
    stages = [line.split('Stage("')[1] for path in (ROOT / "tasks").glob("*.py") for line in lines_with_stage(path)]
    assert {line.split('"')[0] for line in stages} == set(STAGES)


def lines_with_stage(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if 'Stage("' in line]


def test_the_command_writes_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_hashes, "RECORD", tmp_path / "hashes.json")
    stage_hashes.main()
    assert json.loads((tmp_path / "hashes.json").read_text()) == hashes()
