"""Failures of quantizing are told apart by what helps."""

from __future__ import annotations

import pytest
import torch

from requant.tasks.quantizing.failures import classify


@pytest.mark.parametrize(("error", "kind"), [
    (MemoryError(), "host oom"),
    (OSError(12, "Cannot allocate memory"), "host oom"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "oom"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Of the allocated memory 1 GiB is unallocated"), "oom"),
    (RuntimeError("HIP out of memory"), "oom"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom"),
    (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "compile"),
    (RuntimeError("torch._inductor.exc.InductorError: LoweringException"), "compile"),
    (ValueError("quantize.layers names 'x', which is in no layer"), "failed"),
    (KeyError("text"), "failed"),
])  # fmt: skip
def test_an_error_is_told_apart_by_what_cures_it(error: Exception, kind: str) -> None:
    assert classify(error) == kind


def test_running_out_of_a_cpus_memory_is_not_the_gpus_failure() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert classify(caught.value) == "host oom"


def test_an_error_of_dynamo_is_cured_by_not_compiling() -> None:
    from torch._dynamo.exc import Unsupported

    assert classify(Unsupported("call_function")) == "compile"
