"""Every head that ships: an untouched base of each family is fine, is planned, and keeps its head bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.base_check import check_base
from requant.tasks.checkpoint.blocks import block_sizes
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.config import ModelConfig, QuantizationConfig
from requant.tasks.checkpoint.head import HeadFiles, head_tensors, keep_head
from requant.tasks.checkpoint.heads.layouts import LAYOUTS, UNKNOWN
from requant.tasks.checkpoint.heads.missing import depths_of
from requant.tasks.checkpoint.inspect import as_text, inspect_checkpoint
from requant.tasks.checkpoint.mtp import find_head
from requant.tasks.errors import CheckpointError
from requant.tasks.planning.output import CheckpointPlan, plan_output
from requant.tasks.planning.reasons import MTP_HEAD
from requant.tasks.recipe.loader import parse_recipe
from tests.factories.checkpoints import all_tensors, from_bf16, rounded, write_checkpoint
from tests.factories.head_families import FAMILIES, HIDDEN, Family

RECIPE = parse_recipe({"base": {"repo_id": "a/b"}, "quantize": {"group_size": 32}, "mtp": "keep"})
WORDS = ("MTP", "mtp", "head.")  # of a problem of the head
DRAFTED_OTHERWISE = {"deepseek-v4.1", "deepseek-v4-dspark", "iquest-flat", "unheard-of", "unheard-of-behind"}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[str, Family]:
    return request.param, FAMILIES[request.param]


def test_every_layout_of_the_table_has_a_family_here() -> None:
    assert {family.layout for family in FAMILIES.values()} == {layout.name for layout in LAYOUTS} | {UNKNOWN}


def test_a_head_is_found_whole_told_complete_and_drafted_with(family: tuple[str, Family], tmp_path: Path) -> None:
    name, made = family
    document = inspect_checkpoint(made.write(tmp_path / name))
    checkpoint = Checkpoint.open(tmp_path / name)
    head = checkpoint.head
    assert head is not None and (head.layout, set(head.names)) == (made.layout, set(made.head))
    assert document.mtp.complete and document.mtp.missing == []
    assert [p for p in document.problems if any(word in p for word in WORDS)] == []
    assert "lacks" not in as_text(name, document)
    drafting = {engine: document.engines[engine].mtp for engine in ("vllm", "sglang")}
    if name in DRAFTED_OTHERWISE:
        assert True not in drafting.values(), drafting
    else:
        assert depths_of(head, checkpoint.config) == made.depths
        assert True in drafting.values() and None not in drafting.values(), drafting


def test_a_base_is_planned_and_keeps_its_head_bit_for_bit(family: tuple[str, Family], tmp_path: Path) -> None:
    name, made = family
    base = Checkpoint.open(made.write(tmp_path / name))
    check_base(base, "a/b", with_head=True)
    output = plan_output(base, RECIPE, {})
    assert output.problems == [] and output.head_bytes > 0
    assert not {f"{module}.weight" for module in output.choice.quantized} & set(made.head)
    assert set(block_sizes(base)) == {f"{made.root}layers.{number}" for number in range(2)}
    reasons = {kept.why for kept in output.kept() if any(kept.tensors.startswith(p) for p in _prefixes(base))}
    assert reasons == {MTP_HEAD}

    result = quantized_as_planned(base, output, tmp_path).sound()
    before, after = all_tensors(base.folder), all_tensors(result.folder)
    assert {n: after[n] for n in made.head} == {n: before[n] for n in made.head}
    accounted = account(result, base, with_head=True)
    assert (accounted.unaccounted, accounted.altered, accounted.head) == ([], [], len(made.head))


def quantized_as_planned(base: Checkpoint, output: CheckpointPlan, folder: Path) -> Checkpoint:
    """What quantize and mtp_fix make of a base, with rounding in place of auto-round, which drops the head."""
    assert base.head is not None
    made: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, raw in all_tensors(base.folder).items():
        module = name.removesuffix(".weight")
        if module in output.choice.quantized:
            made |= {f"{module}.{part}": of_part for part, of_part in rounded(from_bf16(raw[2], raw[1]))[0].items()}
        elif name not in base.head.names:
            made[name] = raw
    config = {**base.config, "quantization_config": output.choice.quantization}
    packed = write_checkpoint(folder / "packed", {"model.safetensors": made}, config, index=False)
    assemble(base, Checkpoint.open(packed), dict.fromkeys(output.choice.quantized, 4), out := folder / "made")
    keep_head(HeadFiles.read(out), base, out)
    for name in ("tokenizer.json", "generation_config.json"):
        (out / name).write_bytes((base.folder / name).read_bytes())
    return Checkpoint.open(out)


def _prefixes(base: Checkpoint) -> list[str]:
    return base.head.prefixes if base.head else []


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.needed])
def test_a_head_without_a_module_that_it_must_have_is_told_by_that_name(name: str, tmp_path: Path) -> None:
    made = FAMILIES[name]
    assert made.needed is not None
    head = {n: shape for n, shape in made.head.items() if n != made.needed}
    lacking = Family(**{**vars(made), "head": head})
    document = inspect_checkpoint(lacking.write(tmp_path / name))
    assert made.needed.removesuffix(".weight") in document.mtp.missing
    assert document.engines["vllm"].mtp is not True


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("qwen3.5", None, "mtp_num_hidden_layers is null, or no number"),
        ("qwen3.5", 0, "promises 0 MTP layers (mtp_num_hidden_layers)"),
        ("glm-4.5", 2, "promises 2 MTP layers, and there are 1"),
        ("nemotron-h", 2, "promises 2 MTP layers, and there are 1"),
    ],
)
def test_a_count_that_contradicts_the_head_is_named(name: str, count: int | None, said: str, tmp_path: Path) -> None:
    made = FAMILIES[name]
    key = next(key for key in made.config if "layers" in key)
    wrong = Family(**{**vars(made), "config": {**made.config, key: count}})
    assert said in inspect_checkpoint(wrong.write(tmp_path / "base")).engines["vllm"].reason


@pytest.mark.parametrize(
    "said",
    [{"mtp_hybrid_override_pattern": "*E"}, {"mtp_layers_block_type": ["full_attention", "moe"]}],
    ids=["*", "type"],
)
def test_a_head_of_two_depths_is_whole_and_vllm_takes_one(said: dict[str, Any], tmp_path: Path) -> None:
    made = FAMILIES["nemotron-h"]
    second = {n.replace(".0.", ".2.", 1).replace(".1.", ".3.", 1): shape for n, shape in made.head.items()}
    config = {"num_nextn_predict_layers": 2, **said}
    document = inspect_checkpoint(
        Family(**{**vars(made), "head": made.head | second, "config": config}).write(tmp_path / "base")
    )
    assert document.mtp.layers == 2 and document.mtp.complete
    assert [p for p in document.problems if any(word in p for word in WORDS)] == []
    assert document.engines["sglang"].mtp is True and document.engines["vllm"].mtp is False
    assert "takes no head of more than 1 MTP layers, and there are 2" in document.engines["vllm"].reason
    check_base(Checkpoint.open(tmp_path / "base"), "a/b", with_head=True)


@pytest.mark.parametrize("count", [-1, 10**9])
def test_a_head_has_the_layers_that_are_there_whatever_its_count_says(count: int, tmp_path: Path) -> None:
    made = FAMILIES["qwen3.5"]
    wrong = Family(**{**vars(made), "config": {"mtp_num_hidden_layers": count}})
    assert inspect_checkpoint(wrong.write(tmp_path / "base")).mtp.layers == 1


def test_a_head_of_another_family_is_not_said_to_draft(tmp_path: Path) -> None:
    glm, qwen = FAMILIES["glm-4.5"], FAMILIES["qwen3.5"]
    mixed = Family(**{**vars(glm), "head": qwen.head})
    verdicts = inspect_checkpoint(mixed.write(tmp_path / "base")).engines
    for engine in ("vllm", "sglang"):
        assert verdicts[engine].mtp is False and "reads a head of the layout inlined" in verdicts[engine].reason


@pytest.mark.parametrize("name", ["mimo", "deepseek-v4", "unheard-of"])
def test_a_head_of_which_engines_read_no_packed_form_is_not_packed(name: str, tmp_path: Path) -> None:
    base = Checkpoint.open(FAMILIES[name].write(tmp_path / "base"))
    with pytest.raises(CheckpointError, match=r"a packed head of the layout \w+ is not known: use mtp: keep"):
        head_tensors(base, "int8", QuantizationConfig(quant_method="auto-round", bits=4, group_size=32))


def test_an_engine_without_a_draft_model_is_no_problem_of_the_checkpoint(tmp_path: Path) -> None:
    document = inspect_checkpoint(FAMILIES["minimax-m3"].write(tmp_path / "base"))
    assert document.engines["sglang"].mtp is False
    assert "has no draft model for MiniMaxM3SparseForConditionalGeneration" in document.engines["sglang"].reason
    assert document.engines["vllm"].mtp is True
    assert not [p for p in document.problems if "draft model" in p]


def test_a_counted_head_that_no_engine_reads_need_not_be_there(tmp_path: Path) -> None:
    """MiniMax-M2 counts three modules, and its makers release none of them."""
    released = Family("", "MiniMaxM2ForCausalLM", "minimax_m2", {}, {"num_mtp_modules": 3, "use_mtp": True})
    document = inspect_checkpoint(released.write(tmp_path / "base"))
    assert [p for p in document.problems if any(word in p for word in WORDS)] == []
    assert {document.engines[engine].mtp for engine in ("vllm", "sglang")} == {False}
    check_base(base := Checkpoint.open(tmp_path / "base"), "a/b", with_head=True)
    assert plan_output(base, RECIPE, {}).problems == []


COMPONENTS = st.sampled_from(["mtp", "nextn", "mtp_layers", "mtp_head", "nextn_block", "mtp_x"])
ROOTS = st.sampled_from(["", "model.", "language_model.", "model.language_model.", "backbone."])
PARTS = st.lists(st.from_regex(r"[a-z_]{1,8}|[0-9]{1,2}", fullmatch=True), min_size=1, max_size=4)


@given(ROOTS, COMPONENTS, PARTS)
def test_any_tensor_below_mtp_is_a_heads_and_refuses_nothing(root: str, component: str, parts: list[str]) -> None:
    """The next family: names that no layout has are an unknown head, which is never called incomplete."""
    name = f"{root}{component}.{'.'.join(parts)}.weight"
    config = ModelConfig(architectures=["NextForCausalLM"], model_type="next", num_hidden_layers=2, hidden_size=HIDDEN)
    head = find_head(["model.layers.0.mlp.up_proj.weight", name], config)
    assert head is not None and head.names == (name,)
    assert all(name.startswith(f"{prefix}.") for prefix in head.prefixes)


DRAFTERS = {
    "EAGLE-3": ("LlamaForCausalLMEagle3", {"midlayer.self_attn.q_proj.weight": (HIDDEN, 2 * HIDDEN), "d2t": (8,)}),
    "DFlash": ("DFlashDraftModel", {"layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN), "fc.weight": (HIDDEN, 320)}),
    "DSpark": ("Qwen3DSparkModel", {"layers.0.mlp.up_proj.weight": (96, HIDDEN), "markov_head.w1": (8, HIDDEN)}),
    "Gemma assistant": ("Gemma4AssistantForCausalLM", {"pre_projection.weight": (HIDDEN, 2 * HIDDEN)}),
    "MTP": ("IQuestQ1MTP", dict(FAMILIES["iquest-flat"].head)),
    "MTP for SGLang": ("DeepseekV3ForCausalLMNextN", {"model.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}),
    "MTP for vLLM": ("Glm4MoeMTPModel", {"model.layers.46.eh_proj.weight": (HIDDEN, 2 * HIDDEN)}),
}


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_draft_model_in_a_repo_of_its_own_is_named_and_nothing_is_called_broken(kind: str, tmp_path: Path) -> None:
    architecture, shapes = DRAFTERS[kind]
    drafter = Family("", architecture, "llama", shapes, {"num_nextn_predict_layers": 1, "draft_vocab_size": 8})
    folder = drafter.write(tmp_path / "drafter")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    document = inspect_checkpoint(folder)
    assert document.drafter == kind.partition(" for ")[0] and document.problems == []
    assert {verdict.loads for verdict in document.engines.values()} == {None}
    assert "a drafter for its base, not a base model" in as_text("x", document)
    with pytest.raises(CheckpointError, match=r"it is a draft model .* and no base model: name the base"):
        check_base(Checkpoint.open(folder), "a/b", with_head=True)
