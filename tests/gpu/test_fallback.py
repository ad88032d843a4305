"""torch.compile fails on a GPU because the machine has no C compiler: each kind of block is tuned without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.bench.gpu_piece import Size, build_model
from tests.factories.bases import quantized

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZE = Size(
    hidden=1024, intermediate=4096, heads=4, kv_heads=2, key_heads=4, value_heads=8, blocks=3, nsamples=16, iters=20
)
SETTINGS = {"nsamples": SIZE.nsamples, "seqlen": SIZE.seqlen, "iters": SIZE.iters, "batch_size": 8, "group_size": 128}


def test_where_compiling_fails_each_kind_of_block_is_tuned_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the weights with those of a run that was asked not to compile: they have the same bits."""
    base = build_model(tmp_path / "base", "mixed", SIZE)  # linear attention, full attention, linear attention
    monkeypatch.setenv("REQUANT_DETERMINISTIC", "1")
    for folder in ("asked", "failed"):
        (tmp_path / folder).mkdir()
    asked, _ = quantized(tmp_path / "asked", base, torch_compile=False, **SETTINGS)
    for compiler in ("CC", "CXX"):
        monkeypatch.setenv(compiler, "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    failed, _ = quantized(tmp_path / "failed", base, torch_compile=True, **SETTINGS)
    print(*failed.provenance.document["blocks"], sep="\n")
    assert failed.provenance.document["settings"]["torch_compile"] is True
    assert [a["ended"] for a in failed.provenance.document["attempts"]] == ["done"]
    fallbacks = [block.get("fallback", "") for block in failed.provenance.document["blocks"]]
    assert [text.startswith("torch.compile failed") for text in fallbacks] == [True, True, False]
    assert failed.manifest.digest == asked.manifest.digest
