"""Calibration samples, cut from texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tasks.quantizing.events import Refused


def calibration_samples(tokenizer: Any, texts: list[str], nsamples: int, seqlen: int) -> list[Any]:
    """`nsamples` token tensors `[1, seqlen]` int64, cut at even distances from the texts read one after another.

    Raises Refused if the texts have fewer than `nsamples * seqlen` tokens: samples are never repeated or padded.
    """
    import torch

    ids: list[int] = []
    for text in read_documents(texts):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= 4 * nsamples * seqlen:
            break
    if len(ids) < nsamples * seqlen:
        raise Refused(
            f"the calibration text has {len(ids):,} tokens, and {nsamples} samples of {seqlen} need "
            f"{nsamples * seqlen:,}: lower quantize.nsamples or seqlen, or name a longer text"
        )
    stride = (len(ids) - seqlen) // max(nsamples - 1, 1)
    return [torch.tensor([ids[i * stride : i * stride + seqlen]]) for i in range(nsamples)]


def read_documents(paths: list[str]) -> Any:
    """The documents of text files (.txt: one; .jsonl, .json, .parquet: the field or column `text` of each row)."""
    for path in paths:
        if path.endswith((".jsonl", ".json")):
            with open(path, encoding="utf-8") as stream:
                is_list = stream.read(1) == "["
                stream.seek(0)
                rows = json.load(stream) if is_list else (json.loads(line) for line in stream if line.strip())
                yield from (row["text"] for row in rows if row.get("text"))
        elif path.endswith(".parquet"):
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
                yield from (text for text in batch.column("text").to_pylist() if text)
        else:
            yield Path(path).read_text(encoding="utf-8")


def count_every_sample() -> None:
    """Make auto-round calibrate a vision-language base with all samples.

    Its calibrator for such models (calibration/mllm.py, 0.16.1) counts a batch for each entry of a list of samples, so
    that of 128 samples it takes the first 16 at batch size 8, without a word.
    """
    from auto_round.calibration.mllm import MLLMCalibrator

    original = MLLMCalibrator.calib

    def calib(self: Any, nsamples: int, bs: int) -> None:
        original(self, nsamples, 1)

    MLLMCalibrator.calib = calib
