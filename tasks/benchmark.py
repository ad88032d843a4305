"""The stage `benchmark`: how fast the checkpoint is in an inference engine, and its draft acceptance rate there.

vLLM is started with MTP and without. A server that is running already is measured as it is. Without an engine, the
speed of transformers on this machine is measured, and the result says that it is not an engine's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from requant.tasks.artifact import File, Manifest, StageKey
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.writer import write_file, write_json
from requant.tasks.errors import CheckpointError, redact
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.recipe.recipe import Benchmark, Recipe
from requant.tasks.serving.client import SAMPLING
from requant.tasks.serving.drafts import ServedCheckpoint
from requant.tasks.serving.flags import can_draft, serving_flags
from requant.tasks.serving.measure import measure_speed
from requant.tasks.serving.prompts import digest_of_prompts, has_chat_template, load_prompts
from requant.tasks.serving.result import BenchmarkResult, PromptResult, ServeCommand, compare_mtp
from requant.tasks.serving.vllm import find_server, find_vllm, serve_vllm
from requant.tasks.store import Store
from requant.tasks.validating.drafts import EngineSetup

STAGE = Stage("benchmark", 2, tools=("transformers", "auto-round"))
RESULT_FILE = "benchmark.json"
MAX_LOG_BYTES = 4 << 20
NOT_MEASURED_HERE = {"acceptance_precision", "base_engine"}  # settings of the stage `acceptance`
log = logging.getLogger(__name__)

MtpModes = Literal["auto", "on", "off", "both"]
CountDrafts = Callable[[Manifest, ServedCheckpoint], None]


def benchmark_key(recipe: Recipe, artifact: Manifest) -> StageKey:
    asked = recipe.benchmark
    settings = {"engine": "none"} if asked.engine == "none" else asked.model_dump(exclude=NOT_MEASURED_HERE)
    prompts = load_prompts(asked.prompts, asked.max_tokens)
    return STAGE.key(
        reads={"artifact": artifact.digest, "prompts": digest_of_prompts(prompts)},
        settings={**settings, "allow_remote_code": recipe.allow_remote_code},
    )


def benchmark(store: Store, recipe: Recipe, artifact: Manifest, count_drafts: CountDrafts | None = None) -> StageResult:
    """Measure the speed of an artifact. The stage's artifact is benchmark.json and the engine's logs.

    `count_drafts` is called with the artifact while an engine serves it and drafts. Raises EngineFailed, RecipeError,
    CheckpointError.
    """
    count = functools.partial(count_drafts, artifact) if count_drafts is not None else None

    def work(folder: Path) -> Made:
        logs = folder / "logs"
        checkpoint = store.link_files(artifact, folder / "artifact")
        result = bench(checkpoint, recipe.benchmark, logs, remote_code=recipe.allow_remote_code, count=count)
        log_files = [copy_log(path, folder / "out") for path in sorted(logs.glob("*.log"))]
        document = result.with_logs(file.path for file in log_files).to_json()
        files = [write_json(folder / "out", RESULT_FILE, document), *log_files]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"measured": document, "bytes_read": artifact.size})

    return run_stage(store, STAGE, benchmark_key(recipe, artifact), work, lambda: used_tools(recipe.benchmark))


def read_result(store: Store, measured: Manifest) -> BenchmarkResult:
    """Read the artifact of a benchmark stage. Raises StoreError if its benchmark.json cannot be read."""
    return BenchmarkResult.from_json(store.read_blob(measured[RESULT_FILE]))


def used_tools(asked: Benchmark) -> tuple[str, ...]:
    """Return the tools of the stage that a benchmark runs in this environment: vLLM and servers have their own."""
    return STAGE.tools if engine_of(asked) == "torch" else ()


def engine_of(asked: Benchmark) -> str:
    """Choose the engine that measures on this machine."""
    return asked.engine if asked.engine != "auto" else "vllm" if find_vllm() else "torch"


def copy_log(path: Path, out: Path) -> File:
    """Copy the end of a log, without the values of secrets."""
    text = path.read_bytes()[-MAX_LOG_BYTES:].decode("utf-8", "replace")
    return write_file(out, path.name, [redact(text).encode()])


def bench(
    folder: Path,
    asked: Benchmark,
    logs: Path,
    *,
    mtp: MtpModes = "auto",
    remote_code: bool = False,
    count: Callable[[ServedCheckpoint], None] | None = None,
) -> BenchmarkResult:
    """Measure the checkpoint in `folder` as the recipe's section `benchmark` asks.

    `mtp` chooses whether vLLM drafts with the MTP head: `on`, `off`, `both`, or `auto`, which is `both` if there is a
    head. The logs of an engine that is started are written to the folder `logs`. `count` is called while vLLM drafts,
    or with a server that runs already if another one has the base. Raises EngineFailed, RecipeError, CheckpointError.
    """
    engine = engine_of(asked)
    if engine == "none":
        return BenchmarkResult(engine=engine, prompts=(), tokens_per_second=None, acceptance=None)
    checkpoint = Checkpoint.open(folder)
    log.info(f"measuring {folder.name} in {engine}")
    if engine == "torch":
        from requant.tasks.serving.in_torch import measure_in_torch  # torch takes seconds to import

        return measure_in_torch(folder, remote_code=remote_code)
    chat = has_chat_template({path.name for path in folder.iterdir()}, lambda name: (folder / name).read_bytes())
    prompts = load_prompts(asked.prompts, asked.max_tokens)
    if engine.startswith("url:"):
        server = find_server(engine.removeprefix("url:"), chat=chat)
        rows = measure_speed(server, prompts, asked.concurrency, None)
        if count is not None and asked.base_engine is not None:
            count(ServedCheckpoint(folder, server, engine, EngineSetup()))
        return _result_of(engine, asked, rows).model_copy(update={"model": server.model})
    rows, commands, peaks_bytes, setup = [], [], [], EngineSetup()
    for drafting in _modes(mtp, checkpoint, asked):
        flags = serving_flags(checkpoint.config, asked, drafts=drafting)
        log_path = logs / f"vllm-mtp-{'on' if drafting else 'off'}.log"
        with serve_vllm(folder, flags, log_path, chat=chat, remote_code=remote_code) as running:
            rows += measure_speed(running.server, prompts, asked.concurrency, drafting)
            running.measure_memory()
            setup = EngineSetup(f"vLLM {running.version}", running.hardware)
            if drafting and count is not None:
                count(ServedCheckpoint(folder, running.server, engine, setup))
            commands.append(ServeCommand(mtp=drafting, words=tuple(running.command)))
            peaks_bytes.append(running.peak_gpu_bytes or 0)
    return _result_of(engine, asked, rows, commands).model_copy(
        update={"version": setup.version, "hardware": setup.hardware, "peak_gpu_bytes": max(peaks_bytes) or None}
    )


def _result_of(
    engine: str, asked: Benchmark, rows: Sequence[PromptResult], commands: Sequence[ServeCommand] = ()
) -> BenchmarkResult:
    """Put together what was measured in an engine. Its speed is that with MTP where MTP was measured."""
    mtp = compare_mtp(rows)
    best = mtp.on or mtp.off
    return BenchmarkResult(
        engine=engine,
        prompts=tuple(rows),
        tokens_per_second=best.tokens_per_second if best else None,
        acceptance=best.acceptance if best else None,
        mtp=mtp,
        sampling=SAMPLING,
        concurrency=tuple(sorted({1, asked.concurrency})),
        flags=asked.flags,
        draft_tokens=asked.draft_tokens,
        commands=tuple(commands),
    )


def _modes(mtp: MtpModes, checkpoint: Checkpoint, asked: Benchmark) -> list[bool]:
    """Choose whether to measure with drafts, without, or both, in this order."""
    drafts = can_draft(checkpoint, asked)
    if mtp == "auto":
        mtp = "both" if drafts else "off"
    if mtp != "off" and not drafts:
        raise CheckpointError(f"{checkpoint.folder} has no MTP head to draft with: measure it with --mtp off")
    return {"on": [True], "off": [False], "both": [False, True]}[mtp]
