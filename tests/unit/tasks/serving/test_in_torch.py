"""The benchmark in torch: what transformers cannot load or run is one sentence, whatever it raises."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from requant.tasks.benchmark import bench
from requant.tasks.checkpoint.packing import PackingScheme
from requant.tasks.errors import CheckpointError, EngineFailed
from requant.tasks.recipe.recipe import Benchmark
from requant.tasks.serving.in_torch import explain_errors
from tests.factories.checkpoints import all_tensors, write_checkpoint, write_quantized
from tests.factories.pico import pico_base

SIZES = {"qweight": ("I32", 4), "qzeros": ("I32", 4), "scales": ("F16", 2)}


def uneven(tmp_path: Path) -> Path:
    """A pico model packed in groups of 128, which 64 inputs are not: as auto-round exports it, by shapes."""
    folder = write_quantized(pico_base(tmp_path / "base"), tmp_path)
    tensors = all_tensors(folder)
    for module in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        rows, outputs = tensors[f"{module}.qweight"][1]
        for part, shape in PackingScheme(4, 128).shapes(outputs, rows * 8).items():
            if part in SIZES:
                dtype, size = SIZES[part]
                tensors[f"{module}.{part}"] = (dtype, shape, bytes(shape[0] * shape[1] * size))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 128
    for path in (*folder.glob("*.safetensors"), folder / "quantization_config.json"):
        path.unlink()
    return write_checkpoint(folder, {"model-00001-of-00001.safetensors": tensors}, config)


def test_matrices_that_transformers_leaves_uninitialized_are_a_sentence(tmp_path: Path) -> None:
    folder = uneven(tmp_path)
    with pytest.raises(EngineFailed, match="transformers cannot load made on this machine") as caught:
        bench(folder, Benchmark(engine="torch"), tmp_path / "logs")
    message = str(caught.value)
    assert "packed matrices are left uninitialized, model.language_model.layers.0." in message
    assert len(message.splitlines()) == 1 and "benchmark.engine" in message


def test_a_checkpoint_that_transformers_does_not_know_is_a_sentence(tmp_path: Path) -> None:
    folder = write_quantized(pico_base(tmp_path / "base"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen99"}))
    with pytest.raises(EngineFailed, match=r"cannot load made .*ValueError: .*qwen99") as caught:
        bench(folder, Benchmark(engine="torch"), tmp_path / "logs")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [
    TypeError("unsupported operand\nsecond line"), AssertionError(), AttributeError("x"), OSError("no file named x"),
    RuntimeError("mat1 and mat2"),
], ids=repr)  # fmt: skip
def test_whatever_a_kernel_raises_is_one_line(error: Exception) -> None:
    pattern = f"cannot run made on this machine .CPU; {type(error).__name__}:"
    with pytest.raises(EngineFailed, match=pattern) as caught, explain_errors("run", Path("made"), "CPU"):
        raise error
    assert len(str(caught.value).splitlines()) == 1 and not caught.value.retryable


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(errno.ENOSPC, "No space left on device"), CheckpointError("said already"),
    type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), KeyboardInterrupt(),
], ids=repr)  # fmt: skip
def test_what_the_machine_runs_out_of_is_no_fault_of_the_checkpoint(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explain_errors("run", Path("made"), "CPU"):
        raise error
    assert caught.value is error
