"""Speculative decoding step by step, as an engine does it, with a cache: what `speculate` of decode.py must agree with.

All drafts of a step are verified in one pass of the main model. A recurrent state cannot be cropped. So after a draft
is refused, the cache (keys and values, convolution and delta rule states) is set back to what it was before the pass,
and only the accepted tokens are read again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import Skeleton


@dataclass
class Stepwise:
    """The tokens, the steps, and how many of these accepted each draft and all before it."""

    tokens: list[int]
    steps: int = 0
    accepted: list[int] = field(default_factory=list)


def speculate_by_steps(skeleton: Skeleton, head: MtpHead, prompt: torch.Tensor, new: int, drafts: int) -> Stepwise:
    """Decode `new` tokens after a prompt, int64 `[n]`, with `drafts` drafts per step. All weights must be loaded."""
    cache, head_cache = DynamicCache(config=skeleton.text.config), head.cache()
    hidden = _read(skeleton, prompt, cache)
    result = Stepwise([], accepted=[0] * drafts)
    # The head reads each hidden state together with the token that follows it. `unread`: states that it has not read.
    unread, tokens = hidden, torch.cat([prompt[1:], skeleton.logits(hidden[-1:]).argmax(-1)])
    result.tokens.append(int(tokens[-1]))
    while len(result.tokens) < new:
        guesses = _draft(skeleton, head, head_cache, unread, tokens, drafts)
        cache_before = copy.deepcopy(cache)
        fed = torch.cat([tokens[-1:], guesses])
        hidden = _read(skeleton, fed, cache)
        choices = skeleton.logits(hidden).argmax(-1)
        accepted = int((guesses == choices[:-1]).long().cumprod(0).sum())
        if accepted < drafts:
            cache = cache_before
            hidden = _read(skeleton, fed[: accepted + 1], cache)
        unread, tokens = hidden, choices[: accepted + 1]
        result.tokens += tokens.tolist()
        result.steps += 1
        for position in range(accepted):
            result.accepted[position] += 1
    del result.tokens[new:]
    return result


def _read(skeleton: Skeleton, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Run tokens, int64 `[n]`, after those in the cache. Returns hidden states after the final norm, `[n, hidden]`."""
    output = skeleton.text(input_ids=tokens[None], past_key_values=cache, use_cache=True)
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


def _draft(
    skeleton: Skeleton, head: MtpHead, cache: DynamicCache, unread: torch.Tensor, tokens: torch.Tensor, drafts: int
) -> torch.Tensor:
    """Draft tokens after `tokens`: int64 `[drafts]`. Afterwards the cache holds true tokens and none of the drafts."""
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
