"""What would stop a run is found at once, by one function: the plan lists it, and a run stops with all of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from requant.tasks import hardware
from requant.tasks.artifact import Manifest
from requant.tasks.errors import HubUnavailable, Refused
from requant.tasks.hardware import Gpu
from requant.tasks.hub.revision import Revision
from requant.tasks.plan import plan_of, preflight
from requant.tasks.planning import machine
from requant.tasks.planning.document import PlanDocument
from requant.tasks.planning.inputs import Inputs
from requant.tasks.planning.machine import Here
from requant.tasks.quantize import quantize_key
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from tests.factories.pico import pico_base
from tests.factories.stores import held_base

pytestmark = pytest.mark.usefixtures("quick_rendering")
CALIBRATION, TEXT = Calibration.of(find_text("builtin:python")), find_text("builtin:python-evaluation")
GPU = Gpu("NVIDIA Tiny", 80_000_000_000)
LARGE = 1 << 40
Planned = Callable[..., PlanDocument]


def recipe(**changes: Any) -> Any:
    small = {"nsamples": 8, "seqlen": 64, "batch_size": 4, "group_size": 32, **changes.pop("quantize", {})}
    plain = {"base": {"repo_id": "a/b"}, "quantize": small, "benchmark": {"engine": "none"}, "mtp": "drop"}
    return parse_recipe({**plain, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_base(tmp_path_factory.mktemp("pico") / "base")


@pytest.fixture
def base(store: Store, folder: Path, tmp_path: Path) -> Revision:
    return held_base(store, shutil.copytree(folder, tmp_path / "base"))  # The store takes the files away.


@pytest.fixture
def planned(store: Store, base: Revision, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan of a recipe on a machine with these GPUs and so much memory."""

    def do(asked: Any, *, gpus: tuple[Gpu, ...] | None = (GPU,), memory: int = LARGE, **scope: Any) -> PlanDocument:
        monkeypatch.setattr(machine.Here, "look", classmethod(lambda cls: Here(memory, gpus)))
        return plan_of(store, asked, Inputs(base, CALIBRATION, TEXT), **scope)

    return do


def test_a_machine_that_has_what_it_takes_is_not_warned_of(planned: Planned) -> None:
    document = planned(recipe())
    assert (document.problems, document.warnings) == ((), ()) and "warnings" not in document.to_json()


MACHINES: list[tuple[dict[str, Any], dict[str, Any], list[str], list[str]]] = [
    ({}, {"gpus": ()}, [], ["quantize: this machine has no GPU: the CPU would be used"]),
    (
        {"hardware": {"gpu": "NVIDIA H100 80GB HBM3"}},
        {"gpus": ()},
        [],
        ["quantize: hardware.gpu is NVIDIA H100 80GB HBM3, and this machine has no GPU"],
    ),
    ({"quantize": {"device": "cpu"}}, {"gpus": ()}, [], []),
    ({"hardware": {"gpu": "cpu"}}, {"gpus": ()}, [], []),
    (
        {"quantize": {"device": "cuda"}},
        {"gpus": ()},
        ["quantize: quantize.device is cuda, and this machine has no GPU"],
        [],
    ),
    (
        {"quantize": {"device": "cuda:1"}},
        {},
        ["quantize: quantize.device is cuda:1, and this machine has 1 GPUs"],
        [],
    ),
    ({}, {"gpus": None}, [], ["quantize: not checked: whether a GPU is there"]),
    (
        {"quantize": {"device": "cpu"}},
        {"memory": 2_000_000_000},
        [],
        ["quantize: may take up to", "validate: may take up to"],
    ),
    (
        {},
        {"gpus": (Gpu("small", 1_500_000),)},
        [],
        ["quantize: may take 1.72 MB of GPU memory", "validate: may take 15"],
    ),
    (
        {},
        {"gpus": (Gpu("small", 1000),)},
        ["quantize: the largest block takes"],
        ["quantize: may take 1.72 MB of GPU memory", "validate: may take 15"],
    ),
    (
        {"quantize": {"device": "cpu"}},
        {"memory": 1000},
        ["quantize: the largest block takes"],
        ["quantize: may take up to", "validate: may take up to"],
    ),
]


@pytest.mark.parametrize(("changes", "here", "problems", "warnings"), MACHINES)
def test_what_the_machine_lacks_stops_a_run_only_where_that_is_certain(
    changes: dict[str, Any], here: dict[str, Any], problems: list[str], warnings: list[str], planned: Planned
) -> None:
    document = planned(recipe(**changes), **here)
    for found, wanted in ((document.problems, problems), (document.warnings, warnings)):
        assert len(found) == len(wanted), found
        assert all(sentence.startswith(beginning) for sentence, beginning in zip(found, wanted, strict=True)), found


@pytest.mark.parametrize(("changes", "here", "problems", "warnings"), MACHINES)
def test_nothing_of_this_machine_is_judged_for_a_run_elsewhere_or_on_a_worker(
    changes: dict[str, Any], here: dict[str, Any], problems: list[str], warnings: list[str], planned: Planned
) -> None:
    for scope in ({"elsewhere": True}, {"delegated": {"quantize", "validate", "benchmark"}}):
        document = planned(recipe(**changes), **here, **scope)
        assert (document.problems, document.warnings) == ((), ())


def test_a_plan_on_a_machine_without_a_gpu_takes_the_time_of_a_cpu_unless_the_recipe_names_a_gpu(
    planned: Planned,
) -> None:
    def figure(document: PlanDocument) -> str:
        return next(stage.figure for stage in document.stages if stage.name == "quantize")

    assert figure(planned(recipe(), gpus=())).startswith("assumed: a CPU")
    assert "H200" in figure(planned(recipe()))
    assert "H200" in figure(planned(recipe(), gpus=(), elsewhere=True))
    assert "H100" in figure(planned(recipe(hardware={"gpu": "H100"}), gpus=()))


def test_all_problems_are_told_at_once_each_with_its_stage(
    store: Store, base: Revision, planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing vLLM, task definitions that are gone, a GPU that is not there, and nobody who may publish."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    asked = recipe(
        quantize={"device": "cuda"},
        benchmark={"engine": "vllm"},
        probes={},
        eval={"tasks": ["own"], "definitions": str(tmp_path / "gone")},
        allow_remote_code=True,
        publish={"repo_id": "me/x"},
    )
    document = planned(asked, gpus=())
    beginnings = [
        "quantize: quantize.device is cuda",
        "validate: eval.",
        "benchmark: there is no vllm on the PATH",
        "probe: probes need vLLM, and there is none on this machine",
        "publish: publishing to me/x needs HF_TOKEN",
    ]
    ours = [problem for problem in document.problems if not problem.startswith("stage ")]  # versions of tools
    assert len(ours) == len(beginnings), document.problems
    assert all(one.startswith(beginning) for one, beginning in zip(ours, beginnings, strict=True)), ours
    with pytest.raises(Refused) as caught:
        preflight(store, asked, base, CALIBRATION, TEXT)
    assert str(caught.value) == "; ".join(document.problems)


def test_probes_without_an_engine_stop_nothing_if_their_gates_have_no_limit(planned: Planned) -> None:
    asked = recipe(benchmark={"engine": "torch"}, probes={}, gates={"max_probe_loss": None})
    document = planned(asked)
    assert not document.problems
    assert document.warnings[-1].startswith("probe: probes need vLLM, and benchmark.engine is torch")


def test_a_server_that_does_not_answer_yet_is_a_warning(planned: Planned) -> None:
    document = planned(recipe(benchmark={"engine": "url:http://127.0.0.1:9"}))
    (warning,) = document.warnings
    assert warning.startswith("benchmark: this server must be up by then: http://127.0.0.1:9 does not answer")


def test_a_hub_that_does_not_answer_leaves_the_target_unchecked_in_a_plan_and_stops_a_run(
    planned: Planned, store: Store, base: Revision, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def unavailable(*_: Any) -> Iterator[None]:
        raise HubUnavailable("the Hub did not answer")
        yield

    monkeypatch.setattr("requant.tasks.hub.publish_target.hub_errors", unavailable)
    document = planned(recipe(publish={"repo_id": "me/x"}))
    assert (document.problems, document.warnings) == ((), ("publish: not checked: the Hub did not answer",))
    with pytest.raises(HubUnavailable):
        preflight(store, recipe(publish={"repo_id": "me/x"}), base, CALIBRATION, TEXT)


def test_the_gpus_of_a_process_are_those_that_cuda_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"gpu=name,memory.total": [["A", "1"], ["B", "2"]], "gpu=name": [["A"], ["B"]]}
    monkeypatch.setattr(hardware, "query", lambda fields: rows[fields])
    a, b = Gpu("A", 1 << 20), Gpu("B", 2 << 20)
    for visible, gpus in {"": (), "-1": (), "1": (b,), "1,0": (b, a), "0,7,1": (a,), "GPU-8932f937": (a, b)}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert hardware.visible_gpus() == gpus, visible
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert hardware.visible_gpus() == (a, b)
    rows["gpu=name,memory.total"] = [["A", "[N/A]"]]
    assert hardware.visible_gpus() is None, "there is one whose memory is not known"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert hardware.visible_gpus() is None, "the same, and it is chosen"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert hardware.visible_gpus() == ()


# Outputs that come to the same


SAME: list[tuple[str, list[dict[str, Any]], bool, str]] = [
    ("a base without a head", [{}, {"name": "b", "mtp": "drop"}], False, "auto_round:auto_gptq"),
    ("a base with one", [{}, {"name": "b", "mtp": "drop"}], True, ""),
    ("a group size of auto", [{"group_size": "auto"}, {"name": "b", "group_size": 32}], True, ""),
    ("which is 64", [{"group_size": "auto"}, {"name": "b", "group_size": 64}], True, "auto_round:auto_gptq"),
    (
        "a setting of layers that changes nothing",
        [
            {"sym": False, "format": "auto_round:auto_awq"},
            {"name": "b", "sym": False, "format": "auto_round", "layers": {"lm_head": {"bits": 16}}},
        ],
        True,
        "auto_round:auto_awq",
    ),
]


@pytest.mark.parametrize(("case", "outputs", "head", "packing"), SAME, ids=[row[0] for row in SAME])
def test_outputs_that_come_to_the_same_for_a_base_are_refused_whatever_they_are_called(
    case: str, outputs: list[dict[str, Any]], head: bool, packing: str, store: Store, tmp_path: Path
) -> None:
    base = held_base(store, pico_base(tmp_path / "base", head=head))
    small = {"scheme": "W4A16G64", "nsamples": 8, "seqlen": 64, "batch_size": 4}
    asked = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": small, "outputs": outputs})
    problems = plan_of(store, asked, Inputs(base, CALIBRATION, TEXT), elsewhere=True).problems
    first = next(iter(asked.each))
    told = f"b: for this base it comes to the same as output {first}, packed as {packing}: take one of them out"
    assert [problem for problem in problems if "the same as" in problem] == ([told] if packing else [])


@pytest.mark.parametrize(
    "other",
    [{"scheme": "W4A16", "group_size": 64}, {"bits": 4}, {"format": "auto_round:auto_gptq"}, {"group_size": "auto"}],
)
def test_outputs_that_quantize_alike_but_are_spelled_otherwise_share_that_in_plan_and_run(
    other: dict[str, Any], store: Store, base: Revision
) -> None:
    small = {"scheme": "W4A16G64", "nsamples": 8, "seqlen": 64, "batch_size": 4}
    outputs = [{}, {"name": "headless", "mtp": "drop", **other}]
    plain = {"base": {"repo_id": "a/b"}, "quantize": small, "benchmark": {"engine": "none"}}
    asked = parse_recipe({**plain, "outputs": outputs})
    document = plan_of(store, asked, Inputs(base, CALIBRATION, TEXT), elsewhere=True)
    states = {stage.output: stage.state for stage in document.stages if stage.name == "quantize"}
    assert list(states.values()) == ["run", "reused"] and not document.problems
    foreseen = preflight(store, asked, base, CALIBRATION, TEXT)
    files = Manifest.of([])
    assert len({quantize_key(one.recipe, files, CALIBRATION) for one in foreseen.values()}) == 1
