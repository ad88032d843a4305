"""What a thread packs on the GPU while the next block is tuned: the rounding that the block was tuned to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from infra.bench.gpu_piece import Size, build_model
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.packing import scales_of, to_numpy, unpack
from requant.tasks.quantizing.job import Job, Rung
from requant.tasks.quantizing.memory_fallback import quantize_with_fallback
from requant.tasks.quantizing.samples import SampleSource
from requant.tasks.recipe.quantize_section import Quantize
from requant.tasks.texts.text import find_text

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZE = Size(
    hidden=2048, intermediate=8192, heads=8, kv_heads=2, key_heads=8, value_heads=16, blocks=6, nsamples=32, iters=12
)


@pytest.mark.parametrize("low_gpu_mem", [False, True])
def test_every_packed_layer_is_the_rounded_one_of_the_resume_state(low_gpu_mem: bool, tmp_path: Path) -> None:
    """The two are computed apart, from the tuned weights: a thread that was too early or too late would be seen."""
    model = build_model(tmp_path / "base", "mixed", SIZE)
    text = find_text("builtin:python")
    assert text.path is not None
    settings = Quantize(
        nsamples=SIZE.nsamples, seqlen=SIZE.seqlen, iters=SIZE.iters, group_size=128, low_gpu_mem=low_gpu_mem
    )
    job = Job(
        settings=settings.model_copy(update={"format": settings.key_format}),
        rung=Rung.asked(settings),
        model=model,
        sources=[SampleSource(name=text.label, paths=[text.path])],
        head=[],
        allow_remote_code=False,
    )
    work = tmp_path / "work"
    work.mkdir()
    result, _ = quantize_with_fallback(job, work, lambda event: None)
    assert_packed_as_rounded(Checkpoint.open(result.checkpoint), work, SIZE.blocks)


def assert_packed_as_rounded(packed: Checkpoint, work: Path, blocks: int) -> None:
    """Compare the integers and scales of all packed layers with those of the resume state's files."""
    from safetensors.numpy import load_file

    compared = 0
    for number, path in enumerate(sorted(work.glob("resume/group_0/block-*.safetensors"))):
        rounded = load_file(path)
        for name in (key.removesuffix(".q") for key in rounded if key.endswith(".q")):
            layer = next(n for n in packed.tensors if n.endswith(f"layers.{number}.{name}.qweight"))
            tensors = {part: packed.tensors[layer.replace("qweight", part)] for part in ("qweight", "qzeros", "scales")}
            integers = unpack(to_numpy(tensors["qweight"]), 4, axis=0).astype(np.int16).T - 8
            np.testing.assert_array_equal(integers, rounded[f"{name}.q"], err_msg=layer)
            np.testing.assert_array_equal(scales_of(tensors).T, rounded[f"{name}.scale"], err_msg=layer)
            compared += 1
    assert compared >= 5 * blocks
