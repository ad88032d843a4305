"""Make the CPU wheel of vLLM run on a plain x86-64 machine. A .pth file imports this module when Python starts.

Three gaps are closed. Config parsing, weight loading, speculative decoding and the server stay vLLM's.
- torchvision has no CPU build on the package index, and its import needs two operator schemas of its C++ part.
- The wheel's AVX2 build has no int4 GEMM. That kernel is replaced by an exact dequantization and a matrix product.
- In sampling with speculation, the kernel that gives each drafted token the temperature, top_k and top_p of its request
  writes into a copy, so that tokens are sampled with random values. It is replaced. Greedy decoding does not use it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

INT4_KERNEL = "vllm.model_executor.kernels.linear.mixed_precision.cpu"
SAMPLING_KERNELS = "vllm.utils.cpu_triton_utils"


class _Hook(importlib.abc.MetaPathFinder):
    """An import hook that declares torchvision's operators, and patches modules of vLLM when they are imported."""

    def __init__(self) -> None:
        self.torchvision_done = False
        self.looking_up = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name == "torchvision" and not self.torchvision_done:
            self.torchvision_done = True
            _declare_torchvision_ops(self)
        patch = PATCHES.get(name)
        if patch is not None and not self.looking_up:
            self.looking_up = True
            spec: Any = importlib.util.find_spec(name)
            self.looking_up = False
            run = spec.loader.exec_module

            def exec_and_patch(module: Any) -> None:
                run(module)
                patch(module)

            spec.loader.exec_module = exec_and_patch
            return spec
        return None


def _declare_torchvision_ops(hook: Any) -> None:
    import torch

    library: Any = torch.library.Library
    hook.library = library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        hook.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


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


def _replace_expand_kernel(module: Any) -> None:
    import torch

    def expand(output: Any, values: Any, ends: Any, replace_from: Any, replace_to: Any, *_: Any, **__: Any) -> None:
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
        output.copy_(torch.repeat_interleave(replaced, counts))

    module._expand_kernel_impl = expand


PATCHES = {INT4_KERNEL: _replace_int4_kernel, SAMPLING_KERNELS: _replace_expand_kernel}
sys.meta_path.insert(0, _Hook())
