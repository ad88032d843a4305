"""Heads behind the last decoder layer, as DeepSeek and GLM have them, in torch: test_decode.py has Qwen's."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.head import HeadFiles, keep_head
from requant.tasks.errors import CheckpointError
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validate import measured_values
from requant.tasks.validating import measure as measuring
from requant.tasks.validating.decode import decode, speculate
from requant.tasks.validating.gates import judge
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.head_layouts import can_be_run
from requant.tasks.validating.measure import measure, run_settings
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings, Skeleton
from tests.factories.checkpoints import all_tensors, edited, from_bf16, to_bf16
from tests.factories.heads import make_base, quantized
from tests.factories.inlined import HEAD, KINDS, SHARD, inlined_base
from tests.factories.measured import measuring_little
from tests.factories.stepwise import speculate_by_steps

ON_CPU = RunSettings(torch.device("cpu"), torch.float32)
DRAFTS, LENGTH = 3, 40
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    little = measuring_little(windows=2, length=LENGTH, probe=16, prompts=2, generated=12, longest=64)
    with little, torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of each kind, in which what the decoder layers add decides about a half of the tokens."""
    folder = tmp_path_factory.mktemp("bases")
    return {kind: inlined_base(folder / kind, kind, blocks=0.2) for kind in KINDS}


@pytest.fixture(scope="module")
def predictable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose head drafts what the model chooses."""
    return inlined_base(tmp_path_factory.mktemp("predictable") / "base", "glm4_moe", blocks=0)


@pytest.fixture(scope="module")
def of_base(bases: dict[str, Path]) -> Callable[[str], Measurement]:
    """What is measured of the base of a kind."""
    return functools.cache(lambda kind: measure(bases[kind], EVALUATION, ON_CPU))


def loaded(folder: Path) -> tuple[Skeleton, MtpHead]:
    skeleton = Skeleton(Checkpoint.open(folder), ON_CPU)
    skeleton.hold()
    return skeleton, MtpHead(skeleton.checkpoint, skeleton)


def read(skeleton: Skeleton) -> tuple[torch.Tensor, torch.Tensor]:
    """A random text, and the model's hidden states for it."""
    tokens = torch.randint(3, 2000, (LENGTH,), generator=torch.Generator().manual_seed(1))
    return tokens, skeleton.text(input_ids=tokens[None], use_cache=False).last_hidden_state[0]


def changed(base: Path, folder: Path, edit: Callable[[Tensors], None]) -> Path:
    shutil.copytree(base, folder)
    with edited(folder, SHARD) as tensors:
        edit(tensors)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_drafts_at_all_places_at_once_what_it_drafts_one_after_the_other(bases: dict[str, Path], kind: str) -> None:
    skeleton, head = loaded(bases[kind])
    tokens, hidden = read(skeleton)
    at_once = head.drafts(tokens, hidden, DRAFTS)
    assert at_once.shape == (DRAFTS, LENGTH - 1)
    for place in (0, 1, 17, LENGTH - 2):
        cache, seen = head.cache(), torch.arange(place + 1)
        state = head(tokens[None, 1 : place + 2], hidden[None, : place + 1], seen[None], cache=cache)[0, -1:]
        for step in range(DRAFTS):
            drafted = skeleton.logits(state).argmax(-1)
            assert int(drafted) == int(at_once[step, place])
            state = head(drafted[None], state[None], torch.tensor([[place + 1 + step]]), cache=cache)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(bases: dict[str, Path], kind: str) -> None:
    skeleton, head = loaded(bases[kind])
    tokens, _ = read(skeleton)
    plain, _ = decode(skeleton, tokens[None, :20], 24 + 2)
    (found,) = speculate(skeleton, head, tokens[None, :20], plain, 2)
    by_steps = speculate_by_steps(skeleton, head, tokens[:20], 24, 2)
    assert found.tokens == by_steps.tokens == plain[0, :24].tolist()
    assert (found.steps, found.accepted) == (by_steps.steps, by_steps.accepted)
    assert 0 < found.accepted[0] < found.steps  # some are taken and some refused on the way


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_it_computes_what_transformers_own_head_computes(bases: dict[str, Path], kind: str) -> None:
    """transformers 5.23 has heads of these two. It does not hide the token of position 0, so the text begins at 1."""
    skeleton, head = loaded(bases[kind])
    tokens, hidden = read(skeleton)
    fed, states, positions = tokens[None, 1:], hidden[None, :-1], torch.arange(1, LENGTH)[None]
    model = skeleton.model
    model.config.name_or_path = str(bases[kind])
    model._keys_to_ignore_on_load_unexpected = [HEAD.replace(".", r"\.")]  # where it finds the names of the head
    theirs = MtpModel.from_pretrained(model).float()
    cache = MtpCache(config=model.config.get_mtp_config())
    expected = theirs.forward_layer(0, states, positions, cache, input_ids=fed)
    torch.testing.assert_close(head(fed, states, positions), expected, rtol=1e-4, atol=1e-5)


def test_the_token_at_position_0_is_hidden_from_it_and_the_others_are_not(bases: dict[str, Path]) -> None:
    skeleton, head = loaded(bases["glm4_moe"])
    tokens, hidden = read(skeleton)
    places = torch.arange(LENGTH - 1)[None]
    output = head(tokens[None, 1:], hidden[None, :-1], places)
    for place in (0, 1):
        others = tokens.clone()
        others[place + 1] += 1
        assert torch.equal(head(others[None, 1:], hidden[None, :-1], places), output) == (place == 0)


def test_drafts_that_the_model_would_choose_are_all_accepted(predictable: Path) -> None:
    """All but the one of position 0, which does not see its token."""
    found = measure(predictable, EVALUATION, ON_CPU)
    assert found.drafts.shape == (DRAFTS, 2, LENGTH - 1)
    assert found.acceptance == pytest.approx((LENGTH - 3) / (LENGTH - 2))
    assert found.greedy_acceptance_by_position == [1.0, 1.0, 1.0]
    assert (found.speculative == 1.0).all()


def test_a_head_that_takes_its_inputs_in_the_other_order_drafts_nothing_that_is_accepted(
    predictable: Path, tmp_path: Path
) -> None:
    """It then drafts what the model has chosen already, by the token before."""

    def swap(tensors: Tensors) -> None:
        dtype, shape, data = tensors[f"{HEAD}.eh_proj.weight"]
        halves = np.split(from_bf16(data, shape), 2, axis=1)
        tensors[f"{HEAD}.eh_proj.weight"] = dtype, shape, to_bf16(np.concatenate(halves[::-1], axis=1))

    found = measure(changed(predictable, tmp_path / "swapped", swap), EVALUATION, ON_CPU)
    assert found.acceptance is not None and found.acceptance < 0.1


def test_embeddings_and_output_layer_of_its_own_are_not_read(bases: dict[str, Path], tmp_path: Path) -> None:
    """As in engines, which take the main model's; and they are as large as a layer."""
    skeleton, head = loaded(bases["deepseek_v3"])

    def spoil(tensors: Tensors) -> None:
        for name in (f"{HEAD}.embed_tokens.weight", f"{HEAD}.shared_head.head.weight"):
            dtype, shape, data = tensors[name]
            tensors[name] = dtype, shape, b"\xff" * len(data)  # no numbers

    other, spoilt = loaded(changed(bases["deepseek_v3"], tmp_path / "spoilt", spoil))
    tokens, hidden = read(skeleton)
    assert torch.equal(spoilt.drafts(tokens, hidden, DRAFTS), head.drafts(tokens, hidden, DRAFTS))
    assert all(other.text.config.vocab_size not in parameter.shape for parameter in spoilt.parameters())


def test_of_several_layers_the_first_makes_the_only_draft(bases: dict[str, Path], tmp_path: Path) -> None:
    skeleton, head = loaded(inlined_base(tmp_path / "two", "glm4_moe", heads=2, blocks=0.2))
    assert head.recycles is False
    tokens, hidden = read(skeleton)
    drafts = head.drafts(tokens, hidden, DRAFTS)
    assert drafts.shape == (1, LENGTH - 1)

    def spoil(tensors: Tensors) -> None:
        dtype, shape, data = tensors["model.layers.3.eh_proj.weight"]
        tensors["model.layers.3.eh_proj.weight"] = dtype, shape, bytes(len(data))

    _, other = loaded(changed(tmp_path / "two", tmp_path / "other", spoil))
    assert torch.equal(other.drafts(tokens, hidden, DRAFTS), drafts)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("eh_proj.weight", "lacks 'eh_proj.weight'"),
        ("shared_head.norm.weight", "lacks 'shared_head.norm.weight'"),
        ("self_attn.q_a_proj.weight", "lacks 'self_attn.q_a_proj.weight'"),
        ("mlp.gate.e_score_correction_bias", "lacks 'mlp.gate.e_score_correction_bias'"),
        ("mlp.experts.3.down_proj.weight", "has another shape than its config says of layers.0.mlp.experts.down_proj"),
    ],
)
def test_a_head_that_is_not_whole_is_refused_by_the_name_of_what_it_lacks(
    bases: dict[str, Path], tmp_path: Path, name: str, said: str
) -> None:
    """transformers would begin with random numbers there."""
    folder = changed(bases["deepseek_v3"], tmp_path / "lacking", lambda tensors: tensors.pop(f"{HEAD}.{name}"))
    with pytest.raises(CheckpointError, match=f"the MTP head of {folder} {said}"):
        loaded(folder)


def test_a_fusion_layer_of_another_width_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        dtype, (rows, columns), data = tensors[f"{HEAD}.eh_proj.weight"]
        tensors[f"{HEAD}.eh_proj.weight"] = dtype, (rows, columns // 2), data[: len(data) // 2]

    folder = changed(bases["glm4_moe"], tmp_path / "narrow", halve)
    with pytest.raises(CheckpointError, match="has another shape than its config says of eh_proj"):
        loaded(folder)


def test_the_longest_text_leaves_room_for_the_scores_of_all_pairs_of_tokens(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which sparse attention (16 indexers here, 3 copies in float32) computes at once."""
    monkeypatch.setattr(measuring, "room", lambda device: 2 * 12 * 16 * 50**2)
    assert measuring.longest(loaded(bases["glm_moe_dsa"])[0]) == 50
    assert measuring.longest(loaded(bases["deepseek_v3"])[0]) == 64


def test_without_a_part_of_its_head_a_checkpoint_is_measured_and_its_drafts_are_not(
    bases: dict[str, Path], of_base: Callable[[str], Measurement], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = changed(bases["glm4_moe"], tmp_path / "lacking", lambda tensors: tensors.pop(f"{HEAD}.enorm.weight"))
    found = measure(lacking, EVALUATION, ON_CPU)
    assert np.array_equal(found.nll, of_base("glm4_moe").nll) and found.acceptance is None
    assert f"the MTP head of {lacking} lacks 'enorm.weight': its drafts are not measured" in caplog.text


def test_an_inlined_head_of_a_model_that_is_not_known_is_not_run(tmp_path: Path) -> None:
    """Others with the same names fuse in another order, or have other norms."""
    assert not can_be_run(Checkpoint.open(make_base(tmp_path / "base", "inlined")))
    assert can_be_run(Checkpoint.open(make_base(tmp_path / "apart", "mtp")))


def test_it_drafts_where_only_a_block_of_the_model_fits_and_makes_room_for_the_blocks_then(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLM-5's second layer looks at the tokens that its first one has chosen."""
    whole = measure(bases["glm_moe_dsa"], EVALUATION, ON_CPU)
    heads: list[MtpHead] = []
    monkeypatch.setattr(measuring, "MtpHead", lambda *given: heads.append(MtpHead(*given)) or heads[0])
    monkeypatch.setattr(measuring, "room", lambda device: 0)
    found = measure(bases["glm_moe_dsa"], EVALUATION, ON_CPU)
    assert found.acceptance == whole.acceptance and found.speculation.size == 0
    assert found.generated.tolist() == whole.generated[:, : found.generated.shape[1]].tolist()
    assert all(parameter.is_meta for parameter in heads[0].parameters())


@pytest.mark.parametrize(("kind", "precision"), [("deepseek_v3", "int8"), ("glm4_moe", "keep"), ("glm4_moe", "int4")])
def test_the_acceptance_of_kept_and_packed_heads_is_measured_and_judged(
    bases: dict[str, Path], of_base: Callable[[str], Measurement], tmp_path: Path, kind: str, precision: str
) -> None:
    base, made = Checkpoint.open(bases[kind]), _quantized(bases[kind], tmp_path / "made", precision)

    def measure_one(path: Path, settings: RunSettings) -> Measurement:
        return of_base(kind) if path == base.folder else measure(path, EVALUATION, settings)

    packed = precision != "keep"
    found = measured_values(
        Checkpoint.open(made),
        base,
        measure_one,
        keep_head=True,
        pack_head=packed,
        settings=run_settings(base.folder),
    )
    assert found.audit.unaccounted == () and found.not_measured is None
    gate = next(gate for gate in judge(found, Gates()) if gate.name == "mtp_acceptance_ratio")
    ratio = found.behaviour.mtp_acceptance_ratio
    assert ratio is not None and gate.value == ratio and gate.passed == (ratio >= 0.95)
    assert ratio > 0.5


def _quantized(base: Path, folder: Path, precision: str) -> Path:
    """The base with the main model's matrices rounded to 4 bits, and its head as the recipe's `mtp:` has it."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    source = Checkpoint.open(base)
    assert source.head is not None
    main = {name: raw for name, raw in all_tensors(base).items() if name not in source.head.names}
    config: dict[str, Any] = dict(source.config)
    quantized(main, folder, config, "auto_round:auto_gptq", head=[], shards=1, single=False)
    keep_head(HeadFiles.read(folder), source, folder, precision)
    return folder
