"""The MTP head and greedy decoding in torch, on the trained tiny model: random weights draft nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import CheckpointError
from requant.tasks.texts.text import EVALUATION
from requant.tasks.validating.decode import agreement, decode, decode_in_blocks, speculate
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import RunSettings, Skeleton, load_model, load_tokenizer
from tests.factories.bases import other_base
from tests.factories.paths import TINY
from tests.factories.pico import pico_base
from tests.factories.stepwise import speculate_by_steps

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


def prompts(text: torch.Tensor, count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.stack([text[100 * n : 100 * n + length] for n in range(count)])


@pytest.fixture(scope="module")
def plain(skeleton: Skeleton, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the prompts are continued with, a token at a time; three more than are asked for."""
    return decode(skeleton, prompts(text), TOKENS + 3)


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
def test_speculative_decoding_is_that_of_an_engine_and_gives_the_tokens_of_plain_decoding(
    skeleton: Skeleton, head: MtpHead, text: torch.Tensor, plain: tuple[torch.Tensor, torch.Tensor], drafts: int
) -> None:
    """Token for token and step for step, with drafts taken and refused on the way."""
    greedy = plain[0][:, : TOKENS + drafts]
    found = speculate(skeleton, head, prompts(text), greedy, drafts)
    assert [one.tokens for one in found] == greedy[:, :TOKENS].tolist()
    by_steps = [speculate_by_steps(skeleton, head, prompt, TOKENS, drafts) for prompt in prompts(text)]
    for one, other in zip(found, by_steps, strict=True):
        assert (one.tokens, one.steps, one.accepted) == (other.tokens, other.steps, other.accepted)
        assert one.accepted == sorted(one.accepted, reverse=True) and one.steps >= one.accepted[0]
    taken, steps = sum(one.accepted[-1] for one in found), sum(one.steps for one in found)
    assert taken > 5 and steps - taken > 5


def test_passes_of_several_tokens_that_choose_otherwise_show_in_the_tokens(
    skeleton: Skeleton, head: MtpHead, text: torch.Tensor, plain: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """A text that the model would not write: from its first token on, the model's own choice is another one."""
    changed = plain[0].clone()
    changed[1, 5] = (changed[1, 5] + 1) % 2000
    first, second, third = speculate(skeleton, head, prompts(text), changed, 3)
    assert first.tokens == changed[0, :TOKENS].tolist() and third.tokens == changed[2, :TOKENS].tolist()
    assert second.tokens[:6] == plain[0][1, :6].tolist()
    assert agreement(changed[1, :TOKENS].tolist(), [1.0] * TOKENS, second.tokens) == 5 / TOKENS


def test_several_prompts_are_continued_as_each_by_itself(
    skeleton: Skeleton, text: torch.Tensor, plain: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for prompt, tokens, leads in zip(prompts(text), *plain, strict=True):
        alone, own_leads = decode(skeleton, prompt[None], TOKENS)
        assert torch.equal(alone[0], tokens[:TOKENS])
        torch.testing.assert_close(own_leads[0], leads[:TOKENS], rtol=1e-3, atol=1e-3)


def test_plain_decoding_is_transformers_own(
    skeleton: Skeleton, text: torch.Tensor, plain: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = load_model(skeleton.checkpoint, ON_CPU)
    prompt = prompts(text)[1]
    output = model.generate(
        input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False, min_new_tokens=TOKENS,
        max_new_tokens=TOKENS, pad_token_id=0,
    )  # fmt: skip
    assert plain[0][1, :TOKENS].tolist() == output[0, len(prompt) :].tolist()


def test_decoding_block_by_block_gives_the_same_tokens(
    skeleton: Skeleton, text: torch.Tensor, plain: tuple[torch.Tensor, torch.Tensor]
) -> None:
    streamed = Skeleton(skeleton.checkpoint, ON_CPU)
    streamed.load_ends()
    assert torch.equal(decode_in_blocks(streamed, prompts(text), 5), plain[0][:, :5])


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
