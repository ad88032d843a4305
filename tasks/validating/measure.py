"""Measurement of one checkpoint on the pinned text.

It has next-token losses and choices, drafts of the MTP head, greedy continuations, features of the vision tower for
synthetic pixels, and whether all values are finite in a text that is as long as fits. A base and the checkpoints made
from it are measured in the same way, with one decoder block in memory at a time.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch

from requant.tasks.checkpoint.blocks import streaming_parameters
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.served_dtype import Dtype
from requant.tasks.errors import CheckpointError
from requant.tasks.progress import progress
from requant.tasks.validating import LENGTH, PROBE
from requant.tasks.validating.blocks import Rows, run_blocks
from requant.tasks.validating.decode import agreement, decode, decode_in_blocks, speculate
from requant.tasks.validating.head import MtpHead
from requant.tasks.validating.loaded import model_of
from requant.tasks.validating.measurement import UNDRAFTED, Floats, Ints, Measurement
from requant.tasks.validating.model import (
    RunSettings,
    Skeleton,
    few_threads,
    pick_device,
    pick_dtype,
    room,
)
from requant.tasks.validating.vision import features
from requant.tasks.validating.windows import Windows, windows

VERSION = 4  # must be raised when the same checkpoint and text give other values
DRAFTS = 3  # draft tokens per step: engines use no more
PROMPTS, PROMPT, GENERATED = 4, 32, 48  # greedy continuations: their number, tokens of each prompt, tokens after it
GENERATED_IN_BLOCKS = 8  # tokens after a prompt where each token costs a pass over all weights
# Windows that are computed at a time on a GPU, in tokens: a few thousand keep it busy. On a CPU it is one window.
BATCH_TOKENS = {"cuda": 8192}
SPARE_BYTES = 1 << 30  # that are left free beside all weights, for a block that is read and for gaps in the memory
MAX_TEXT_TOKENS = {"cpu": 4096, "cuda": 131_072}  # a longer text takes longer than everything else together
log = logging.getLogger(__name__)


@torch.inference_mode()
def measure(
    folder: Path,
    text: Path,
    settings: RunSettings,
    tokens: int | None = None,
) -> Measurement:
    """Run a checkpoint on a text. `tokens`: how many of each domain; None: as many as `windows` takes.

    Raises CheckpointError if it cannot be loaded, and its subclass TokenizerError if only its tokenizer is in the way.
    """
    checkpoint = Checkpoint.open(folder).loadable()
    tokenizer = settings.tokens_of or folder
    cut = windows(tokenizer, text, checkpoint, tokens=tokens, remote_code=settings.remote_code)
    with model_of(checkpoint, settings) as skeleton, few_threads(skeleton.nbytes):
        skeleton.load_ends()
        cut = cut.up_to(_fitting(skeleton))
        dtype = str(settings.dtype).removeprefix("torch.")
        domains = f" in {len(set(cut.domains))} domains" if len(set(cut.domains)) > 1 else ""
        log.info(f"measuring {folder.name} on {cut.tokens.size:,} tokens{domains} ({dtype}, {settings.device})")
        return _measure(skeleton, cut)


def _measure(skeleton: Skeleton, cut: Windows) -> Measurement:
    ids = torch.from_numpy(cut.tokens).long().to(skeleton.device)
    longest_text = _long_text(ids, longest(skeleton))
    stay = skeleton.absent_bytes + SPARE_BYTES < room(skeleton.device) // 2  # The long text takes the other half.
    groups = rows_of(skeleton, cut)
    groups.append(Rows.of(skeleton, longest_text))
    probes = [groups[0].hidden[0][0, :PROBE].cpu()]
    with progress("measure", len(skeleton.blocks), "blocks") as bar:

        def after(number: int) -> None:
            probes.append(groups[0].hidden[0][0, :PROBE].cpu())
            bar.advance()

        *by_group, long_hidden = run_blocks(skeleton, groups, after, stay=stay)
    groups.clear()
    hidden = torch.cat([states.reshape(-1, ids.shape[1], states.shape[-1]) for states in by_group])
    nll, top1 = _next_tokens(skeleton, ids, hidden)
    finite = long_hidden[0].isfinite().all(-1)
    finite[-PROBE:] &= skeleton.logits(long_hidden[0, -PROBE:]).isfinite().all(-1)
    context = np.array([len(finite), int(finite.sum())], np.int32)
    del by_group, long_hidden

    head = _load_head(skeleton)
    drafts = np.zeros((0, 0, 0), np.int32)
    if head is not None:
        drafts = _drafts(skeleton, head, ids, hidden, cut.separate)
    generated, speculation, speculative = _continuations(skeleton, head, ids[cut.varied[:PROMPTS], :PROMPT])
    vision_features = features(skeleton)
    return Measurement(
        tokens=cut.tokens,
        nll=nll,
        top1=top1,
        drafts=drafts,
        generated=generated,
        speculation=speculation,
        speculative=speculative,
        context=context,
        hidden=hidden.cpu(),
        probes=torch.stack(probes),
        features=torch.empty(0) if vision_features is None else vision_features.cpu(),
        domains=cut.domains,
    )


def rows_of(skeleton: Skeleton, cut: Windows) -> list[Rows]:
    """Embed the windows: those that are computed each by itself, in batches, and those of the long text as one row."""
    ids = torch.from_numpy(cut.tokens).long()
    length = ids.shape[1]
    batch = max(1, min(BATCH_TOKENS.get(skeleton.device.type, 0), _fitting(skeleton)) // length)
    whole = cut.separate // batch * batch
    groups = (
        ids[:whole].reshape(whole // batch, batch, length),
        ids[None, whole : cut.separate],
        ids[cut.separate :].reshape(1, 1, -1),
    )
    return [Rows.of(skeleton, tokens) for tokens in groups if tokens.numel()]


def run_settings(base: Path, remote_code: bool = False, served: Dtype | None = None) -> RunSettings:
    """Choose where and in which precision a base is measured, and everything that is compared with it.

    `served`: the dtype that the recipe's flags ask the engine for.
    """
    parameters = streaming_parameters(Checkpoint.open(base))
    device = pick_device(parameters)
    return RunSettings(device, pick_dtype(parameters, device), remote_code, served)


def longest(skeleton: Skeleton) -> int:
    """Return the tokens of the longest text within MAX_TEXT_TOKENS, the model's limit and half of the free memory."""
    return min(MAX_TEXT_TOKENS.get(skeleton.device.type, LENGTH), _fitting(skeleton))


def _fitting(skeleton: Skeleton) -> int:
    """Return the tokens of the longest text within the model's limit and half of the free memory."""
    config = skeleton.text.config
    limit = int(getattr(config, "max_position_embeddings", None) or LENGTH)
    fits = room(skeleton.device) // 2 // _token_bytes(skeleton)
    if indexers := getattr(config, "index_n_heads", 0):  # transformers computes each head's scores of all pairs at once
        fits = min(fits, math.isqrt(room(skeleton.device) // 2 // (12 * indexers)))
    return int(max(1, min(limit, fits)))


def _token_bytes(skeleton: Skeleton) -> int:
    """Return the bytes that a block takes at most for each token that it computes."""
    config = skeleton.text.config
    width = 16 * config.hidden_size + 6 * int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    delta = getattr(config, "linear_num_value_heads", 0) * getattr(config, "linear_value_head_dim", 0)
    return int(width * skeleton.dtype.itemsize + 16 * 4 * delta)  # The delta rule's reference code works in float32.


def _load_head(skeleton: Skeleton) -> MtpHead | None:
    """Load the MTP head. Returns None if there is none, or if it cannot be run."""
    if skeleton.checkpoint.head is None:
        return None
    try:
        return MtpHead(skeleton.checkpoint, skeleton)
    except CheckpointError as error:
        log.warning(f"{error}: its drafts are not measured")
        return None


def _long_text(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Repeat the windows, one after the other, to a text of `length` tokens: `[1, length]`."""
    flat = ids.flatten()
    return flat.repeat(-(-length // len(flat)))[:length][None]


def _next_tokens(skeleton: Skeleton, ids: torch.Tensor, hidden: torch.Tensor) -> tuple[Floats, Ints]:
    """Return the losses (natural log) and the choices of the next token, both `[n, L-1]`."""
    nll, top1 = [], []
    with progress("next tokens", ids.numel(), "tokens") as bar:
        for row, state in zip(ids, hidden, strict=True):
            logits = skeleton.logits(state[:-1])
            nll.append(torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").cpu().numpy())
            top1.append(logits.argmax(-1).int().cpu().numpy())
            bar.advance(len(row))
    return np.stack(nll), np.stack(top1)


def _drafts(skeleton: Skeleton, head: MtpHead, ids: torch.Tensor, hidden: torch.Tensor, separate: int) -> Ints:
    """Return the drafts at each place, `[drafts, n, L-1]`. In the long text, only the first draft is made."""
    length = ids.shape[1]
    by_window = []
    with progress("drafts", separate * length, "tokens") as bar:
        for row, state in zip(ids[:separate], hidden[:separate], strict=True):
            by_window.append(head.drafts(row, state, DRAFTS))
            bar.advance(length)
    if separate < len(ids):
        tokens, states = ids[separate:].flatten(), hidden[separate:].flatten(0, 1)
        place = torch.arange(len(tokens) - 1, device=tokens.device)
        output = head(tokens[None, 1:], states[None, :-1], place[None])[0]
        first = torch.cat([skeleton.logits(part).argmax(-1) for part in output.split(length)])
        first = torch.cat([first, first.new_tensor([UNDRAFTED])]).reshape(-1, 1, length)[..., :-1]
        depth = len(by_window[0]) if by_window else 1
        by_window += list(torch.cat([first, first.new_full((len(first), depth - 1, length - 1), UNDRAFTED)], dim=1))
    drafts: Ints = torch.stack(by_window, dim=1).int().cpu().numpy()
    return drafts


def _continuations(skeleton: Skeleton, head: MtpHead | None, prompts: torch.Tensor) -> tuple[Ints, Ints, Floats]:
    """Continue prompts greedily, and also speculatively if there is a head and all weights fit into memory.

    Returns the arrays `generated`, `speculation` and `speculative` of Measurement.
    """
    no_steps, no_shares = np.zeros((0, 0), np.int32), np.zeros(0, np.float32)
    drafts = 0 if head is None else DRAFTS if head.recycles else 1
    computed = prompts.shape[0] * (prompts.shape[1] + GENERATED + drafts)
    if skeleton.absent_bytes + computed * _token_bytes(skeleton) + SPARE_BYTES > room(skeleton.device):
        if head is not None:
            head.to("meta")  # The blocks come and go once more, and need its memory.
        return decode_in_blocks(skeleton, prompts, GENERATED_IN_BLOCKS).int().cpu().numpy(), no_steps, no_shares
    skeleton.hold()
    tokens, leads = decode(skeleton, prompts, GENERATED + drafts)
    generated = tokens[:, :GENERATED]
    as_array = generated.int().cpu().numpy()
    if head is None:
        return as_array, no_steps, no_shares
    speculations = speculate(skeleton, head, prompts, tokens, drafts)
    steps = np.array([[one.steps, *one.accepted] for one in speculations], np.int32)
    if skeleton.dtype != torch.float32:  # in half precision, passes of one token and of several may choose differently
        return as_array, steps, no_shares
    written = zip(generated.tolist(), leads.tolist(), (one.tokens for one in speculations), strict=True)
    return as_array, steps, np.array([agreement(*one) for one in written], np.float32)
