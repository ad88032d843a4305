"""The stage `probe`: the same questions to base and result in vLLM, compared in pairs.

The questions ask for tool calls, for answers that end, and for values in long texts: what quantization damages while
perplexity is fine. What a checkpoint answered is kept, so a base is asked once for all results made from it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from prefect import task

from requant.tasks.artifact import Manifest
from requant.tasks.benchmark import copy_log
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.writer import write_json
from requant.tasks.errors import EngineFailed
from requant.tasks.pipeline.prefect import options, stage_summary
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.probing.compare import ProbeDocument
from requant.tasks.probing.outcome import ProbeResult
from requant.tasks.probing.sets import ask_sets, digest_of_questions
from requant.tasks.recipe.engine_flags import speculates, with_drafts
from requant.tasks.recipe.recipe import Benchmark, Probes, Recipe
from requant.tasks.serving.prompts import has_chat_template
from requant.tasks.serving.vllm import find_vllm, serve_vllm
from requant.tasks.store import Store, open_store

STAGE = Stage("probe", 1)
ANSWERS = Stage("probe_answers", 1)  # of one checkpoint
RESULT_FILE = "probe.json"
OF_RESULT_ONLY = {"quantization", "q"}  # flags that a base cannot be served with
log = logging.getLogger(__name__)


def probe_key(recipe: Recipe, base: Manifest, artifact: Manifest) -> str:
    reads = {"base": base.digest, "artifact": artifact.digest}
    return STAGE.key(reads=reads, settings={"answers": [_answers_key(recipe, one) for one in (base, artifact)]})


def probe(store: Store, recipe: Recipe, base: Manifest, artifact: Manifest) -> StageResult:
    """Ask the base and the result of a recipe with `probes`. The stage's artifact is probe.json, with both.

    Raises EngineFailed if there is no vLLM to be started, or if it does not serve one of them, CheckpointError.
    """

    def work(folder: Path) -> Made:
        started = {"base": base, "ours": artifact}
        answers = {side: _stored_answers(store, recipe, manifest) for side, manifest in started.items()}
        files = [write_json(folder / "out", RESULT_FILE, ProbeDocument(**answers).to_json())]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"bytes_read": base.size + artifact.size})

    return run_stage(store, STAGE, probe_key(recipe, base, artifact), work)


def read_probes(store: Store, stage: StageResult) -> ProbeDocument:
    """Read what the stage measured. Raises StoreError if its probe.json cannot be read."""
    return ProbeDocument.model_validate_json(store.read_blob(stage.manifest[RESULT_FILE]))


def _stored_answers(store: Store, recipe: Recipe, checkpoint: Manifest) -> ProbeResult:
    """Return what one checkpoint answered, from the store if it is there."""

    def work(folder: Path) -> Made:
        logs = folder / "logs"
        result = ask_checkpoint(store.link_files(checkpoint, folder / "checkpoint"), recipe, logs)
        log_files = [copy_log(path, folder / "out") for path in sorted(logs.glob("*.log"))]
        files = [write_json(folder / "out", RESULT_FILE, result.to_json()), *log_files]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"bytes_read": checkpoint.size})

    made = run_stage(store, ANSWERS, _answers_key(recipe, checkpoint), work)
    return ProbeResult.model_validate_json(store.read_blob(made.manifest[RESULT_FILE]))


def _answers_key(recipe: Recipe, checkpoint: Manifest) -> str:
    asked, engine = _asked(recipe), recipe.benchmark
    return ANSWERS.key(
        reads={"checkpoint": checkpoint.digest, "questions": digest_of_questions(asked)},
        settings={
            **asked.model_dump(),
            "flags": engine.flags,
            "draft_tokens": engine.draft_tokens,
            "allow_remote_code": recipe.allow_remote_code,
        },
    )


def ask_checkpoint(folder: Path, recipe: Recipe, logs: Path) -> ProbeResult:
    """Serve the checkpoint in `folder` as the recipe's benchmark does, with drafts if it has a head, and ask it.

    Raises EngineFailed, CheckpointError.
    """
    if why := no_engine(recipe.benchmark):
        raise EngineFailed(why)
    asked, checkpoint = _asked(recipe), Checkpoint.open(folder)
    flags = recipe.benchmark.flags
    if checkpoint.head is not None or any(map(speculates, flags)):
        flags = with_drafts(flags, recipe.benchmark.draft_tokens)
    if "quantization_config" not in checkpoint.config:
        flags = {name: value for name, value in flags.items() if name not in OF_RESULT_ONLY}
    chat = has_chat_template({path.name for path in folder.iterdir()}, lambda name: (folder / name).read_bytes())
    began_s = time.monotonic()
    with serve_vllm(folder, flags, logs / "vllm.log", chat=chat, remote_code=recipe.allow_remote_code) as running:
        sets = ask_sets(running.server, asked)
        return ProbeResult(
            sets=sets,
            version=f"vLLM {running.version}",
            hardware=running.hardware,
            seconds=round(time.monotonic() - began_s, 1),
        )


def no_engine(benchmark: Benchmark) -> str:
    """Say why no checkpoint can be probed on this machine; empty if that is possible."""
    if benchmark.engine.startswith("url:"):
        return "a server that runs already serves the result alone, and there is nothing to compare it with"
    if benchmark.engine in {"torch", "none"}:
        return f"probes need vLLM, and benchmark.engine is {benchmark.engine}: set it to vllm or auto"
    return "" if find_vllm() else "probes need vLLM, and there is none on this machine: install it, or set REQUANT_VLLM"


def _asked(recipe: Recipe) -> Probes:
    assert recipe.probes is not None
    return recipe.probes


@task(**options("probe", hours=24))
def probe_task(recipe: Recipe, base: Manifest, artifact: Manifest) -> Any:
    return stage_summary(probe(open_store(), recipe, base, artifact))
