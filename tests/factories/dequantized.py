"""What packed tensors stand for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from requant.tasks.checkpoint.dequantize import weight_of
from requant.tasks.checkpoint.header import Tensor
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.checkpoint.stored_matrix import packed_matrix

CPU = torch.device("cpu")


def dequantize(parts: Mapping[str, Tensor], scheme: PackingScheme) -> npt.NDArray[np.float32]:
    """Return the weight of packed parts, float32 `[out, in]`."""
    weight: npt.NDArray[np.float32] = weight_of(packed_matrix(parts, scheme, "m"), CPU, torch.float32).numpy()
    return weight
