"""What writes the rows of a base: vLLM where there is one, otherwise transformers."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from requant.tasks.checkpoint.checkpoint import Checkpoint, read_json
from requant.tasks.errors import EngineFailed, OutOfMemory
from requant.tasks.formatting import gigabytes
from requant.tasks.serving.vllm import find_vllm, serve_vllm
from requant.tasks.writing.in_vllm import VllmWriter, writing_flags
from requant.tasks.writing.rows import Writer

# With a base up to this size, transformers writes on a CPU within hours, and so takes the place of a vLLM that fails.
SMALL_BASE_BYTES = 4_000_000_000
USABLE_MEMORY = 0.9  # of the free memory: the rest is for the rows
ANOTHER_TEXT = "name another text as quantize.calibration, such as builtin:mixed"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WritingBase:
    """A base that writes rows.

    folder: its files; stops: the token ids that end an answer; row_tokens: how many tokens a row has at most; flags:
    those of the recipe's benchmark, for vLLM; logs: the folder for vLLM's log.
    """

    folder: Path
    stops: frozenset[int]
    row_tokens: int
    flags: Mapping[str, JsonValue]
    logs: Path
    remote_code: bool = False


def stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end an answer: those of the generation config, the config and the tokenizer."""
    config = Checkpoint.open(folder).config
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    named = [part.get("eos_token_id") for part in (generation, config, config.get("text_config") or {})]
    ids = [one for value in (*named, tokenizer.eos_token_id) for one in (value if isinstance(value, list) else [value])]
    return frozenset(one for one in ids if type(one) is int and one >= 0)


@contextlib.contextmanager
def open_writer(base: WritingBase) -> Iterator[tuple[Writer, str]]:
    """Open what writes rows here, for as long as the block lasts. Also return its name and version.

    Raises EngineFailed if vLLM does not start and transformers would take too long, OutOfMemory if the base fits
    neither the GPU nor the memory, RecipeError, CheckpointError.
    """
    with contextlib.ExitStack() as stack:
        yield _in_vllm(base, stack) or _in_torch(base, stack)


def _in_vllm(base: WritingBase, stack: contextlib.ExitStack) -> tuple[Writer, str] | None:
    """Start vLLM; return None if there is none, or if it fails and transformers can do without."""
    if find_vllm() is None:
        return None
    flags = writing_flags(read_json(base.folder / "config.json"), base.flags, base.row_tokens)
    log_path = base.logs / "vllm.log"
    try:
        running = stack.enter_context(
            serve_vllm(base.folder, flags, log_path, chat=False, remote_code=base.remote_code)
        )
    except EngineFailed as error:
        from requant.tasks.validating.model import pick_device  # torch takes seconds to import

        parameters = _parameters(base.folder)
        if pick_device(parameters).type == "cpu" and 2 * parameters > SMALL_BASE_BYTES:
            raise EngineFailed(
                f"{error}; without it, writing calibration text would take days: {ANOTHER_TEXT}"
            ) from error
        log.warning(f"{error}; transformers writes the text")
        return None
    return VllmWriter(running.server, base.stops, base.row_tokens), f"vLLM {running.version}"


def _in_torch(base: WritingBase, stack: contextlib.ExitStack) -> tuple[Writer, str]:
    """Load the base into transformers, on the GPU if it fits there, until `stack` is closed.

    Raises OutOfMemory, CheckpointError.
    """
    import transformers

    from requant.tasks.validating.model import RunSettings, Skeleton, pick_device, pick_dtype, room
    from requant.tasks.writing.in_torch import TorchWriter

    parameters = _parameters(base.folder)
    device = pick_device(parameters)
    dtype = pick_dtype(parameters, device)
    if device.type == "cpu" and dtype.itemsize * parameters > USABLE_MEMORY * room(device):
        raise OutOfMemory(
            "the base does not fit this machine to write its calibration text (its weights need "
            f"{gigabytes(dtype.itemsize * parameters)}, and {gigabytes(room(device))} of memory are free): use a "
            f"larger machine, or {ANOTHER_TEXT}"
        )
    skeleton = Skeleton(Checkpoint.open(base.folder), RunSettings(device, dtype, base.remote_code))
    stack.callback(skeleton.drop)
    skeleton.hold()
    return TorchWriter(skeleton, base.stops, base.row_tokens), f"transformers {transformers.__version__}"


def _parameters(folder: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in Checkpoint.open(folder).tensors.values())
