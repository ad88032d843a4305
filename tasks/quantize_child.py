"""The process that quantizes: `python -m tasks.quantize_child JOB.json FOLDER`.

It knows auto-round, torch and transformers, and neither Prefect nor the store, so that it runs in any GPU image
(Python 3.11 or 3.12, torch from 2.11 on). Below FOLDER it keeps:

    events.jsonl   one JSON object a line: settings, block, progress, loss, warning, error
    out/           what auto-round writes
    resume/        auto-round's resume state
    result.json    written last: where the checkpoint is, and what was done to which layer

It ends when its standard input does, so that it never outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

LOSS = re.compile(r"loss iter 0: ([\d.e+-]+|nan|inf) -> iter \d+: ([\d.e+-]+|nan|inf)")


class Refused(ValueError):
    """The job cannot work as it is; the message is a sentence for the user."""


class Events:
    """Appends to events.jsonl; every line is whole when its newline is there."""

    def __init__(self, path: Path) -> None:
        cut = path.exists() and not path.read_bytes().endswith(b"\n")
        self._stream = path.open("a", buffering=1)
        if cut:  # by a kill in the middle of a line
            self._stream.write("\n")
        self._started = time.monotonic()

    def __call__(self, event: str, **fields: Any) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self._stream.write(json.dumps({"event": event, "seconds": seconds, **fields}) + "\n")


class LogEvents(logging.Handler):
    """Turns auto-round's log into events: the loss of each block, and every warning."""

    def __init__(self, events: Events) -> None:
        super().__init__()
        self.events = events

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if match := LOSS.search(text):
            self.events("loss", before=float(match[1]), after=float(match[2]))
        elif record.levelno >= logging.WARNING:
            self.events("warning", text=text[:500])


def main(job_path: str, folder_path: str) -> int:
    """Quantize as the job says. 0: result.json is there; 1: the last event says what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder = Path(folder_path)
    events = Events(folder / "events.jsonl")
    job = json.loads(Path(job_path).read_text())
    os.environ["AR_RESUME_DIR"] = str(folder / "resume")
    os.environ["AR_WORK_SPACE"] = str(folder / "offload")
    try:
        result = quantize(job, folder, events)
    except Refused as error:
        events("error", kind="refused", text=str(error))
        return 1
    except SystemExit as error:  # auto-round's answer to calibration that reached no layer
        events("error", kind="failed", text=f"auto-round gave up (exit {error.code}): see log.txt")
        return 1
    except Exception as error:
        logging.getLogger("requant").exception("quantization failed")
        first_line = next(iter(str(error).splitlines()), "")
        events("error", kind=_kind(error), text=f"{type(error).__name__}: {first_line[:300]}")
        return 1
    temporary = folder / "result.json.part"
    temporary.write_text(json.dumps(result, indent=1))
    os.replace(temporary, folder / "result.json")
    return 0


def quantize(job: dict[str, Any], folder: Path, events: Events) -> dict[str, Any]:
    """Load, calibrate, tune, write. Returns what result.json holds."""
    import torch
    import transformers
    from auto_round import AutoRound

    logging.getLogger("autoround").addHandler(LogEvents(events))
    device = job["device"] if job["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device.startswith("cuda")
    compiled = on_gpu if job["torch_compile"] == "auto" else job["torch_compile"]
    low_gpu_mem = on_gpu if job["low_gpu_mem"] == "auto" else job["low_gpu_mem"]
    settings = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch_compile": compiled,
        "low_gpu_mem": low_gpu_mem,
        "batch_size": job["batch_size"],
        "gradient_accumulate_steps": job["gradient_accumulate_steps"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    events("settings", **settings)

    remote = {"trust_remote_code": job["allow_remote_code"]}
    config = _load_config(job["model"], job["allow_remote_code"])
    loader = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        loader = transformers.AutoModelForImageTextToText
    model = loader.from_pretrained(job["model"], dtype="auto", use_safetensors=True, **remote)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"], **remote)
    samples = calibration_samples(tokenizer, job["texts"], job["nsamples"], job["seqlen"])
    _check_layer_names(job["layers"], model)

    (folder / "resume").mkdir(exist_ok=True)
    _make_resume_atomic()
    _report_blocks(events)
    clean_unfinished(folder / "out")
    rounder = AutoRound(
        model,
        tokenizer,
        processor=tokenizer if hasattr(config, "vision_config") else None,
        scheme=job["scheme"],
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["sym"],
        iters=job["iters"],
        lr=job["lr"],
        seqlen=job["seqlen"],
        nsamples=job["nsamples"],
        dataset=samples,
        batch_size=job["batch_size"],
        gradient_accumulate_steps=job["gradient_accumulate_steps"],
        low_gpu_mem_usage=low_gpu_mem,
        enable_torch_compile=compiled,
        device_map=device,
        seed=job["seed"],
        layer_config={**{p: {"bits": 16, "data_type": "fp"} for p in job["head"]}, **job["layers"]} or None,
    )
    _, written = rounder.quantize_and_save(str(folder / "out"), format=job["format"])
    bits = {name: int(layer.get("bits", 16)) for name, layer in (rounder.layer_config or {}).items()}
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return {"checkpoint": str(written), "settings": settings, "bits": bits, "peak_gpu_bytes": peak}


def _load_config(model: str, allow_remote_code: bool) -> Any:
    import transformers

    described = json.loads((Path(model) / "config.json").read_text())
    kind = described.get("model_type")
    if "auto_map" in described and not allow_remote_code and kind not in transformers.CONFIG_MAPPING:
        raise Refused(f"the base's model type {kind!r} is Python code of its repo: set allow_remote_code to run it")
    if "auto_map" not in described and kind not in transformers.CONFIG_MAPPING:
        raise Refused(f"transformers {transformers.__version__} does not know the base's model type {kind!r}")
    return transformers.AutoConfig.from_pretrained(model, trust_remote_code=allow_remote_code)


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


def clean_unfinished(out: Path) -> None:
    """Make what a killed process left fit to be resumed.

    auto-round finds its finished blocks again as `model-shard-*.safetensors`. Killed while it writes one, it leaves a
    cut file that it then fails to open; killed while it renames them at the very end, it no longer finds those that
    have their final name already.
    """
    from tasks.checkpoint.header import read_header
    from tasks.errors import CheckpointError

    renamed = {*out.glob("*/model-*-of-*.safetensors"), *out.glob("*/model.safetensors")}
    for shard in sorted({*out.glob("*/model-shard-*.safetensors"), *renamed}):
        try:
            read_header(shard)
        except CheckpointError:
            shard.unlink()
            continue
        if shard in renamed:
            taken = [int(path.stem.rsplit("-", 1)[1]) for path in shard.parent.glob("model-shard-*.safetensors")]
            shard.rename(shard.with_name(f"model-shard-{max(taken, default=0) + 1:05d}.safetensors"))
    for index in out.glob("*/*.index.json"):
        index.unlink()


def _make_resume_atomic() -> None:
    """Give each block's chain values file names of their own, renamed into place before the manifest names them.

    auto-round overwrites one file for all blocks and then the manifest: killed in between, a resumed run would feed
    a block the inputs of the next one. (auto_round/utils/resume.py, 0.16.1.)
    """
    import torch
    from auto_round.utils import resume

    state = resume.ResumeState
    state.q_input_path = property(lambda s: s.dir / f"q_input_{len(s.completed_blocks)}.pt", lambda s, v: None)
    state.input_ids_path = property(lambda s: s.dir / f"input_ids_{len(s.completed_blocks)}.pt", lambda s, v: None)

    def mark_block_done(self: Any, block_name: str, q_input: Any, input_ids: Any) -> None:
        before = [self.q_input_path, self.input_ids_path]
        self.completed_blocks.append(block_name)
        for value, path in ((q_input, self.q_input_path), (input_ids, self.input_ids_path)):
            if value is not None:
                with open(f"{path}.part", "wb") as stream:
                    torch.save(resume._to_cpu_recursive(value), stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(f"{path}.part", path)
        manifest = {"signature": self.signature, "completed_blocks": self.completed_blocks}
        resume._atomic_write_json(self.manifest_path, manifest)
        for path in before:
            path.unlink(missing_ok=True)

    state.mark_block_done = mark_block_done


def _report_blocks(events: Events) -> None:
    """Turn auto-round's progress bar into events: `block` when one starts, `progress` when one ends."""
    from auto_round.compressors import orchestrator

    class Bar(orchestrator.tqdm):  # type: ignore[misc]
        def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
            super().set_description(desc, refresh)
            if desc and desc.startswith("Quantizing ") and desc != "Quantizing done":
                events("block", name=desc.removeprefix("Quantizing "), index=self.n, total=self.total)

        def update(self, n: float | None = 1) -> bool | None:
            displayed: bool | None = super().update(n)
            events("progress", done=self.n, total=self.total)
            return displayed

    orchestrator.tqdm = Bar


def _check_layer_names(layers: dict[str, Any], model: Any) -> None:
    """auto-round only warns of a name that matches nothing."""
    names = [name for name, _ in model.named_modules()]
    for key in layers:
        try:
            pattern = re.compile(key)
        except re.error:
            pattern = re.compile(re.escape(key))
        if not any(key in name or pattern.search(name) for name in names):
            raise Refused(f"quantize.layers names {key!r}, which is in no layer of the model: correct the name")


def _kind(error: Exception) -> str:
    """`oom` and `compile` can be cured by other settings, `failed` cannot."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory|_ALLOC_FAILED", text, re.IGNORECASE):
        return "oom"
    if "torch._dynamo" in text or "torch._inductor" in text or "triton" in text.lower():
        return "compile"
    return "failed"


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(75)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
