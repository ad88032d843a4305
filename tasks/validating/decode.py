"""Greedy decoding in torch: plainly, and speculatively with the MTP head as an engine does it.

The speculative decoder verifies all drafts of a step in one pass of the main model. Where one is refused, keys and
values, convolution and delta rule states go back to what they were before the pass, and only what was accepted is read
again: a recurrent state cannot be cropped.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import Skeleton

TIE = 1e-3  # logits this close are a tie, which a pass of one token and one of several may break differently


@dataclass
class Speculation:
    """What became of the drafts: `accepted[k]` of `steps` steps took the draft at position k and all before it."""

    tokens: list[int]
    steps: int = 0
    accepted: list[int] = field(default_factory=list)


def decode(skeleton: Skeleton, prompt: torch.Tensor, new: int) -> tuple[list[int], list[float]]:
    """`new` greedy tokens after a prompt, int64 `[n]`, and by how much each logit led. Every weight is held."""
    cache = DynamicCache(config=skeleton.text.config)
    fed = prompt
    tokens: list[int] = []
    leads: list[float] = []
    while len(tokens) < new:
        logits = skeleton.logits(_read(skeleton, fed, cache)[-1])
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
        fed = best.indices[:1]
    return tokens, leads


def decode_in_blocks(skeleton: Skeleton, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """The same for `[rows, n]` prompts at once -> `[rows, new]`, with one block in memory: a pass over all for each."""
    tokens = prompts
    for _ in range(new):
        (hidden,) = run_blocks(skeleton, [Rows.of(skeleton, tokens)])
        tokens = torch.cat([tokens, skeleton.logits(hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :]


def speculate(skeleton: Skeleton, head: MtpHead, prompt: torch.Tensor, new: int, drafts: int) -> Speculation:
    """`new` greedy tokens after a prompt with `drafts` draft tokens a step. Every weight is held."""
    main, drafted = DynamicCache(config=skeleton.text.config), head.cache()
    hidden = _read(skeleton, prompt, main)
    found = Speculation([], accepted=[0] * drafts)
    # The head reads hidden states beside the tokens that follow them: `unread` are those that it has not seen yet.
    unread, tokens = hidden, torch.cat([prompt[1:], skeleton.logits(hidden[-1:]).argmax(-1)])
    found.tokens.append(int(tokens[-1]))
    while len(found.tokens) < new:
        guesses = _draft(skeleton, head, drafted, unread, tokens, drafts)
        before = copy.deepcopy(main)
        fed = torch.cat([tokens[-1:], guesses])
        hidden = _read(skeleton, fed, main)
        choices = skeleton.logits(hidden).argmax(-1)
        taken = int((guesses == choices[:-1]).long().cumprod(0).sum())
        if taken < drafts:
            main = before
            hidden = _read(skeleton, fed[: taken + 1], main)
        unread, tokens = hidden, choices[: taken + 1]
        found.tokens += tokens.tolist()
        found.steps += 1
        for position in range(taken):
            found.accepted[position] += 1
    del found.tokens[new:]
    return found


def _read(skeleton: Skeleton, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Tokens `[n]` after those in the cache -> their hidden states `[n, hidden]`, after the final norm."""
    output = skeleton.text(input_ids=tokens[None], past_key_values=cache, use_cache=True)
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def _draft(
    skeleton: Skeleton, head: MtpHead, cache: DynamicCache, unread: torch.Tensor, tokens: torch.Tensor, drafts: int
) -> torch.Tensor:
    """`drafts` guesses after `tokens`, `[drafts]`. The cache keeps what is true, and nothing that was guessed."""
    begin = cache.get_seq_length()
    positions = torch.arange(begin, begin + len(tokens), device=tokens.device)
    state = head(tokens[None], unread[None], positions[None], cache=cache)[0, -1:]
    guesses = [skeleton.logits(state).argmax(-1)]
    for step in range(1, drafts):
        state = head(guesses[-1][None], state[None], positions[None, -1:] + step, cache=cache)[0]
        guesses.append(skeleton.logits(state).argmax(-1))
    if drafts > 1:
        cache.crop(1 - drafts)
    return torch.cat(guesses)


def agreement(plain: list[int], leads: list[float], speculative: list[int]) -> float:
    """The share of tokens that are equal, up to the first tie that was broken the other way."""
    for place, (one, other) in enumerate(zip(plain, speculative, strict=True)):
        if one != other:
            return 1.0 if leads[place] < TIE else place / len(plain)
    return 1.0
