"""quantize: auto-round in a child process, its packed parts assembled with everything else from the base.

The child can be watched, timed out and killed. Killed, its finished blocks stay finished; out of memory, it is
started again with the next rung of a ladder of settings, from the block that failed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefect import task

from tasks.artifact import Manifest
from tasks.checkpoint.assemble import assemble, packed_parts
from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.head import check_head
from tasks.download import download
from tasks.errors import SECRET_VARIABLES, CheckpointError, OutOfMemory, QuantizeDied, QuantizeFailed, StageTimeout
from tasks.prefect_stage import BlockProgress, options, say, shown
from tasks.recipe import Recipe
from tasks.stage import Made, Stage, StageResult, put_files, run_stage
from tasks.store import Store, open_store
from tasks.text import Text

STAGE = Stage("quantize", 1, tools=("auto-round", "transformers"))
# What the quantized weights depend on. Everything else of the base joins at the next stage, so that a new chat
# template or README costs no GPU hours.
READ = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
TIMEOUT = 48 * 3600.0  # seconds
log = logging.getLogger(__name__)

Report = Callable[[Mapping[str, Any]], None]


def quantize_key(recipe: Recipe, base: Manifest, calibration: Text) -> str:
    return STAGE.key(
        reads={"base": read_part(base).digest, "calibration": calibration.digest},
        settings={**recipe.quantize.model_dump(exclude={"calibration"}), "allow_remote_code": recipe.allow_remote_code},
    )


def read_part(base: Manifest) -> Manifest:
    """The files of a base that quantize reads."""
    return Manifest.of(f for f in base.files if any(fnmatch.fnmatch(f.path, pattern) for pattern in READ))


def quantize(
    store: Store,
    recipe: Recipe,
    base: Manifest,
    calibration: Text,
    report: Report = lambda event: None,
    say: Callable[[str], None] = log.info,
) -> StageResult:
    """Quantize a downloaded base. `report` gets the child's events as they come.

    Raises QuantizeFailed, QuantizeDied (retryable: resumes), OutOfMemory, CheckpointError.
    """

    def work(folder: Path) -> Made:
        model = store.hand_out(read_part(base), folder / "base")
        checkpoint = _open_base(model, recipe)
        head = checkpoint.head
        job = {
            **recipe.quantize.model_dump(exclude={"calibration"}),
            **dict(zip(("bits", "group_size", "sym"), recipe.quantize.resolved, strict=True)),
            "model": str(model),
            "texts": [str(path) for path in _text_files(store, calibration, folder)],
            "head": head.prefixes if head else [],
            "allow_remote_code": recipe.allow_remote_code,
        }
        result, attempts = _down_the_ladder(job, folder, report, say)
        packed = Checkpoint.open(Path(result["checkpoint"]))
        files = assemble(checkpoint, packed, result["bits"], folder / "assembled")
        put_files(store, folder / "assembled", files)
        record = {
            "calibration": calibration.name,
            "settings": result["settings"],
            "attempts": attempts,
            "blocks": blocks_of(folder / "events.jsonl"),
            "peak_gpu_bytes": result["peak_gpu_bytes"],
        }
        return Made(Manifest.of(files), record)

    return run_stage(store, STAGE, quantize_key(recipe, base, calibration), work, say)


def _open_base(folder: Path, recipe: Recipe) -> Checkpoint:
    """The base, if it can become what the recipe asks for: found out before hours of work."""
    try:
        checkpoint = Checkpoint.open(folder).sound()
        if packed_parts(checkpoint.tensors.values()):
            raise CheckpointError("it is already quantized: name the base that it was made of")
        if recipe.mtp != "drop":
            check_head(checkpoint)
    except CheckpointError as error:
        sentence = str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "it")
        raise CheckpointError(f"the base {recipe.base.repo_id} cannot be used: {sentence}") from error
    return checkpoint


def _text_files(store: Store, text: Text, folder: Path) -> list[Path]:
    if text.path is not None:
        return [text.path]
    assert text.dataset is not None
    manifest = download(store, text.dataset).manifest
    store.hand_out(manifest, folder / "calibration")
    return [folder / "calibration" / file.path for file in manifest.files]


def ladder(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The job as asked, then settings that need less memory and give the same result but for float noise."""
    rung: dict[str, Any] = {**job, "gradient_accumulate_steps": 1}
    yield rung
    if rung["low_gpu_mem"] is not True:  # it may be "auto"
        rung = {**rung, "low_gpu_mem": True}
        yield rung
    asked = job["batch_size"]
    for batch in (size for size in range(asked // 2, 0, -1) if asked % size == 0):
        rung = {**rung, "batch_size": batch, "gradient_accumulate_steps": asked // batch}
        yield rung


def _down_the_ladder(
    job: Mapping[str, Any], folder: Path, report: Report, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the child with each rung until one ends well; returns its result and what was tried."""
    attempts: list[dict[str, Any]] = []
    result_path = folder / "result.json"
    compiled = True
    for rung in ladder(job):
        while True:
            if not result_path.exists():
                settings = rung if compiled else {**rung, "torch_compile": False}
                error = run_child(settings, folder, report)
                kept = ("batch_size", "gradient_accumulate_steps", "low_gpu_mem", "torch_compile")
                attempts.append({**{k: settings[k] for k in kept}, "ended": error.get("kind", "done")})
            else:
                error = {}
            if not error:
                result: dict[str, Any] = json.loads(result_path.read_text())
                return result, attempts
            if error["kind"] == "compile" and compiled:
                say("torch.compile failed in this block: going on without it")
                compiled = False
                continue
            break
        if error["kind"] == "refused":
            raise QuantizeFailed(error["text"])
        if error["kind"] != "oom":
            raise QuantizeFailed(f"auto-round failed: {error['text']} (its log: {folder / 'log.txt'})")
        say(f"out of memory with batch size {rung['batch_size']}: going on with less")
    raise OutOfMemory(
        f"out of memory even with one sample a step ({folder / 'log.txt'}): use a device with more memory"
    )


def run_child(job: Mapping[str, Any], folder: Path, report: Report, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Run the child to its end. Returns {} if result.json is there, else its `error` event {kind, text}.

    Raises QuantizeDied if it was killed from outside, StageTimeout after `timeout` seconds.
    """
    (folder / "job.json").write_text(json.dumps(job))
    events = folder / "events.jsonl"
    position = events.stat().st_size if events.exists() else 0
    environment = {k: v for k, v in os.environ.items() if k not in SECRET_VARIABLES}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    package = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tasks.quantize_child", str(folder / "job.json"), str(folder)]
    last: dict[str, Any] = {}
    with (folder / "log.txt").open("ab") as output:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        deadline = time.monotonic() + timeout
        try:
            running = True
            while running:
                running = child.poll() is None
                position, new = read_events(events, position)
                for event in new:
                    last = event
                    report(event)
                if time.monotonic() > deadline:
                    raise StageTimeout(f"quantize ran for {timeout / 3600:.0f} hours: its finished blocks are kept")
                if running:
                    time.sleep(0.3)
        finally:
            _end(child)
    if (folder / "result.json").exists():
        return {}
    if last.get("event") == "error":
        return last
    code = child.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    raise QuantizeDied(
        f"the quantize process ended with {how}; its finished blocks are kept, and the next run goes on from them "
        f"(its log: {folder / 'log.txt'})"
    )


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and everything it started."""
    if child.stdin is not None:
        child.stdin.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def read_events(path: Path, position: int) -> tuple[int, list[dict[str, Any]]]:
    """Whole lines of events.jsonl behind `position`, and the position after them."""
    if not path.exists():
        return position, []
    with path.open("rb") as stream:
        stream.seek(position)
        data = stream.read()
    end = data.rfind(b"\n") + 1
    events = []
    for line in data[:end].splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            events.append(json.loads(line))
    return position + end, events


def blocks_of(events: Path) -> list[dict[str, Any]]:
    """What happened to each block, from all attempts: name, seconds, loss before and after (the last attempt's)."""
    blocks: dict[str, dict[str, Any]] = {}
    name, began = None, 0.0
    for event in read_events(events, 0)[1]:
        if event["event"] == "block":
            name, began = event["name"], event["seconds"]
            starts = blocks.get(name, {}).get("starts", 0)
            blocks[name] = {"name": name, "starts": starts + 1}
        elif event["event"] == "loss" and name is not None:
            blocks[name] |= {"loss_before": event["before"], "loss_after": event["after"]}
        elif event["event"] == "progress" and name is not None:
            blocks[name]["seconds"] = round(event["seconds"] - began, 3)
    return list(blocks.values())


@task(**options("quantize", hours=48))
def quantize_task(recipe: Recipe, base: Manifest, calibration: Text) -> Any:
    return shown(quantize(open_store(), recipe, base, calibration, BlockProgress(), say()))
