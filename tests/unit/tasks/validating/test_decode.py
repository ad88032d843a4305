"""The MTP head and greedy decoding in torch, on the trained tiny model: random weights draft nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import CheckpointError
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validating import decode as decoding
from requant.tasks.validating.decode import agreement, decode, decode_in_blocks, speculate
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import RunSettings, Skeleton, load_model, load_tokenizer
from tests.factories.bases import other_base
from tests.factories.paths import TINY
from tests.factories.pico import pico_base

CPU = torch.device("cpu")
ON_CPU = RunSettings(CPU, torch.float32)
TOKENS = 30  # generated after each prompt


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    made = Skeleton(Checkpoint.open(TINY), ON_CPU)
    made.hold()
    return made


@pytest.fixture(scope="module")
def head(skeleton: Skeleton) -> MtpHead:
    return MtpHead(skeleton.checkpoint, skeleton)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.tensor(load_tokenizer(TINY)(EVALUATION.read_text()[:4000])["input_ids"])


def prompts(text: torch.Tensor, count: int = 3, length: int = 24) -> list[torch.Tensor]:
    return [text[100 * n : 100 * n + length] for n in range(count)]


@pytest.fixture(scope="module")
def plain(skeleton: Skeleton, text: torch.Tensor) -> list[tuple[list[int], list[float]]]:
    """What each prompt is continued with, a token at a time."""
    return [decode(skeleton, prompt, TOKENS) for prompt in prompts(text)]


def test_drafts_at_all_places_at_once_are_those_made_one_after_the_other(
    skeleton: Skeleton, head: MtpHead, text: torch.Tensor
) -> None:
    """Three drafts after every beginning of a text, with a cache, as an engine makes them."""
    tokens = text[:40]
    hidden = skeleton.text(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    at_once = head.drafts(tokens, hidden, 3)
    assert at_once.shape == (3, 39)
    for place in (0, 1, 17, 38):
        cache, seen = head.cache(), torch.arange(place + 1)
        state = head(tokens[None, 1 : place + 2], hidden[None, : place + 1], seen[None], cache=cache)[0, -1:]
        for step in range(3):
            drafted = skeleton.logits(state).argmax(-1)
            assert int(drafted) == int(at_once[step, place])
            state = head(drafted[None], state[None], torch.tensor([[place + 1 + step]]), cache=cache)[0]


@pytest.mark.parametrize("drafts", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_speculative_decoding_gives_the_tokens_of_plain_decoding(
    skeleton: Skeleton, head: MtpHead, text: torch.Tensor, plain: list[tuple[list[int], list[float]]], drafts: int
) -> None:
    """Token for token, with drafts taken and refused on the way."""
    taken = refused = 0
    for prompt, (tokens, leads) in zip(prompts(text), plain, strict=True):
        found = speculate(skeleton, head, prompt, TOKENS, drafts)
        assert found.tokens == tokens and agreement(tokens, leads, found.tokens) == 1.0
        assert found.accepted == sorted(found.accepted, reverse=True) and found.steps >= found.accepted[0]
        taken, refused = taken + found.accepted[-1], refused + found.steps - found.accepted[-1]
    assert taken > 5 and refused > 5


def test_plain_decoding_is_transformers_own(
    skeleton: Skeleton, text: torch.Tensor, plain: list[tuple[list[int], list[float]]]
) -> None:
    model = load_model(skeleton.checkpoint, ON_CPU)
    prompt = prompts(text)[1]
    output = model.generate(
        input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, min_new_tokens=TOKENS,
        max_new_tokens=TOKENS, pad_token_id=0,
    )  # fmt: skip
    assert plain[1][0] == output[0, len(prompt) :].tolist()


def test_without_the_state_from_before_a_refused_draft_the_text_goes_wrong(
    skeleton: Skeleton,
    head: MtpHead,
    text: torch.Tensor,
    plain: list[tuple[list[int], list[float]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the restored state is for: a copy that is none leaves the refused drafts in the recurrent state."""
    monkeypatch.setattr(decoding.copy, "deepcopy", lambda cache: cache)
    assert any(
        speculate(skeleton, head, prompt, TOKENS, 3).tokens != tokens
        for prompt, (tokens, _) in zip(prompts(text), plain, strict=True)
    )


def test_decoding_block_by_block_gives_the_same_tokens(skeleton: Skeleton, text: torch.Tensor) -> None:
    streamed = Skeleton(skeleton.checkpoint, ON_CPU)
    streamed.load_ends()
    rows = prompts(text, 2)
    expected = [decode(skeleton, prompt, 5)[0] for prompt in rows]
    assert decode_in_blocks(streamed, torch.stack(rows), 5).tolist() == expected


def test_tokens_that_differ_at_a_tie_agree_and_others_do_not() -> None:
    leads = [1.0, 1.0, 1e-5, 1.0]
    assert agreement([1, 2, 3, 4], leads, [1, 2, 3, 4]) == 1.0
    assert agreement([1, 2, 3, 4], leads, [1, 2, 9, 9]) == 1.0
    assert agreement([1, 2, 3, 4], leads, [1, 9, 3, 4]) == 0.25


def test_a_head_of_another_layout_or_without_its_fusion_layer_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    plain = Checkpoint.open(other_base(tmp_path_factory.mktemp("llama"), "llama"))
    with pytest.raises(CheckpointError, match="no layout that can be run in torch"):
        MtpHead(plain, Skeleton(plain, ON_CPU))
    pico = Checkpoint.open(pico_base(tmp_path_factory.mktemp("pico")))
    whole = pico.head
    assert whole is not None
    main = Skeleton(pico, ON_CPU)
    lacking = copy.copy(whole)
    object.__setattr__(lacking, "names", tuple(name for name in whole.names if name != "mtp.fc.weight"))
    pico.__dict__["head"] = lacking
    with pytest.raises(CheckpointError, match=r"lacks 'fc\.weight'"):
        MtpHead(pico, main)
