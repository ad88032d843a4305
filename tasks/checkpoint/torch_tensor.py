"""Reads a tensor of a checkpoint into torch. A module that plans imports this one only where it computes."""

from __future__ import annotations

import torch

from requant.tasks.checkpoint.header import Tensor
from requant.tasks.errors import CheckpointError

TORCH_DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Read a tensor with its own dtype and shape, into memory of its own, which may be changed.

    Raises CheckpointError for a dtype that torch does not have.
    """
    if tensor.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"{tensor.name} has dtype {tensor.dtype}, which torch cannot hold")
    data, position = bytearray(tensor.nbytes), 0
    for chunk in tensor.chunks():
        data[position : position + len(chunk)] = chunk
        position += len(chunk)
    raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return raw.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)
