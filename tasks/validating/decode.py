"""Greedy decoding in torch, and speculative decoding with the MTP head of the same text.

A speculative decoder keeps a draft only where the main model, which reads all drafts of a step in one pass, chooses the
same token. So it writes what plain decoding writes. Once that text is there, one pass over it says what the main model
chooses in passes of several tokens, and which drafts an engine would keep at each of its steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from requant.tasks.progress import progress
from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.model import Skeleton

TIE = 1e-3  # logits closer than this are a tie, which passes of one token and of several may break differently


@dataclass(frozen=True)
class Speculation:
    """The tokens, and the fate of the drafts: `accepted[k]` of `steps` steps accepted draft k and all before it."""

    tokens: list[int]
    steps: int
    accepted: list[int]


def decode(skeleton: Skeleton, prompts: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode `new` tokens after each of several prompts, int64 `[rows, n]` -> `[rows, new]`. All weights must be there.

    Also returns the difference of the best two logits at each token, float32 `[rows, new]`.
    """
    cache = DynamicCache(config=skeleton.text.config)
    fed, tokens, leads = prompts, [], []
    with progress("continuations", len(prompts) * new, "tokens") as bar:
        for _ in range(new):
            output = skeleton.text(input_ids=fed, past_key_values=cache, use_cache=True)
            best = skeleton.logits(output.last_hidden_state[:, -1]).topk(2)
            fed = best.indices[:, :1]
            tokens.append(fed[:, 0])
            leads.append(best.values[:, 0] - best.values[:, 1])
            bar.advance(len(prompts))
    return torch.stack(tokens, dim=1), torch.stack(leads, dim=1)


def decode_in_blocks(skeleton: Skeleton, prompts: torch.Tensor, new: int) -> torch.Tensor:
    """Decode as `decode`, with one block in memory at a time, so that each token costs a pass over all weights."""
    tokens = prompts
    with progress("continuations", new * len(skeleton.blocks), "blocks") as bar:
        for _ in range(new):
            (hidden,) = run_blocks(skeleton, [Rows.of(skeleton, tokens[None])], lambda number: bar.advance())
            tokens = torch.cat([tokens, skeleton.logits(hidden[:, -1]).argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompts.shape[1] :]


def speculate(
    skeleton: Skeleton, head: MtpHead, prompts: torch.Tensor, greedy: torch.Tensor, drafts: int
) -> list[Speculation]:
    """Decode speculatively after each of several prompts, int64 `[rows, n]`, with `drafts` drafts per step.

    `greedy`: the tokens of plain decoding, int64 `[rows, new + drafts]`, with as many at the end as the last step may
    look ahead. All weights must be loaded.
    """
    begin, new = prompts.shape[1] - 1, greedy.shape[1] - drafts
    text = torch.cat([prompts, greedy], dim=1)
    hidden = skeleton.text(input_ids=text, use_cache=False).last_hidden_state
    choices = skeleton.logits(hidden[:, begin:-1]).argmax(-1)
    speculations = []
    for row, states, chosen in zip(text, hidden, choices, strict=True):
        guesses = head.drafts(row, states, drafts)[:, begin:]
        # After `have` tokens, the drafts are guesses[:, have - 1], and the model chooses chosen[have:] in their place.
        ahead = chosen.unfold(0, drafts, 1)[1 : new + 1].T
        kept = (guesses[:, : ahead.shape[1]] == ahead).long().cumprod(0).sum(0).tolist()
        have, kept_by_step = 1, []
        while have < new:
            kept_by_step.append(kept[have - 1])
            have += kept[have - 1] + 1
        accepted = [sum(count > position for count in kept_by_step) for position in range(drafts)]
        speculations.append(Speculation(chosen[:new].tolist(), len(kept_by_step), accepted))
    return speculations


def agreement(plain: list[int], leads: list[float], speculative: list[int]) -> float:
    """Return the share of tokens before the first that differs. 1.0 if that token was a tie, broken the other way.

    `leads`: the difference of the best two logits at each token of plain decoding.
    """
    for index, (one, other) in enumerate(zip(plain, speculative, strict=True)):
        if one != other:
            return 1.0 if leads[index] < TIE else index / len(plain)
    return 1.0
