"""Makes the CPU wheel of vLLM run on a plain x86-64 machine. Loaded at interpreter start through a .pth file.

Two gaps are closed, nothing else of vLLM is touched: its config parsing, weight loading, speculative decoding and
server are its own.
- torchvision has no CPU build on the registry, and its import needs two operator schemas that only its C++ part has;
- the wheel's AVX2 build has no int4 GEMM: that one kernel is replaced by an exact dequantize + matmul.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

INT4_KERNEL = "vllm.model_executor.kernels.linear.mixed_precision.cpu"


class _Hook(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.torchvision_done = False
        self.looking_up_kernel = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "torchvision" and not self.torchvision_done:
            self.torchvision_done = True
            _declare_torchvision_ops(self)
        if name == INT4_KERNEL and not self.looking_up_kernel:
            self.looking_up_kernel = True
            spec: Any = importlib.util.find_spec(name)
            self.looking_up_kernel = False
            run = spec.loader.exec_module

            def exec_and_patch(module: Any) -> None:
                run(module)
                _replace_int4_kernel(module)

            spec.loader.exec_module = exec_and_patch
            return spec
        return None


def _declare_torchvision_ops(keep: Any) -> None:
    import torch

    library: Any = torch.library.Library
    keep.library = library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        keep.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _replace_int4_kernel(module: Any) -> None:
    import torch

    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        assert not self.config.zero_points, "only symmetric int4 is replaced"
        packed = getattr(layer, self.w_q_name).data
        scales = getattr(layer, self.w_s_name).data.float()
        q = module.unpack_quantized_values_into_int32(packed, self.config.weight_type, 0).float()
        groups = scales.shape[0]
        weight = (q.view(groups, q.shape[0] // groups, -1) - 8) * scales[:, None]
        layer.dequantized = weight.reshape(q.shape).t().contiguous().to(torch.bfloat16)

    def apply_weights(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        return torch.nn.functional.linear(x, layer.dequantized.to(x.dtype), bias)

    kernel = module.CPUWNA16LinearKernel
    kernel.process_weights_after_loading = process_weights_after_loading
    kernel.apply_weights = apply_weights


sys.meta_path.insert(0, _Hook())
