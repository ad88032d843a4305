"""The stage `probe` with an engine that is a stand-in: both sides are asked, compared, kept, and explained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from requant.tasks.artifact import File, Manifest, file_of
from requant.tasks.errors import EngineFailed, StoreError
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.probe import no_engine, probe, probe_key, read_probes
from requant.tasks.probing.compare import ProbeSummary, probe_gates
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.recipe.recipe import Benchmark, Recipe
from requant.tasks.record import StageRecord
from requant.tasks.store import Store, open_store
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("REQUANT_STORE", (tmp_path / "store").as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_store()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """REQUANT_VLLM is the stand-in; the folder in which each of its servers leaves its process id."""
    pids = tmp_path / "pids"
    pids.mkdir()
    monkeypatch.setenv("REQUANT_VLLM", f"{sys.executable} {ROOT / 'tests' / 'factories' / 'stand_in_engine.py'}")
    monkeypatch.setenv("ENGINE_PIDS", str(pids))
    return pids


@pytest.fixture
def sides(store: Store, tmp_path: Path) -> tuple[Manifest, Manifest]:
    """A base, and the same with a quantization config: the stand-in looks at nothing else."""
    manifests = []
    for name in ("base", "result"):
        folder = pico_base(tmp_path / name, layers=1)
        if name == "result":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
        files = [file_of(folder, str(path.relative_to(folder))) for path in sorted(folder.iterdir())]
        for file in files:
            store.put_blob(folder / file.path, file)
        manifests.append(Manifest.of(files))
    return manifests[0], manifests[1]


def recipe_of(**probes: object) -> Recipe:
    return parse_recipe({"base": {"repo_id": "a/b"}, "benchmark": {"engine": "vllm"}, "probes": probes})


def servers(engine: Path) -> int:
    """How many servers were started: each signs in with a worker of its own."""
    return sum(path.name.isdecimal() for path in engine.iterdir()) // 2


def measured(store: Store, recipe: Recipe, sides: tuple[Manifest, Manifest]) -> ProbeSummary:
    return read_probes(store, probe(store, recipe, *sides)).summary


def test_a_result_that_answers_as_its_base_passes_every_gate(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest]
) -> None:
    recipe = recipe_of(limit=50)
    found = measured(store, recipe, sides)
    gates = probe_gates(found, recipe.gates.max_probe_loss)
    assert [(gate.name, gate.value) for gate in gates if gate.name != "retrieval"] == [
        ("tool_calls_valid", 0.0), ("tool_calls_right", 0.0), ("answers_finished", 0.0), ("answers_without_loop", 0.0),
    ]  # fmt: skip
    assert all(gate.passed for gate in gates if gate.name != "retrieval")
    assert {one.measure: one.base for one in found.comparisons} == dict.fromkeys((gate.name for gate in gates), 1.0)
    # The stand-in takes 5,000 tokens: there is one length, of too few values to be certain of.
    (retrieval,) = (one for one in found.comparisons if one.measure == "retrieval")
    assert retrieval.questions == 18 and retrieval.not_measured == "the engine takes 5,000 tokens"
    assert [(one.length, one.questions) for one in found.lengths] == [(4096, 18)]
    assert servers(engine) == 2


def test_planted_damage_fails_every_gate_and_says_what_is_wrong(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_DAMAGE", "tools,answers,retrieval")
    recipe = recipe_of(max_tokens=256, limit=20)
    found = measured(store, recipe, sides)
    assert all(gate.failed for gate in probe_gates(found, recipe.gates.max_probe_loss))
    assert {(one.set, one.reason, one.base) for one in found.reasons} == {
        ("tools", "unknown parameter", 0), ("answers", "loop", 0), ("retrieval", "another value of the text", 0),
    }  # fmt: skip


def test_an_engine_that_takes_few_tokens_is_asked_what_fits(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_LENGTH", "1500")
    found = {one.measure: one for one in measured(store, recipe_of(limit=20), sides).comparisons}
    assert 0 < found["tool_calls_right"].questions < 20 and "too long" in found["tool_calls_right"].not_measured
    assert found["answers_finished"].questions == 20 and not found["answers_finished"].not_measured
    assert found["retrieval"].questions == 0 and found["retrieval"].not_measured == "the engine takes 1,500 tokens"


def test_a_base_is_asked_once_for_all_results_and_a_changed_limit_asks_nobody(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest]
) -> None:
    recipe, (base, result) = recipe_of(sets=["answers"], limit=4), sides
    measured(store, recipe, sides)
    assert probe(store, recipe, base, result).state == "reused" and servers(engine) == 2
    other = Manifest.of([*(file for file in result.files if file.path != "preprocessor_config.json")])
    measured(store, recipe, (base, other))
    assert servers(engine) == 3
    changed = recipe.model_copy(update={"gates": recipe.gates.model_copy(update={"max_probe_loss": 0.5})})
    assert probe_key(changed, base, result) == probe_key(recipe, base, result)
    for key, value in {"seed": 1, "limit": 5, "max_tokens": 128, "sets": ["tools"]}.items():
        asked = recipe_of(**{"sets": ["answers"], "limit": 4, key: value})
        assert probe_key(asked, base, result) != probe_key(recipe, base, result), key


def test_a_base_is_asked_again_by_the_engine_that_answers_for_the_result(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, (base, result) = recipe_of(sets=["answers"], limit=2), sides
    probe(store, recipe, base, result)
    monkeypatch.setenv("ENGINE_VERSION", "0.0.2")
    others = [
        Manifest.of(file for file in result.files if file.path != left_out)
        for left_out in ("preprocessor_config.json", "generation_config.json")
    ]
    assert others[0] != others[1] != result
    for number, other in enumerate(others):
        found = read_probes(store, probe(store, recipe, base, other))
        assert found.base.version == found.ours.version == "vLLM 0.0.2"
        assert servers(engine) == 4 + number, "the base is asked once in each version"


def test_another_card_of_the_base_asks_nobody_again(sides: tuple[Manifest, Manifest]) -> None:
    base, result = sides
    others = [file for file in base.files if file.path != "README.md"]
    with_card = Manifest.of([*others, File("README.md", 1, "a" * 64)])
    assert with_card != base and probe_key(recipe_of(), with_card, result) == probe_key(recipe_of(), base, result)


def test_answers_of_another_version_of_requant_are_an_error_in_a_sentence(store: Store, tmp_path: Path) -> None:
    (tmp_path / "probe.json").write_text('{"base": 1}')
    file = file_of(tmp_path, "probe.json")
    store.put_blob(tmp_path / "probe.json", file)
    stage = StageResult("probe", "k", "reused", 0.0, Manifest.of([file]), StageRecord())
    with pytest.raises(StoreError, match=r"probe.json cannot be read \(base: "):
        read_probes(store, stage)


def test_a_base_that_cannot_be_served_is_an_error_that_says_why_and_nothing_is_kept(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_DAMAGE", "start")
    recipe = recipe_of(sets=["answers"], limit=2)
    with pytest.raises(EngineFailed, match="CUDA out of memory"):
        probe(store, recipe, *sides)
    assert store.manifest("probe", probe_key(recipe, *sides)) is None
    monkeypatch.delenv("ENGINE_DAMAGE")
    assert probe(store, recipe, *sides).state == "ran"


@pytest.mark.parametrize(
    ("engine_name", "words"),
    [
        ("url:http://127.0.0.1:8000", "serves the result alone"),
        ("torch", "benchmark.engine is torch"),
        ("none", "benchmark.engine is none"),
        ("auto", "there is none on this machine"),
    ],
)
def test_without_an_engine_that_serves_both_it_says_what_is_missing(
    engine_name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUANT_VLLM", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert words in no_engine(Benchmark(engine=engine_name))


def test_the_bases_flags_have_no_quantization(
    store: Store, engine: Path, sides: tuple[Manifest, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in refuses a flag that it does not know, and it does not know `--quantization`."""
    recipe = parse_recipe({
        "base": {"repo_id": "a/b"}, "benchmark": {"engine": "vllm", "flags": {"quantization": "gptq_marlin"}},
        "probes": {"sets": ["answers"], "limit": 2},
    })  # fmt: skip
    with pytest.raises(EngineFailed, match="quantization"):
        probe(store, recipe, *sides)
    assert servers(engine) == 1
