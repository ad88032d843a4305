"""Greedy decoding in torch: plain, and speculative with the MTP head as an engine does it.

The speculative decoder verifies all drafts of a step in one pass of the main model. A recurrent state cannot be
cropped. So after a draft is refused, the cache (keys and values, convolution and delta rule states) is set back to what
it was before the pass, and only the accepted tokens are read again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from requant.tasks.progress import progress
from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import Skeleton

TIE = 1e-3  # logits closer than this are a tie, which passes of one token and of several may break differently


@dataclass
class Speculation:
    """The tokens, and the fate of the drafts: `accepted[k]` of `steps` steps accepted draft k and all before it."""

    tokens: list[int]
    steps: int = 0
    accepted: list[int] = field(default_factory=list)


def decode(skeleton: Skeleton, prompt: torch.Tensor, new: int) -> tuple[list[int], list[float]]:
    """Decode `new` tokens after a prompt, int64 `[n]`. All weights must be loaded.

    The second list has the difference of the best two logits at each token.
    """
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
    """Decode `new` tokens after each of several prompts, int64 `[rows, n]` -> `[rows, new]`.

    One block is in memory at a time, so that each token costs a pass over all weights.
    """
    tokens = prompts
    with progress("continuations", new * len(skeleton.blocks), "blocks") as bar:
        for _ in range(new):
            (hidden,) = run_blocks(skeleton, [Rows.of(skeleton, tokens)], lambda number: bar.advance())
            tokens = torch.cat([tokens, skeleton.logits(hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :]


def speculate(skeleton: Skeleton, head: MtpHead, prompt: torch.Tensor, new: int, drafts: int) -> Speculation:
    """Decode `new` tokens after a prompt, int64 `[n]`, with `drafts` drafts per step. All weights must be loaded."""
    cache, head_cache = DynamicCache(config=skeleton.text.config), head.cache()
    hidden = _read(skeleton, prompt, cache)
    result = Speculation([], accepted=[0] * drafts)
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


def agreement(plain: list[int], leads: list[float], speculative: list[int]) -> float:
    """Return the share of tokens before the first that differs. 1.0 if that token was a tie, broken the other way.

    `leads`: the difference of the best two logits at each token of plain decoding.
    """
    for index, (one, other) in enumerate(zip(plain, speculative, strict=True)):
        if one != other:
            return 1.0 if leads[index] < TIE else index / len(plain)
    return 1.0
