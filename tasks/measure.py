"""What a checkpoint does on the pinned text: next-token losses and choices, drafts of the head, a greedy continuation.

Measured the same way for a base and for what was made of it, and kept: gates compare two such records.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from tasks.checkpoint.checkpoint import Checkpoint
from tasks.errors import CheckpointError
from tasks.model import MtpHead, free, greedy, load_model, load_tokenizer, pick_device, pick_dtype, text_model

VERSION = 1  # raise it when the same checkpoint and text give other values
WINDOWS, LENGTH = 24, 512  # tokens measured on: 24 windows of 512, spread over the text
PROMPT, GENERATED = 32, 48  # tokens
log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measurement:
    """Arrays by position. n windows of L tokens.

    tokens int32 [n, L]; nll float32 [n, L-1], natural log, of token t+1 after the tokens up to t; top1 int32
    [n, L-1], the choice at t; draft int32 [n, L-1], the head's choice for token t+2 (empty without a head);
    generated int32 [GENERATED], greedy.
    """

    tokens: Ints
    nll: Floats
    top1: Ints
    draft: Ints
    generated: Ints

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll.mean(dtype=np.float64)))

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that the main model would choose itself, given the true text before them."""
        if not self.draft.size:
            return None
        return float((self.draft[:, :-1] == self.top1[:, 1:]).mean())

    def to_bytes(self) -> bytes:
        return save_arrays({k: np.ascontiguousarray(v) for k, v in vars(self).items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> Measurement:
        return cls(**load_arrays(data))


@torch.inference_mode()
def measure(
    folder: Path,
    text: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    remote_code: bool = False,
    say: Callable[[str], None] = log.info,
) -> Measurement:
    """Run a checkpoint over a text. Raises CheckpointError if it cannot be loaded."""
    checkpoint = Checkpoint.open(folder).sound()
    tokens = windows(folder, text, checkpoint, remote_code=remote_code)
    model = load_model(checkpoint, dtype, device, remote_code=remote_code)
    head = MtpHead(checkpoint, model, dtype, device) if checkpoint.head and checkpoint.head.layout == "mtp" else None
    say(f"measuring {folder.name} on {tokens.size:,} tokens ({str(dtype).removeprefix('torch.')}, {device})")
    nll, top1, draft = [], [], []
    for row in tokens:
        ids = torch.from_numpy(row[None]).long().to(device)
        hidden = text_model(model)(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden[:, :-1]).float()
        nll.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").cpu().numpy())
        top1.append(logits[0].argmax(-1).int().cpu().numpy())
        if head is not None:
            draft.append(head(ids, hidden)[0].argmax(-1).int().cpu().numpy())
    generated = greedy(model, torch.from_numpy(tokens[:1, :PROMPT]).long().to(device), GENERATED)
    del model, head
    free(device)
    drafts = np.stack(draft) if draft else np.zeros((0, 0), np.int32)
    return Measurement(tokens, np.stack(nll), np.stack(top1), drafts, generated.int().cpu().numpy())


def precision(base: Path) -> tuple[torch.device, torch.dtype]:
    """Where and in what a base is measured, and everything that is compared with it."""
    parameters = sum(math.prod(t.shape) for t in Checkpoint.open(base).tensors.values())
    device = pick_device(parameters)
    return device, pick_dtype(parameters, device)


def windows(folder: Path, text: Path, checkpoint: Checkpoint, *, remote_code: bool = False) -> Ints:
    """The pinned tokens `[windows, length]`, spread evenly over the text."""
    tokenizer = load_tokenizer(folder, remote_code=remote_code)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    length = min(LENGTH, int(checkpoint.text_config.get("max_position_embeddings") or LENGTH))
    count = min(WINDOWS, len(ids) // length)
    if count < 1:
        raise CheckpointError(f"the tokenizer of {folder} makes {len(ids)} tokens of {text.name}: too few to measure")
    stride = (len(ids) - length) // max(count - 1, 1)
    vocabulary = int(checkpoint.text_config.get("vocab_size") or 1 << 31)
    tokens: Ints = np.array([ids[i * stride : i * stride + length] for i in range(count)], dtype=np.int32)
    if int(tokens.max()) >= vocabulary:
        raise CheckpointError(f"the tokenizer of {folder} makes token {tokens.max()}, the model knows {vocabulary}")
    return tokens
