"""Reads a tensor of a checkpoint into torch. A module that plans imports this one only where it computes."""

from __future__ import annotations

import torch

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.writer import Computed
from requant.tasks.errors import CheckpointError

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CPU = torch.device("cpu")
STAGED_BYTES = 32 << 20  # what is read at a time on its way to a GPU


def to_torch(tensor: Tensor, device: torch.device = CPU) -> torch.Tensor:
    """Read a tensor with its own dtype and shape, into memory of its own, which may be changed, on a device.

    Raises CheckpointError for a dtype that torch does not have, and for a file that ends too early.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    raw = torch.empty(tensor.nbytes, dtype=torch.uint8, device=device)
    if isinstance(tensor, Computed):
        _compute(tensor, raw)
    elif device.type == "cpu":
        tensor.read_into(raw.numpy().data)
    else:
        _stage(tensor, raw)
    return raw.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


def _compute(tensor: Computed, raw: torch.Tensor) -> None:
    position = 0
    for chunk in tensor.compute():
        part = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
        raw[position : position + len(part)] = part
        position += len(part)


def _stage(tensor: Tensor, raw: torch.Tensor) -> None:
    """Read through pinned memory, whose copies go on while the next part is read.

    torch gives the memory of a part to nobody else before its copy has ended.
    """
    for position in range(0, tensor.nbytes, STAGED_BYTES):
        target = raw[position : position + STAGED_BYTES]
        part = torch.empty(len(target), dtype=torch.uint8, pin_memory=True)
        tensor.read_into(part.numpy().data, position)
        target.copy_(part, non_blocking=True)
