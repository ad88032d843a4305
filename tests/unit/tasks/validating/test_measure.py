"""Measuring pico checkpoints: packed weights count as what they stand for, the head drafts, nothing is random."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from requant.tasks.checkpoint.audit import Account, account
from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.torch_tensor import to_torch
from requant.tasks.errors import CheckpointError, RecipeError
from requant.tasks.recipe.recipe import Gates
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validate import measured_values, validate_folders
from requant.tasks.validating import measure as measuring
from requant.tasks.validating.compare import compare as compare_folders
from requant.tasks.validating.compare import side_by_side
from requant.tasks.validating.gates import judge, most_repeated
from requant.tasks.validating.measure import measure as measure_as
from requant.tasks.validating.measure import run_settings
from requant.tasks.validating.measured import Measured
from requant.tasks.validating.measurement import Measurement
from requant.tasks.validating.model import RunSettings, Skeleton, load_model, state_dict
from tests.factories.checkpoints import (
    all_tensors,
    from_bf16,
    raw_tensors,
    rounded,
    safetensors_bytes,
    to_bf16,
    write_quantized,
)
from tests.factories.measured import measuring_little
from tests.factories.pico import pico_base

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    with measuring_little(windows=4, length=48, probe=16, prompts=2, generated=4, longest=96):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_base(tmp_path_factory.mktemp("pico") / "base", seed=1)


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(base, tmp_path_factory.mktemp("quantized"))


def measure(folder: Path, text: Path) -> Measurement:
    """Measure a checkpoint by itself, as a base is measured."""
    return measure_as(folder, text, run_settings(folder))


def found(ours: Path, theirs: Path) -> Account:
    return account(Checkpoint.open(ours), Checkpoint.open(theirs), with_head=True)


@pytest.fixture(scope="module")
def of_base(base: Path) -> Measurement:
    return measure(base, EVALUATION)


@pytest.fixture(scope="module")
def of_made(made: Path, base: Path) -> Measurement:
    return measure_as(made, EVALUATION, run_settings(base))


def edit(folder: Path, shard: str, **changes: Any) -> None:
    """Replace tensors of one shard by values."""
    tensors = raw_tensors(folder / shard)
    for name, values in changes.items():
        tensors[name] = ("BF16", tensors[name][1], to_bf16(values))
    (folder / shard).write_bytes(safetensors_bytes(tensors))


def test_a_checkpoint_is_measured_the_same_every_time(base: Path, of_base: Measurement) -> None:
    one, two = of_base, measure(base, EVALUATION)
    assert one.to_bytes() == two.to_bytes()
    assert one.tokens.shape == (4, 48) and one.nll.shape == one.top1.shape == (4, 47)
    assert one.drafts.shape == (3, 4, 47) and one.generated.shape == (2, 4) and one.speculation.shape == (2, 4)
    assert (one.tokens.dtype, one.nll.dtype) == (np.int32, np.float32)
    assert one.hidden.shape == (4, 48, 64) and one.probes.shape == (3, 16, 64) and one.features.shape[1] == 64
    assert one.context.tolist() == [96, 96]


def test_windows_that_are_computed_at_once_are_measured_as_each_by_itself(
    base: Path, of_base: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three at a time, so that the last one is left over."""
    monkeypatch.setitem(measuring.BATCH_TOKENS, "cpu", 3 * 48 + 1)
    batched = measure(base, EVALUATION)
    torch.testing.assert_close(batched.hidden, of_base.hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batched.nll, of_base.nll, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(batched.drafts, of_base.drafts)
    torch.testing.assert_close(batched.probes, of_base.probes, rtol=1e-4, atol=1e-5)


def test_weights_that_fit_just_so_are_held_and_otherwise_come_block_by_block(
    base: Path, of_base: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decoding needs is its weights and what it computes, and no half of them again."""
    skeleton = Skeleton(Checkpoint.open(base).loadable(), run_settings(base))
    skeleton.load_ends()
    decoded_tokens = measuring.PROMPTS * (measuring.PROMPT + measuring.GENERATED + measuring.DRAFTS)
    needed = skeleton.absent_bytes + decoded_tokens * measuring._token_bytes(skeleton) + measuring.SPARE_BYTES
    read: list[int | str] = []
    to_state = Skeleton._read
    monkeypatch.setattr(Skeleton, "_read", lambda self, part: read.append(part) or to_state(self, part))
    for room, times, generated in ((2 * needed, 1, 4), (needed, 2, 4), (needed - 1, 1 + 8, 8)):
        read.clear()
        monkeypatch.setattr(measuring, "room", lambda device, room=room: room)
        found = measure(base, EVALUATION)
        assert read.count(0) == read.count(1) == times and found.generated.shape == (2, generated)
        assert found.nll.tobytes() == of_base.nll.tobytes() and found.hidden.equal(of_base.hidden)
        np.testing.assert_array_equal(found.generated[:, :4], of_base.generated)
        assert bool(found.speculation.size) == (generated == 4)


def test_a_model_of_random_weights_knows_as_little_as_it_can(of_base: Measurement) -> None:
    found = of_base
    assert 500 < found.perplexity < 20_000  # 2048 tokens, equally likely or worse
    assert found.acceptance is not None and 0 <= found.acceptance < 0.5


def test_the_losses_are_the_cross_entropy_of_the_next_token(base: Path, of_base: Measurement) -> None:
    """Against a plain forward of the transformers model."""
    found = of_base
    model = load_model(Checkpoint.open(base), RunSettings(torch.device("cpu"), torch.float32))
    ids = torch.from_numpy(found.tokens[:1]).long()
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0].float()
    expected = -logits[:-1].log_softmax(-1)[torch.arange(47), ids[0, 1:]]
    np.testing.assert_allclose(found.nll[0], expected.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.top1[0], logits[:-1].argmax(-1).numpy())
    assert math.isclose(found.perplexity, math.exp(float(found.nll.mean())), rel_tol=1e-5)


def test_packed_weights_are_measured_as_what_they_stand_for(made: Path, of_made: Measurement, tmp_path: Path) -> None:
    """A copy of the base with the rounded weights in plain numbers measures the same as the packed checkpoint.

    In float16 its scales are exact, and in bfloat16, by default, they are not.
    """
    plain = pico_base(tmp_path / "plain", seed=1, shards=1)
    packed = {n.removesuffix(".qweight") for n in all_tensors(made) if n.endswith(".qweight")}
    tensors = raw_tensors(plain / SHARD)
    for module in packed:
        _, shape, data = tensors[f"{module}.weight"]
        meant = np.ascontiguousarray(rounded(from_bf16(data, shape))[1], "<f4")
        tensors[f"{module}.weight"] = ("F32", shape, meant.tobytes())
    (plain / SHARD).write_bytes(safetensors_bytes(tensors))
    exact = replace(run_settings(made), served="float16")
    ours, theirs = measure_as(made, EVALUATION, exact), measure(plain, EVALUATION)
    np.testing.assert_allclose(ours.nll, theirs.nll, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.drafts, theirs.drafts)
    assert 0 < np.abs(of_made.nll - theirs.nll).max() < 0.05


def test_a_checkpoint_is_measured_in_the_precision_of_its_base(
    base: Path, made: Path, of_made: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that holds the base only in half precision, both are measured in that."""
    assert run_settings(base) == RunSettings(torch.device("cpu"), torch.float32)
    memory = psutil.virtual_memory()
    half = sum(t.nbytes for t in Checkpoint.open(base).tensors.values())
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=half))
    assert run_settings(base).dtype == torch.bfloat16
    coarse = measure_as(made, EVALUATION, run_settings(base))
    assert coarse.nll.tobytes() != of_made.nll.tobytes()
    np.testing.assert_allclose(coarse.nll, of_made.nll, atol=1.0)


def test_a_state_dict_has_one_weight_for_each_packed_module_and_nothing_packed(made: Path, base: Path) -> None:
    checkpoint = Checkpoint.open(made)
    state = state_dict(checkpoint.tensors.values(), checkpoint, run_settings(made))
    assert {n: tuple(t.shape) for n, t in state.items()} == {n: shape for n, (_, shape, _) in all_tensors(base).items()}
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_a_tensor_is_the_same_in_torch(base: Path) -> None:
    tensor = Checkpoint.open(base).tensors["model.visual.patch_embed.proj.weight"]
    theirs = from_bf16(tensor.read(), tensor.shape)
    assert to_torch(tensor).dtype == torch.bfloat16
    np.testing.assert_array_equal(to_torch(tensor).float().numpy(), theirs)


def test_a_damaged_head_changes_the_drafts_and_nothing_else(of_base: Measurement, tmp_path: Path) -> None:
    damaged = pico_base(tmp_path / "damaged", seed=1, shards=1)
    edit(damaged, SHARD, **{"mtp.fc.weight": np.zeros((64, 128))})
    one, two = of_base, measure(damaged, EVALUATION)
    np.testing.assert_array_equal(one.nll, two.nll)
    assert (one.drafts != two.drafts).any()


def test_a_checkpoint_without_a_head_has_no_acceptance(tmp_path: Path) -> None:
    found = measure(pico_base(tmp_path / "base", head=False), EVALUATION)
    assert found.acceptance is None and found.acceptance_by_position == [] and found.speculation.size == 0
    assert found.perplexity > 500


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = pico_base(tmp_path / "base", shards=1)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors = raw_tensors(folder / SHARD)
    del tensors[name]
    (folder / SHARD).write_bytes(safetensors_bytes(tensors))
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=name):
        measure(folder, EVALUATION)


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(tmp_path: Path) -> None:
    folder = pico_base(tmp_path / "base", shards=1)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors = raw_tensors(folder / SHARD)
    dtype, (rows, columns), data = tensors[name]
    tensors[name] = (dtype, (rows // 2, columns * 2), data)
    (folder / SHARD).write_bytes(safetensors_bytes(tensors))
    with pytest.raises(CheckpointError, match="up_proj"):
        measure(folder, EVALUATION)


def test_an_architecture_that_transformers_does_not_know_is_refused_by_the_file(tmp_path: Path) -> None:
    folder = pico_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    with pytest.raises(CheckpointError, match=r"config\.json|tokenizer"):
        measure(folder, EVALUATION)


def test_a_text_too_short_to_measure_on_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("x = 1\n")
    said = r"the tokenizer of base makes only 5 tokens of the text short\.txt, and measuring needs at least 48"
    with pytest.raises(CheckpointError, match=said):
        measure(base, tmp_path / "short.txt")
    made = write_quantized(base, tmp_path)
    with pytest.raises(RecipeError, match=rf"^validation\.text: {said}: name a longer text"):
        validate_folders(made, base, tmp_path / "short.txt")


def test_a_tokenizer_that_makes_too_few_tokens_is_told_and_the_base_s_tokens_are_measured(
    base: Path, tmp_path: Path
) -> None:
    folder = write_quantized(base, tmp_path / "made")
    (folder / "tokenizer.json").unlink()  # What is left of it makes one token of nearly everything.
    words = tmp_path / "words.txt"
    words.write_text("some words of a text that only its tokenizer.json can cut into tokens of their own. " * 9)
    values = validate_folders(folder, base, words)
    why = values.not_measured or ""
    assert why.startswith(f"the tokenizer of {folder.name} makes only ")
    assert why.endswith(" tokens of the text words.txt, and measuring needs at least 48")
    gates = {gate.name: gate for gate in judge(values, Gates())}
    assert gates["files"].note == "tokenizer.json of the base is missing"
    assert gates["structure"].passed and gates["lossless"].passed and gates["weight_slope"].passed
    assert gates["same_tokens"].failed and gates["same_tokens"].value is None and why in gates["same_tokens"].note
    assert gates["top1_agreement"].value is not None and gates["kl_divergence"].value is not None


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "added_tokens": [], "model": {"type": "none"}}', "[1]"])
def test_a_tokenizer_that_cannot_be_read_is_told_and_the_base_s_is_used(
    content: str, base: Path, tmp_path: Path
) -> None:
    folder = write_quantized(base, tmp_path)
    (folder / "tokenizer.json").write_text(content)
    values = validate_folders(folder, base)
    assert f"the tokenizer in {folder} cannot be loaded" in (values.not_measured or "")
    assert values.behaviour.same_tokens is None and values.divergence.kl_divergence is not None
    assert values.audit.files == ("tokenizer.json differs from the base's",)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Its tokens would index outside of the embedding."""
    folder = pico_base(tmp_path / "base", shards=1)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"makes token \d+, the model knows 100"):
        measure(folder, EVALUATION)


def values_of(ours: Path, base: Path, *measurements: Measurement) -> Measured:
    """What validate says of a folder, its base and itself measured before: `(base, ours)`."""
    kept = dict(zip((base, ours), measurements, strict=True))
    return measured_values(
        Checkpoint.open(ours),
        Checkpoint.open(base).sound(),
        lambda path, settings: kept[path],
        keep_head=True,
        pack_head=False,
        settings=run_settings(base),
    )


def test_a_quantized_checkpoint_is_compared_with_its_base(
    base: Path, made: Path, of_base: Measurement, of_made: Measurement
) -> None:
    one, two = of_base, of_made
    values = values_of(made, base, one, two)
    assert values.audit.packed == 13 and values.audit.head == 15 and values.head_kept is True
    assert values.audit.unaccounted == values.audit.altered == values.audit.not_finite == values.audit.files == ()
    assert values.behaviour.same_tokens == 1.0 and values.behaviour.tokens == 192
    assert values.behaviour.perplexity_increase == pytest.approx(two.perplexity / one.perplexity - 1)
    assert values.behaviour.top1_agreement == pytest.approx(float((one.top1 == two.top1).mean()))
    assert 0 < values.behaviour.top1_agreement < 1
    assert (
        values.behaviour.quantized.mtp_acceptance == two.acceptance
        and values.behaviour.base.mtp_acceptance == one.acceptance
    )
    assert len(values.matrices or ()) == 13 and [block.block for block in values.divergence.blocks or ()] == [0, 1]
    assert (
        values.divergence.vision_difference == 0.0
        and values.behaviour.long_context == values.behaviour.speculative_agreement == 1.0
    )
    assert values.behaviour.base_long_context == values.behaviour.base_speculative_agreement == 1.0
    assert values.behaviour.base_most_repeated_token == pytest.approx(
        np.mean([most_repeated(tokens) for tokens in one.generated.tolist()])
    )


def test_the_divergence_is_that_of_the_whole_distributions(
    base: Path, made: Path, of_base: Measurement, of_made: Measurement
) -> None:
    """Against plain forwards of both transformers models."""
    ids = torch.from_numpy(of_base.tokens).long()
    with torch.inference_mode():
        theirs, ours = (
            load_model(Checkpoint.open(path), RunSettings(torch.device("cpu"), torch.float32))(input_ids=ids).logits[
                :, :-1
            ]
            for path in (base, made)
        )
        expected = torch.nn.functional.kl_div(
            ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
    values = values_of(made, base, of_base, of_made)
    assert values.divergence.kl_divergence == pytest.approx(float(expected.mean()), rel=1e-3)
    assert values.divergence.kl_divergence_p99 == pytest.approx(float(expected.flatten().quantile(0.99)), rel=1e-2)


def test_a_base_compared_with_itself_agrees_with_itself(base: Path, of_base: Measurement) -> None:
    values = side_by_side(of_base, of_base)
    assert (values.perplexity_increase, values.top1_agreement, values.same_tokens) == (0.0, 1.0, 1.0)
    assert values.perplexity_increase_interval == (0.0, 0.0)
    more = compare_folders(base, base, of_base, of_base, run_settings(base))
    assert all(block.error < 1e-6 and block.drift == 0 for block in more.blocks or ())
    assert more.kl_divergence == pytest.approx(0, abs=1e-6) and more.vision_difference == 0.0


def test_a_broken_block_is_seen_by_itself_and_by_what_comes_after_it(
    base: Path, of_base: Measurement, tmp_path: Path
) -> None:
    """Its own error says which one it is; those behind it work well on what they would have been given."""
    broken = pico_base(tmp_path / "broken", seed=1, shards=1)
    edit(broken, SHARD, **{"model.language_model.layers.0.mlp.down_proj.weight": np.zeros((64, 128))})
    blocks = compare_folders(broken, base, measure(broken, EVALUATION), of_base, run_settings(base)).blocks or ()
    assert blocks[0].error > 0.2 and blocks[1].error < 1e-4
    assert blocks[0].drift > 0.05 and blocks[1].drift > 0.05


def test_other_tokens_are_not_compared(of_base: Measurement) -> None:
    one = of_base
    shorter = replace(one, tokens=one.tokens[:2], nll=one.nll[:2], top1=one.top1[:2], drafts=one.drafts[:, :2])
    values = side_by_side(one, shorter)
    assert (values.same_tokens, values.top1_agreement, values.perplexity_increase) == (0.0, 0.0, None)


def test_a_model_whose_predictions_are_no_numbers_has_no_acceptance(of_base: Measurement) -> None:
    """It chooses token 0 everywhere, and so do its drafts."""
    values = side_by_side(of_base, replace(of_base, nll=np.full_like(of_base.nll, np.nan)))
    assert values.mtp_acceptance_ratio is None and values.speculative_agreement is None
    assert values.quantized.mtp_acceptance is None and values.base.mtp_acceptance is not None
    assert values.quantized.mtp_acceptance_by_position == values.quantized.greedy_acceptance_by_position == ()


def test_two_folders_are_measured_and_compared(base: Path, made: Path) -> None:
    values = validate_folders(made, base)
    gates = {g.name: g for g in judge(values, Gates())}
    assert all(gates[name].passed for name in ("structure", "lossless", "finite", "files", "same_tokens"))
    assert gates["perplexity_increase"].value is not None and gates["top1_agreement"].value is not None


def test_quantized_weights_are_loaded_once_for_all_that_is_measured_and_then_dropped(
    base: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring, decoding and the comparison of blocks share them; the base is read again for its noise floor."""
    read: list[tuple[Path, int | str]] = []
    used: list[Skeleton] = []
    to_state = Skeleton._read

    def _read(self: Skeleton, part: int | str) -> dict[str, torch.Tensor]:
        read.append((self.checkpoint.folder, part))
        used.append(self)
        return to_state(self, part)

    monkeypatch.setattr(Skeleton, "_read", _read)
    values = validate_folders(made, base)
    assert values.divergence.blocks and values.divergence.kl_noise_floor is not None
    assert [read.count((made, part)) for part in ("ends", 0, 1)] == [1, 1, 1]
    assert [read.count((base, part)) for part in (0, 1)] == [2, 2]
    assert all(
        p.is_meta for skeleton in used if skeleton.checkpoint.folder == made for p in skeleton.model.parameters()
    )


def test_device_and_precision_are_chosen_once_for_all_that_is_compared(
    base: Path, made: Path, of_base: Measurement, of_made: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much memory of a GPU is free changes in between."""
    choices = iter([torch.float32])
    monkeypatch.setattr(measuring, "pick_dtype", lambda *_: next(choices))
    monkeypatch.setattr(measuring, "measure", lambda path, *_: {base: of_base, made: of_made}[path])
    assert validate_folders(made, base).divergence.kl_noise_floor is not None


def test_a_checkpoint_whose_head_was_dropped_is_compared_without_it(base: Path, tmp_path: Path) -> None:
    values = validate_folders(write_quantized(base, tmp_path, head=False), base)
    assert (
        values.head_kept is False
        and values.audit.unaccounted == ()
        and values.behaviour.quantized.mtp_acceptance is None
    )
    assert "mtp_acceptance_ratio" not in {g.name for g in judge(values, Gates())}


def test_a_checkpoint_that_cannot_be_run_fails_its_gates_and_raises_nothing(base: Path, tmp_path: Path) -> None:
    folder = write_quantized(base, tmp_path)
    (folder / SHARD).unlink()
    values = validate_folders(folder, base)
    failed = {g.name for g in judge(values, Gates()) if not g.passed}
    assert {"structure", "perplexity_increase", "top1_agreement", "mtp_acceptance_ratio"} <= failed
