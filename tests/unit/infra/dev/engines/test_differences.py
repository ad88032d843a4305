"""The nightly comparison finds what a newer engine changed in a table or in code that a rule follows."""

from __future__ import annotations

import json
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from infra.dev.engines import differences
from infra.dev.engines.source import Source
from requant.tasks.checkpoint.compat import VERSIONS, transformers
from tests.factories.paths import ROOT

TABLES = """
Methods = Literal["a", "b"]
KNOWN: dict[str, type] = {"x": X, **MORE}
if is_cuda() or is_xpu():
    KNOWN.update({"on a gpu": X})
if is_npu():
    KNOWN.update({"on an npu": X})
class Config:
    TYPE_MAP = {(4, True): 1, (8, True): 2}
    def read(self):
        '''Read.'''
        return 1  # a comment
"""
AUTO = "transformers/quantizers/auto.py"


def source_of(folder: Path, text: str = TABLES) -> Source:
    (folder / "engine").mkdir(exist_ok=True, parents=True)
    (folder / "engine" / "code.py").write_text(text)
    return Source(folder)


def test_tables_are_read_without_importing_the_engine(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    assert source.table("engine/code.py", "Methods") == {"'a'", "'b'"}
    assert source.table("engine/code.py", "KNOWN") == {"'x'", "**MORE"}
    assert source.table("engine/code.py", "KNOWN", "is_cuda") == {"'x'", "**MORE", "'on a gpu'"}
    assert source.table("engine/code.py", "Config.TYPE_MAP") == {"(4, True)", "(8, True)"}
    assert source.table("engine/code.py", "Gone") is None and source.table("engine/none.py", "Methods") is None


def test_a_function_is_another_one_if_its_code_is_and_not_if_its_words_are(tmp_path: Path) -> None:
    digest = source_of(tmp_path / "a").digest("engine/code.py", "Config.read")
    words = TABLES.replace("Read.", "Read it.").replace("a comment", "another")
    assert source_of(tmp_path / "b", words).digest("engine/code.py", "Config.read") == digest
    code = TABLES.replace("return 1", "return 2")
    assert source_of(tmp_path / "c", code).digest("engine/code.py", "Config.read") not in (digest, None)
    assert source_of(tmp_path / "d").digest("engine/code.py", "Config.write") is None


def test_a_new_method_of_an_engine_is_reported_from_its_wheel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = sorted(transformers.METHODS - {"bitsandbytes"})
    methods = dict.fromkeys([*known[1:], "brand-new"], 0)
    wheel = tmp_path / "transformers-6.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr(AUTO, f"AUTO_QUANTIZER_MAPPING = {methods!r}\n")
    assert differences.main([f"transformers={wheel}"]) == 1
    told = capsys.readouterr().out
    assert "### transformers 6.0.0: 2 differences" in told and VERSIONS["transformers"] in told
    assert "has 'brand-new', which is unknown here" in told and f"has {known[0]!r} no more" in told


def test_a_source_that_cannot_be_had_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert differences.main(["transformers=" + str(tmp_path / "none.whl")]) == 2
    assert differences.main(["llama.cpp=x"]) == 2
    assert capsys.readouterr().out == ""


def test_the_installed_transformers_is_the_one_whose_rules_are_here() -> None:
    """As the tests against vLLM do for vLLM: a new version in constraints.txt has to be looked at."""
    assert version("transformers") == VERSIONS["transformers"]
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None
    assert not list(differences.differences("transformers", Source(Path(spec.origin).parent.parent), {}))


def test_every_function_that_a_rule_follows_is_recorded() -> None:
    recorded = json.loads(differences.RECORD.read_text())
    for engine in differences.FUNCTIONS:
        assert set(recorded[engine]) == {f"{file}:{name}" for file, name in differences.followed(engine)}
        assert None not in recorded[engine].values()


def test_the_nightly_workflow_runs_the_comparison_and_opens_an_issue() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "engines.yaml").read_text())
    steps = "\n".join(step.get("run", "") for step in workflow["jobs"]["differences"]["steps"])
    assert "infra.dev.engines.differences" in steps and "test_rules_of_vllm.py" in steps and "gh issue create" in steps
    assert "schedule" in workflow[True] and workflow["permissions"]["issues"] == "write"


def test_a_changed_draft_model_is_told_by_its_file(tmp_path: Path) -> None:
    record = json.loads(differences.RECORD.read_text())
    for engine in ("vllm", "sglang"):
        files = differences.draft_models(engine)
        assert files and all(record[engine][f"{file}:"] for file in files)
    whole = source_of(tmp_path / "a").digest("engine/code.py", "")
    assert source_of(tmp_path / "b", TABLES.replace("# a comment", "")).digest("engine/code.py", "") == whole
    assert source_of(tmp_path / "c", TABLES + "X = 1\n").digest("engine/code.py", "") != whole
    said = list(differences.differences("vllm", Source(tmp_path), record["vllm"]))
    assert f"`{differences.draft_models('vllm')[0]}` is not there any more" in said
