"""What a plan says of its base and of its result before anything is fetched: all that inspect knows."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from requant.tasks.checkpoint.advice import FIX, without_advice
from requant.tasks.checkpoint.base_check import check_base, check_kind
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import Judgement
from requant.tasks.checkpoint.compat.rule import NotJudged
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.errors import CheckpointError, Refused
from requant.tasks.plan import plan_of, preflight
from requant.tasks.planning.checks import MAX_PROBLEMS, result_problems
from requant.tasks.planning.document import PlanDocument
from requant.tasks.planning.inputs import Inputs
from requant.tasks.recipe.loader import parse_recipe
from requant.tasks.store import Store
from requant.tasks.texts.calibration import Calibration
from requant.tasks.texts.text import find_text
from tests.factories.checkpoints import edited, write_checkpoint, write_quantized
from tests.factories.foreign import IN_PLACE, POINTER
from tests.factories.fp8_bases import as_fp8
from tests.factories.paths import TINY
from tests.factories.pico import pico_base
from tests.factories.stores import held_base

pytestmark = pytest.mark.usefixtures("quick_rendering")
SMALL = {"group_size": 32, "nsamples": 8, "seqlen": 64, "batch_size": 4}


def planned(store: Store, base: Path, **recipe: Any) -> PlanDocument:
    """A plan of a base in the store. A run stops with its problems, and only if there are any."""
    asked = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": SMALL, "benchmark": {"engine": "none"}, **recipe})
    python, evaluation = find_text("builtin:python"), find_text("builtin:python-evaluation")
    inputs = Inputs(held_base(store, base), Calibration.of(python), evaluation)
    document = plan_of(store, asked, inputs)
    if document.problems:
        with pytest.raises(Refused) as caught:
            preflight(store, asked, inputs.base, inputs.calibration, inputs.validation)
        assert str(caught.value) == "; ".join(document.problems)
    else:
        preflight(store, asked, inputs.base, inputs.calibration, inputs.validation)
    return document


def changed(base: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads((base / file).read_text())
    change(document)
    (base / file).write_text(json.dumps(document))


def without_norm(base: Path) -> None:
    shard = Checkpoint.open(base).tensors["model.language_model.layers.0.input_layernorm.weight"].path.name
    with edited(base, shard) as tensors:
        tensors["model.language_model.layers.0.input_layernorm.weight"] = ("BF16", (32,), bytes(64))


def without_head_part(base: Path) -> None:
    shard = Checkpoint.open(base).tensors["mtp.fc.weight"].path.name
    with edited(base, shard) as tensors:
        del tensors["mtp.fc.weight"]


# Damage after which a base is still read, and what inspect says of it.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shape": (without_norm, "input_layernorm has shape 32, and the sizes of config.json need"),
    "a layer": (
        lambda f: changed(f, "config.json", lambda c: c["text_config"].update(num_hidden_layers=3)),
        "promises 3 layers, and layer 2 has no tensors",
    ),
    "a part of the head": (without_head_part, "the MTP head lacks"),
    "a processor": (lambda f: (f / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
    "a quantization config": (
        lambda f: (f / "quantization_config.json").write_text('{"quant_method": "gptq", "bits": 4}'),
        "quantization_config.json is there",
    ),
    "a pointer": (lambda f: (f / "tokenizer_config.json").write_bytes(POINTER), "tokenizer_config.json is a Git LFS"),
    "a missing shard": (
        lambda f: (f / "model-00001-of-00002.safetensors").unlink(),
        "the index names model-00001-of-00002.safetensors, which is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_all_that_inspect_finds_in_a_base_stops_its_plan(case: str, store: Store, tmp_path: Path) -> None:
    damage, sentence = DAMAGE[case]
    base = pico_base(tmp_path / "base")
    damage(base)
    found = inspect_checkpoint(base).problems
    assert any(sentence in problem for problem in found)
    problems = planned(store, base).problems
    assert [f"the base a/b cannot be used: {without_advice(problem)}" for problem in found] == [
        p for p in problems if p.startswith("the base a/b")
    ]
    assert not any("mtp-fix" in problem for problem in problems)


@pytest.mark.parametrize("case", IN_PLACE)
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_file_that_is_something_else_is_the_only_problem(name: str, case: str, store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    (base / name).write_bytes(IN_PLACE[case][0])
    (problem,) = planned(store, base).problems
    assert problem.startswith(f"the base a/b cannot be used: {name} {IN_PLACE[case][1]}")


def test_what_readers_do_not_mind_is_a_note(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    changed(base, "model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1))
    changed(base, "config.json", lambda config: config["text_config"].update(dtype="float16"))
    document = planned(store, base)
    assert document.problems == () and len(document.stages) > 4
    total, dtype = (note for note in document.notes if note.startswith("the base a/b: "))
    assert "total_size 1" in total and "mtp-fix" not in total and "config.json says float16" in dtype


@pytest.mark.parametrize("layers", [None, 0])
def test_a_head_that_no_engine_drafts_with_is_a_note_without_an_advice(
    layers: int | None, store: Store, tmp_path: Path
) -> None:
    base = pico_base(tmp_path / "base")
    changed(base, "config.json", lambda config: config["text_config"].update(mtp_num_hidden_layers=layers))
    (problem,) = inspect_checkpoint(base).problems
    assert problem.endswith(FIX)
    check_base(Checkpoint.open(base), "a/b", with_head=True)
    document = planned(store, base)
    assert document.problems == () and f"the base a/b: {without_advice(problem)}" in document.notes


def test_a_refused_base_is_never_to_be_repaired(tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="there is no model") as caught:
        check_base(Checkpoint.open(base), "a/b", with_head=True)
    assert "mtp-fix" in str(Checkpoint.open(base).problems) and "mtp-fix" not in str(caught.value)


def test_a_head_that_is_dropped_need_not_be_whole(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    without_head_part(base)
    assert planned(store, base, mtp="drop").problems == ()


def test_of_many_problems_the_first_are_told(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base", layers=4)
    changed(
        base,
        "model.safetensors.index.json",
        lambda i: i["weight_map"].update({f"x{n}.weight": f"{n}" for n in range(90)}),
    )
    problems = planned(store, base).problems
    assert len(problems) == MAX_PROBLEMS + 1 and "70 more" in problems[-1] and "requant inspect" in problems[-1]


def gptq(base: Path) -> Path:
    return write_quantized(pico_base(base), base.parent)


def foreign(**quantization: Any) -> Callable[[Path], Path]:
    """A base whose weights another method packed: half a byte each, with scales beside them."""

    def make(folder: Path) -> Path:
        base = pico_base(folder)
        shard = Checkpoint.open(base).tensors["lm_head.weight"].path.name
        with edited(base, shard) as tensors:
            tensors["lm_head.weight"] = ("U8", (2048, 32), bytes(2048 * 32))
        changed(base, "config.json", lambda config: config.update(quantization_config=quantization))
        return base

    return make


QUANTIZED: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "auto-round": (gptq, " (auto-round)"),
    "bitsandbytes": (foreign(quant_method="bitsandbytes", load_in_4bit=True), " (bitsandbytes)"),
    "mxfp4": (foreign(quant_method="mxfp4"), " (MXFP4)"),
    "modelopt": (foreign(quant_method="modelopt", quant_algo="NVFP4"), " (ModelOpt NVFP4)"),
    "quark": (foreign(quant_method="quark"), " (Quark)"),
    "torchao": (foreign(quant_method="torchao"), " (torchao)"),
    "one to come": (foreign(quant_method="next year's"), " (next year's)"),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_a_base_that_is_already_quantized_is_refused_by_the_name_of_its_method(
    method: str, store: Store, tmp_path: Path
) -> None:
    make, name = QUANTIZED[method]
    (problem,) = planned(store, make(tmp_path / "base")).problems
    assert problem == (
        f"the base a/b cannot be used: it is already quantized{name}: name the model that it was made of"
    )


def test_a_draft_model_is_no_base(store: Store, tmp_path: Path) -> None:
    base = pico_base(tmp_path / "base")
    changed(base, "config.json", lambda config: config.update(architectures=["LlamaForCausalLMEagle3"]))
    (problem,) = planned(store, base).problems
    assert problem.startswith("the base a/b cannot be used: it is a draft model (EAGLE-3)")
    assert problem.endswith("name the base that it drafts for")


def test_an_fp8_base_is_none_that_is_already_quantized(tmp_path: Path) -> None:
    bf16 = pico_base(tmp_path / "bf16", head=False)
    check_kind(Checkpoint.open(bf16), "a/b")
    check_kind(Checkpoint.open(as_fp8(bf16, tmp_path / "fp8")), "a/b")
    packed = {"a.qweight": ("I32", (4, 4), bytes(64))}
    with pytest.raises(CheckpointError, match="already quantized: name"):
        check_kind(Checkpoint.open(write_checkpoint(tmp_path / "x", {"model.safetensors": packed}, {})), "a/b")


def test_a_result_that_neither_engine_loads_is_a_problem_and_one_that_is_not_judged_is_none() -> None:
    findings = (None, "no rules", NotJudged("no rules"))
    for vllm, sglang in itertools.product(findings, findings):
        loading = {"vllm": vllm, "sglang": sglang, "transformers": "another reason"}
        stops = bool(result_problems(Judgement(loading, dict.fromkeys(loading), [])))
        assert stops == (vllm is sglang is findings[1]), loading


def step(folder: Path) -> Path:
    """A base of Step-3.5, whose experts lie fused under names without the word expert."""
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (96, 64), "model.norm.weight": (64,), "lm_head.weight": (96, 64),
        **{f"model.layers.0.{name}.weight": (64,) for name in ("input_layernorm", "post_attention_layernorm")},
        **{f"model.layers.0.self_attn.{name}_proj.weight": (64, 64) for name in "qkvo"},
        "model.layers.0.moe.gate.weight": (4, 64), "model.layers.0.moe.down_proj.weight": (4, 64, 32),
        **{f"model.layers.0.moe.{name}_proj.weight": (4, 32, 64) for name in ("gate", "up")},
    }  # fmt: skip
    raw = {name: ("BF16", shape, bytes(2 * math.prod(shape))) for name, shape in tensors.items()}
    sizes = {"hidden_size": 64, "vocab_size": 96, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    config = {"model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], **sizes}
    write_checkpoint(folder, {"model.safetensors": raw}, config, index=False)
    shutil.copyfile(TINY / "tokenizer.json", folder / "tokenizer.json")
    return folder


def test_a_plan_stops_where_its_own_verdicts_are_no(store: Store, tmp_path: Path) -> None:
    base = step(tmp_path / "base")
    assert inspect_checkpoint(base).problems == []
    document = planned(store, base, allow_remote_code=True)
    assert {engine: document.engines[engine].loads for engine in ("vllm", "sglang")} == {"vllm": False, "sglang": False}
    assert document.stages and any(
        p.startswith("the result would be useless: neither vLLM 0.32.0 nor SGLang 0.5.23 loads it: ")
        for p in document.problems
    )


TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda f: (f / "tokenizer.json").unlink(), "the base a/b has no tokenizer (tokenizer.json or a vocab"),
    "no model in it": (lambda f: (f / "tokenizer.json").write_text("{}"), "(tokenizer.json: Model missing"),
    "a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "the tokenizer of the base cannot be loaded (tok"),
    "a cut vocabulary": (
        lambda f: changed(f, "tokenizer.json", lambda t: t["model"].update(vocab={"a": 0})), "out of vocabulary",
    ),
    "no vocabulary": (
        lambda f: (f / "tokenizer.json").rename(f / "tokenizer.model"), "the tokenizer of the base cannot be loaded (",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_missing_or_cannot_be_loaded_stops_a_run(case: str, store: Store, tmp_path: Path) -> None:
    damage, sentence = TOKENIZERS[case]
    base = pico_base(tmp_path / "base")
    damage(base)
    asked = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": SMALL})
    text = find_text("builtin:python")
    with pytest.raises(Refused) as caught:
        preflight(store, asked, held_base(store, base), Calibration.of(text), find_text("builtin:python-evaluation"))
    assert sentence in str(caught.value) and ";" not in str(caught.value)
