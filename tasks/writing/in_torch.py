"""Write rows with transformers: many at once, and each with a seed of its own.

A token is drawn from the base's whole distribution at temperature 1, as with SAMPLING in in_vllm.py. Adding to each
logit an own draw from the Gumbel distribution and taking the largest sum draws from the softmax of the logits (Maddison
et al., "A* sampling", 2014, section 2). Each row has a generator for that, so its tokens do not depend on the rows that
are written with it, except for the rounding of batched products.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import torch
import transformers

from requant.tasks.errors import OutOfMemory
from requant.tasks.formatting import gigabytes
from requant.tasks.validating.model import Skeleton, few_threads, free
from requant.tasks.writing.rows import Order

MAX_WIDTH = 32  # rows at once
log = logging.getLogger(__name__)


class GumbelNoise:
    """A logits processor that adds noise, from one generator a row: the largest sum is a draw from the softmax."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return float32 scores `[rows, vocabulary]` with noise, of scores in any precision."""
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log()


class TorchWriter:
    """Writes rows of at most `row_tokens` tokens with a model whose weights are all in memory."""

    def __init__(self, skeleton: Skeleton, stops: Collection[int], row_tokens: int) -> None:
        self.skeleton, self._stops, self._row_tokens = skeleton, sorted(stops), row_tokens
        self._width = MAX_WIDTH
        skeleton.model.generation_config = transformers.GenerationConfig()  # penalties of old configs would be added

    def __call__(self, orders: Sequence[Order]) -> list[list[int]]:
        """Return the answers as token ids, each with the id that ended it, if one did.

        Rows with prompts of similar lengths are written together, so that little is padded. Where the memory does not
        suffice, fewer are written at once. Raises OutOfMemory if it does not for one.
        """
        answers: dict[int, list[int]] = {}
        left = sorted(orders, key=lambda order: len(order.start.tokens))
        while left:
            group = left[: self._width]
            try:
                written = self._write(group)
            except torch.OutOfMemoryError as error:
                free(self.skeleton.device)
                if self._width == 1:
                    raise OutOfMemory(
                        f"the base has {gigabytes(self.skeleton.nbytes)} of weights on {self.skeleton.device}, which "
                        "leave no room to write one row: install vLLM, or name another text as quantize.calibration"
                    ) from error
                self._width //= 2
                log.info(f"writing {self._width} rows at once, for lack of memory")
                continue
            answers |= {order.number: answer for order, answer in zip(group, written, strict=True)}
            left = left[len(group) :]
        return [answers[order.number] for order in orders]

    def _write(self, orders: Sequence[Order]) -> list[list[int]]:
        prompts = [order.start.tokens for order in orders]
        longest, device = max(map(len, prompts)), self.skeleton.device
        pad = self._stops[0] if self._stops else 0
        ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        settings = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=self._row_tokens - min(map(len, prompts)),
            eos_token_id=self._stops or None,
            pad_token_id=pad,
        )
        with torch.inference_mode(), few_threads(self.skeleton.nbytes):
            written = self.skeleton.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=[GumbelNoise([order.seed for order in orders], device)],
            )
        rows = written[:, longest:].tolist()
        return [self._cut(row, self._row_tokens - len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]

    def _cut(self, answer: list[int], most: int) -> list[int]:
        """Cut an answer behind the id that ended it, and to `most` tokens."""
        ends = [place for place, token in enumerate(answer[:most]) if token in self._stops]
        return answer[: ends[0] + 1 if ends else most]
