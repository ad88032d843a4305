"""The record of a stage: what earlier versions wrote stays as it is, and what is damaged is unknown."""

from __future__ import annotations

import json

import pytest

from requant.tasks.hardware import Machine
from requant.tasks.record import RecordedBase, RecordedBlock, RecordedSource, StageRecord, TuningWork

# As version 0.1.0 wrote them.
MACHINE = {"system": "Linux x86_64", "python": "3.12.3", "cpus": 2, "memory_bytes": 8326471680, "gpus": ["NVIDIA H200"]}
DOWNLOAD = {
    "base": {"repo_id": "Qwen/Qwen3.6-27B", "sha": "0" * 40},
    "bytes_moved": 54_000_000_000,
    "stage": "download",
    "started": "2026-11-01T10:00:00+00:00",
    "seconds": 601.25,
    "tools": {},
    "machine": MACHINE,
    "used": [],
}
QUANTIZE = {
    "calibration": "builtin:mixed",
    "scheme": {"bits": 4, "group_size": 128, "sym": True},
    "settings": {"device": "NVIDIA H200", "fast": True, "torch": "2.11.0", "reasons": {"fast": "it fits"}},
    "work": {"parameters": 7, "iters": 200, "nsamples": 128, "seqlen": 2048, "batch_size": 8, "fast": "auto"},
    "attempts": [{"settings": {}, "ended": "done"}],
    "blocks": [{"name": "layers.0", "starts": 1, "seconds": 22.5, "loss_before": 2.0, "loss_after": 1.0}],
    "peak_gpu_bytes": None,
    "stage": "quantize",
    "started": "2026-11-01T10:10:00+00:00",
    "seconds": 1430,
    "tools": {"auto-round": "0.16.1", "transformers": "5.23.0"},
    "machine": MACHINE,
    "used": [["measure", "a" * 64]],
    "copied_from": "file:///mnt/stick",
}
BENCHMARK = {"measured": {"engine": "vllm", "hardware": "NVIDIA H200", "mtp": {}}, "bytes_read": 18, "seconds": 7.5}


@pytest.mark.parametrize("document", [DOWNLOAD, QUANTIZE, BENCHMARK, {"a key of a later version": [1, {"x": None}]}])
def test_a_record_is_written_as_it_was_read(document: dict[str, object]) -> None:
    record = StageRecord.from_json(json.dumps(document))
    assert json.dumps(record.to_json()) == json.dumps(document)


def test_a_record_tells_what_its_stage_did() -> None:
    download, quantize, benchmark = map(StageRecord, (DOWNLOAD, QUANTIZE, BENCHMARK))
    assert download.base == RecordedBase("Qwen/Qwen3.6-27B", "0" * 40)
    assert (download.started, download.seconds) == ("2026-11-01T10:00:00+00:00", 601.25)
    assert (download.bytes_processed, benchmark.bytes_processed) == (54_000_000_000, 18)
    assert quantize.work == TuningWork(7, 200, 128, 2048, 8, "auto")
    assert (quantize.calibration, quantize.device, quantize.torch) == ("builtin:mixed", "NVIDIA H200", "2.11.0")
    assert quantize.blocks == [RecordedBlock("layers.0", 22.5, 2.0, 1.0)] and quantize.block_seconds == [22.5]
    assert quantize.tools == QUANTIZE["tools"] and quantize.used == [("measure", "a" * 64)]
    assert quantize.machine == Machine("Linux x86_64", "3.12.3", 2, 8326471680, ("NVIDIA H200",))
    assert quantize.machine.to_json() == MACHINE
    assert (benchmark.engine, benchmark.benchmark_hardware) == ("vllm", "NVIDIA H200")


@pytest.mark.parametrize("text", [None, b"", b"{", b"null", b"[]", b"\xff", b"[" * 100_000, b"{}"])
def test_a_record_that_is_absent_or_damaged_says_nothing(text: bytes | None) -> None:
    record = StageRecord.from_json(text)
    assert record == StageRecord() and record.to_json() == {}
    assert (record.started, record.seconds, record.base, record.work, record.bytes_processed) == (
        "",
        None,
        None,
        None,
        0,
    )
    assert (record.tools, record.used, record.blocks, record.machine.gpus) == ({}, [], [], ())


@pytest.mark.parametrize("value", [None, True, 5, "text", [], ["x"], [[1]], {}, {"repo_id": []}, [{"seconds": "x"}]])
def test_a_value_of_another_type_is_unknown_and_the_others_stay(value: object) -> None:
    keys = ("base", "settings", "work", "blocks", "tools", "machine", "used", "measured", "calibration", "bytes_read")
    record = StageRecord({**dict.fromkeys(keys, value), "seconds": 1.5, "started": "2026"})
    assert (record.seconds, record.started) == (1.5, "2026")
    assert (record.work, record.device, record.torch, record.engine, record.used) == (None, None, None, None, [])
    assert record.block_seconds == [] and record.machine.cpus is None


def test_what_was_taken_from_each_calibration_text_is_read_whatever_a_store_holds() -> None:
    chats = {"templated": 7, "plain": 1, "reason": "it refuses"}
    samples = {"code": 3, "chat": 5}
    row = {"source": "a@1", "weight": 2, "license": "mit", "rows": 9, "tokens": 90, "samples": samples, "chats": chats}
    (source,) = StageRecord({"sources": [row]}).sources
    assert source == RecordedSource("a@1", 2, "mit", 9, 90, samples, 7, 1, "it refuses")
    assert StageRecord({}).sources == StageRecord({"sources": 5}).sources == []
    (odd,) = StageRecord({"sources": [{"samples": {"a": "b"}, "rows": "x", "chats": None}, 7]}).sources
    assert odd == RecordedSource("", None, None, 0, 0, {"a": 0}, 0, 0, None)
