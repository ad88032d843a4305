"""What a checkpoint does on the pinned text: next-token losses and choices, drafts of the head, greedy continuations,
the vision tower on synthetic pixels, a text as long as fits.

Measured the same way for a base and for what was made of it, with one decoder block in memory at a time, and kept:
gates compare two such records.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch

from requant.tasks.checkpoint.blocks import streaming_parameters
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import CheckpointError, TooFewTokens
from requant.tasks.validating import LENGTH, PROBE, WINDOWS, window_count, window_length
from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.decode import agreement, decode, decode_in_blocks, speculate
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.measured import Floats, Ints, Measurement
from requant.tasks.validating.model import Skeleton, few_threads, free, load_tokenizer, pick_device, pick_dtype, room
from requant.tasks.validating.vision import features

VERSION = 2  # raise it when the same checkpoint and text give other values
DRAFTS = 3  # as far as engines draft
PROMPTS, PROMPT, GENERATED = 4, 32, 48  # greedy continuations, in tokens
GENERATED_IN_BLOCKS = 8  # where every token costs a pass over all weights
MAX_TEXT_TOKENS = {"cpu": 4096, "cuda": 131_072}  # tokens of one text: more takes longer than everything else
PROGRESS_INTERVAL_S = 15.0  # seconds between two lines of progress
log = logging.getLogger(__name__)


@torch.inference_mode()
def measure(
    folder: Path,
    text: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    remote_code: bool = False,
) -> Measurement:
    """Run a checkpoint over a text. Raises CheckpointError if it cannot be loaded, TooFewTokens from its tokenizer."""
    checkpoint = Checkpoint.open(folder).sound()
    tokens = windows(folder, text, checkpoint, remote_code=remote_code)
    skeleton = Skeleton(checkpoint, dtype, device, remote_code=remote_code)
    log.info(f"measuring {folder.name} on {tokens.size:,} tokens ({str(dtype).removeprefix('torch.')}, {device})")
    with few_threads(skeleton.nbytes):
        result = _measure(skeleton, tokens)
    del skeleton
    free(device)
    return result


def _measure(skeleton: Skeleton, tokens: Ints) -> Measurement:
    skeleton.load_ends()
    ids = torch.from_numpy(tokens).long().to(skeleton.device)
    rows, long = Rows.of(skeleton, ids), Rows.of(skeleton, _long_text(ids, longest(skeleton)))
    probes = [rows.hidden[0][0, :PROBE].cpu()]
    told = time.monotonic()

    def after(number: int) -> None:
        nonlocal told
        probes.append(rows.hidden[0][0, :PROBE].cpu())
        if time.monotonic() - told > PROGRESS_INTERVAL_S:
            told = time.monotonic()
            log.info(f"measuring: block {number + 1} of {len(skeleton.blocks)}")

    hidden, far = run_blocks(skeleton, [rows, long], after)
    nll, top1 = _next_tokens(skeleton, ids, hidden)
    finite = far[0].isfinite().all(-1)
    finite[-PROBE:] &= skeleton.logits(far[0, -PROBE:]).isfinite().all(-1)
    context = np.array([len(finite), int(finite.sum())], np.int32)
    del far, long

    found = skeleton.checkpoint.head
    head = MtpHead(skeleton.checkpoint, skeleton) if found and found.layout == "mtp" else None
    drafts = np.zeros((0, 0, 0), np.int32)
    if head is not None:
        each = [head.drafts(row, state, DRAFTS) for row, state in zip(ids, hidden, strict=True)]
        drafts = torch.stack(each, dim=1).int().cpu().numpy()
    generated, speculation, speculative = _continuations(skeleton, head, ids[:PROMPTS, :PROMPT])
    seen = features(skeleton)
    return Measurement(
        tokens, nll, top1, drafts, generated, speculation, speculative, context, hidden.cpu(), torch.stack(probes),
        torch.empty(0) if seen is None else seen.cpu(),
    )  # fmt: skip


def precision(base: Path) -> tuple[torch.device, torch.dtype]:
    """Where and in what a base is measured, and everything that is compared with it."""
    parameters = streaming_parameters(Checkpoint.open(base))
    device = pick_device(parameters)
    return device, pick_dtype(parameters, device)


def longest(skeleton: Skeleton) -> int:
    """Tokens of the longest text that fits: the model's own limit, a time that bears waiting for, half the memory."""
    config = skeleton.text.config
    width = 16 * config.hidden_size + 6 * int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    delta = getattr(config, "linear_num_value_heads", 0) * getattr(config, "linear_value_head_dim", 0)
    each = width * skeleton.dtype.itemsize + 16 * 4 * delta  # the delta rule's reference code works in float32
    limit = int(getattr(config, "max_position_embeddings", None) or LENGTH)
    return int(
        max(1, min(limit, MAX_TEXT_TOKENS.get(skeleton.device.type, LENGTH), room(skeleton.device) // 2 // each))
    )


def _long_text(ids: torch.Tensor, length: int) -> torch.Tensor:
    """The windows one after the other, again and again: `[1, length]`."""
    flat = ids.flatten()
    return flat.repeat(-(-length // len(flat)))[:length][None]


def _next_tokens(skeleton: Skeleton, ids: torch.Tensor, hidden: torch.Tensor) -> tuple[Floats, Ints]:
    nll, top1 = [], []
    for row, state in zip(ids, hidden, strict=True):
        logits = skeleton.logits(state[:-1])
        nll.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").cpu().numpy())
        top1.append(logits.argmax(-1).int().cpu().numpy())
    return np.stack(nll), np.stack(top1)


def _continuations(skeleton: Skeleton, head: MtpHead | None, prompts: torch.Tensor) -> tuple[Ints, Ints, Floats]:
    """Greedy continuations; with the head, and all weights in memory, speculative ones too."""
    nothing, unequal = np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
    if 1.5 * skeleton.nbytes > room(skeleton.device):
        return decode_in_blocks(skeleton, prompts, GENERATED_IN_BLOCKS).int().cpu().numpy(), nothing, unequal
    skeleton.hold()
    plain = [decode(skeleton, prompt, GENERATED) for prompt in prompts]
    generated = np.array([tokens for tokens, _ in plain], np.int32)
    if head is None:
        return generated, nothing, unequal
    depth = DRAFTS if head.recycles else 1
    found = [speculate(skeleton, head, prompt, GENERATED, depth) for prompt in prompts]
    if skeleton.dtype == torch.float32:
        pairs = zip(plain, found, strict=True)
        unequal = np.array([agreement(*one, other.tokens) for one, other in pairs], np.float32)
    return generated, np.array([[one.steps, *one.accepted] for one in found], np.int32), unequal


def windows(folder: Path, text: Path, checkpoint: Checkpoint, *, remote_code: bool = False) -> Ints:
    """The pinned tokens `[windows, length]`, spread evenly over the text. Raises TooFewTokens if there are none."""
    tokenizer = load_tokenizer(folder, remote_code=remote_code)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    length = window_length(checkpoint.text_config, LENGTH)
    if len(ids) < length:  # Whether the text or the tokenizer is poor, only another tokenizer tells.
        raise TooFewTokens(
            f"the tokenizer of {folder.name} makes only {len(ids):,} tokens of the text {text.name}, and measuring "
            f"needs at least {length}"
        )
    count = window_count(len(ids), length, text.name, WINDOWS)
    stride = (len(ids) - length) // max(count - 1, 1)
    vocabulary = int(checkpoint.text_config.get("vocab_size") or 1 << 31)
    tokens: Ints = np.array([ids[i * stride : i * stride + length] for i in range(count)], dtype=np.int32)
    if int(tokens.max()) >= vocabulary:
        raise CheckpointError(f"the tokenizer of {folder} makes token {tokens.max()}, the model knows {vocabulary}")
    return tokens
