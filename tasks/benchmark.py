"""benchmark: how fast the checkpoint is in an inference engine, and how many of its drafts are accepted.

vLLM is started with MTP and without; a server that runs already is asked as it is; where there is no engine,
transformers on the machine at hand is timed, and the record says that this is no engine's figure.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task

from requant.tasks import hardware
from requant.tasks.artifact import File, Manifest
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.writer import write_file, write_json
from requant.tasks.errors import CheckpointError, redact
from requant.tasks.pipeline.prefect import options, stage_summary
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.recipe.engine_flags import speculates, with_drafts, without_drafts
from requant.tasks.recipe.recipe import Benchmark, Recipe
from requant.tasks.serving.client import SAMPLING
from requant.tasks.serving.measure import measure_speed, summarized
from requant.tasks.serving.prompts import digest_of_prompts, has_chat_template, prompts_of
from requant.tasks.serving.vllm import find, server_at, vllm
from requant.tasks.store import Store, open_store

STAGE = Stage("benchmark", 2, tools=("transformers", "auto-round"))
RESULT_FILE = "benchmark.json"
KEPT_LOG = 4 << 20  # bytes of an engine's log, its end
log = logging.getLogger(__name__)


def benchmark_key(recipe: Recipe, artifact: Manifest) -> str:
    asked = recipe.benchmark
    settings = {"engine": "none"} if asked.engine == "none" else asked.model_dump()
    return STAGE.key(
        reads={"artifact": artifact.digest, "prompts": digest_of_prompts(prompts_of(asked.prompts, asked.max_tokens))},
        settings={**settings, "allow_remote_code": recipe.allow_remote_code},
    )


def benchmark(store: Store, recipe: Recipe, artifact: Manifest) -> StageResult:
    """Measure an artifact's speed; what was measured is in the artifact `benchmark.json`, the engine's logs beside it.

    Raises EngineFailed, RecipeError, CheckpointError.
    """

    def work(folder: Path) -> Made:
        logs = folder / "logs"
        ours = store.link_files(artifact, folder / "artifact")
        values = bench(ours, recipe.benchmark, logs, remote_code=recipe.allow_remote_code)
        kept = [_keep_log(path, folder / "out") for path in sorted(logs.glob("*.log"))]
        values = {**values, "logs": [file.path for file in kept]}
        files = [write_json(folder / "out", RESULT_FILE, values), *kept]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"measured": values, "bytes_read": artifact.size})

    return run_stage(store, STAGE, benchmark_key(recipe, artifact), work, lambda: used_tools(recipe.benchmark))


def used_tools(asked: Benchmark) -> tuple[str, ...]:
    """The stage's tools that a benchmark runs here. vLLM and a server that runs already have environments of their
    own."""
    return STAGE.tools if _engine(asked) == "torch" else ()


def _engine(asked: Benchmark) -> str:
    """Choose the engine that measures on this machine."""
    return asked.engine if asked.engine != "auto" else "vllm" if find() else "torch"


def _keep_log(path: Path, out: Path) -> File:
    text = path.read_bytes()[-KEPT_LOG:].decode("utf-8", "replace")
    return write_file(out, path.name, [redact(text).encode()])


def bench(
    folder: Path,
    asked: Benchmark,
    logs: Path,
    *,
    mtp: str = "auto",
    remote_code: bool = False,
) -> dict[str, Any]:
    """Measure a checkpoint. `mtp`: on, off, both, or auto, which is both where there is a head; for vLLM only.

    Logs of an engine that is started go into the folder `logs`. Raises EngineFailed, RecipeError, CheckpointError.
    """
    engine = _engine(asked)
    if engine == "none":
        return {"engine": engine, "prompts": [], "tokens_per_second": None, "acceptance": None}
    checkpoint = Checkpoint.open(folder)
    log.info(f"measuring {folder.name} in {engine}")
    if engine == "torch":
        return {"engine": engine, **measure_in_torch(folder, remote_code)}
    settings = {
        "sampling": SAMPLING,
        "concurrency": sorted({1, asked.concurrency}),
        "flags": asked.flags,
        "draft_tokens": asked.draft_tokens,
    }
    chat = has_chat_template({path.name for path in folder.iterdir()}, lambda name: (folder / name).read_bytes())
    prompts = prompts_of(asked.prompts, asked.max_tokens)
    if engine.startswith("url:"):
        server = server_at(engine.removeprefix("url:"), chat=chat)
        rows = measure_speed(server, prompts, asked.concurrency, None)
        return {"engine": engine, "model": server.model, **summarized(rows), **settings, "commands": []}
    modes = _modes(mtp, checkpoint, asked.flags)
    rows, commands, peaks, version = [], [], {}, ""
    for drafting in modes:
        name = "on" if drafting else "off"
        with vllm(
            folder,
            with_drafts(asked.flags, asked.draft_tokens) if drafting else without_drafts(asked.flags),
            logs / f"vllm-mtp-{name}.log",
            chat=chat,
            remote_code=remote_code,
        ) as running:
            rows += measure_speed(running.server, prompts, asked.concurrency, drafting)
            running.look_at_memory()
            version, peaks[name] = running.version, running.peak_gpu_bytes
            commands.append({"mtp": drafting, "words": running.command})
    return {
        "engine": engine,
        "version": f"vLLM {version}",
        "hardware": ", ".join(hardware.names()) or f"CPU, {hardware.machine()['cpus']} cores",
        **summarized(rows),
        **settings,
        "commands": commands,
        "peak_gpu_bytes": max((peak for peak in peaks.values() if peak), default=None),
    }


def measure_in_torch(folder: Path, remote_code: bool) -> dict[str, Any]:
    from requant.tasks.serving import in_torch  # torch takes seconds to import, and an engine needs none of it

    return in_torch.measure_in_torch(folder, remote_code=remote_code)


def _modes(mtp: str, checkpoint: Checkpoint, flags: Mapping[str, Any]) -> list[bool]:
    """With drafts or without: which of the two, in which order."""
    drafts = checkpoint.head is not None or any(map(speculates, flags))
    if mtp == "auto":
        mtp = "both" if drafts else "off"
    if mtp != "off" and not drafts:
        raise CheckpointError(f"{checkpoint.folder} has no MTP head to draft with: measure it with --mtp off")
    return {"on": [True], "off": [False], "both": [False, True]}[mtp]


def read_values(store: Store, result: StageResult) -> dict[str, Any]:
    """What a benchmark stage measured."""
    values: dict[str, Any] = json.loads(store.read_blob(result.manifest[RESULT_FILE]))
    return values


@task(**options("benchmark", hours=4))
def benchmark_task(recipe: Recipe, artifact: Manifest) -> Any:
    return stage_summary(benchmark(open_store(), recipe, artifact))
