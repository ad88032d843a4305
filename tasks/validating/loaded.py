"""The models that run, one of which may stay in memory from one use to the next.

Those of formats for which Requant has no formula are loaded by transformers, with the library of the format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.stored_matrix import unknown_format
from requant.tasks.errors import CheckpointError
from requant.tasks.validating.model import RunSettings, Skeleton, family_of, free, text_model


@dataclass
class _Slot:
    skeleton: Skeleton | None = None

    def drop(self) -> None:
        if self.skeleton is not None:
            self.skeleton.drop()
            self.skeleton = None


_STAYING: ContextVar[_Slot | None] = ContextVar("the model that stays", default=None)


@contextlib.contextmanager
def last_model_stays() -> Iterator[None]:
    """Within the context, keep the model of the last `model_of` with its weights, until another one is asked for."""
    slot = _Slot()
    token = _STAYING.set(slot)
    try:
        yield
    finally:
        _STAYING.reset(token)
        slot.drop()


@contextlib.contextmanager
def model_of(checkpoint: Checkpoint, settings: RunSettings) -> Iterator[Skeleton]:
    """Return a checkpoint's model, as `skeleton_of`, and drop its weights on exit, unless `last_model_stays`."""
    slot, stays = _STAYING.get() or _Slot(), _STAYING.get() is not None
    settings = replace(settings, tokens_of=None)
    last = slot.skeleton
    if last is None or last.checkpoint.folder != checkpoint.folder or last.settings != settings:
        slot.drop()
        slot.skeleton = skeleton_of(checkpoint, settings)
    assert slot.skeleton is not None
    try:
        yield slot.skeleton
    except BaseException:
        slot.drop()
        raise
    if not stays:
        slot.drop()


def skeleton_of(checkpoint: Checkpoint, settings: RunSettings) -> Skeleton:
    """Return a checkpoint's model, whose blocks are loaded one at a time where Requant can read its weights.

    Raises CheckpointError for one that cannot be run.
    """
    unknown = (unknown_format(checkpoint, m) for m in checkpoint.modules.values() if m.quantized)
    why = next(filter(None, unknown), None)
    return Skeleton(checkpoint, settings) if why is None else LoadedModel(checkpoint, settings, why)


class LoadedModel(Skeleton):
    """A model with all its weights, as transformers loads it. `why`: why Requant does not, as a sentence."""

    def __init__(self, checkpoint: Checkpoint, settings: RunSettings, why: str) -> None:
        self.checkpoint, self.settings, self.dtype, self.device = checkpoint, settings, settings.dtype, settings.device
        family, _ = family_of(checkpoint, settings.remote_code)
        try:
            self.model: Any = family.from_pretrained(
                checkpoint.folder,
                dtype=settings.dtype,
                device_map={"": settings.device},
                use_safetensors=True,  # never a pickle
                trust_remote_code=settings.remote_code,
            ).eval()
        except MemoryError:
            raise
        except Exception as error:  # the library of the method can raise anything; often it is not installed
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            raise CheckpointError(f"{why}, and transformers cannot load it here: {reason}") from error
        self.text = text_model(self.model)
        self.blocks: list[nn.Module] = list(getattr(self.text, "layers", ()))
        if not self.blocks:
            raise CheckpointError(f"{type(self.model).__name__} has no decoder layers that can be told apart")

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """Return a decoder block, which is there already."""
        yield self.blocks[number]

    def in_turn(self, *, stay: bool = False) -> Iterator[nn.Module]:
        """Return the decoder blocks, which are there already."""
        yield from self.blocks

    def load_ends(self) -> None:
        """Do nothing: everything is loaded."""

    def load_rest(self) -> None:
        """Do nothing: everything is loaded."""

    def hold(self) -> None:
        """Do nothing: everything is loaded."""

    def drop(self) -> None:
        """Drop all weights, and return their GPU memory to the device. The model cannot run any more."""
        del self.model, self.text, self.blocks
        free(self.device)
