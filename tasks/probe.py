"""The stage `probe`: the same questions to base and result in vLLM, compared in pairs.

The questions ask for tool calls, for answers that end, and for values in long texts: what quantization damages while
perplexity is fine. What a checkpoint answered is kept, so a base is asked once for all results made from it.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from requant.tasks.artifact import Manifest, StageKey
from requant.tasks.benchmark import copy_log
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.writer import write_json
from requant.tasks.documents import read_stored
from requant.tasks.errors import EngineFailed
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.probing.compare import ProbeDocument
from requant.tasks.probing.outcome import ProbeResult
from requant.tasks.probing.sets import ask_sets, digest_of_questions
from requant.tasks.recipe.recipe import Benchmark, Probes, Recipe
from requant.tasks.serving.flags import can_draft, serving_flags
from requant.tasks.serving.prompts import has_chat_template
from requant.tasks.serving.vllm import find_vllm, serve_vllm
from requant.tasks.store import Store
from requant.tasks.validate import compared_part
from requant.tasks.validating.drafts import EngineSetup

STAGE = Stage("probe", 2)
ANSWERS = Stage("probe_answers", 1)  # of one checkpoint
RESULT_FILE = "probe.json"
log = logging.getLogger(__name__)


def probe_key(recipe: Recipe, base: Manifest, artifact: Manifest) -> StageKey:
    base = compared_part(base)
    reads = {"base": base.digest, "artifact": artifact.digest}
    return STAGE.key(reads=reads, settings={"answers": [_answers_key(recipe, one) for one in (base, artifact)]})


def probe(store: Store, recipe: Recipe, base: Manifest, artifact: Manifest) -> StageResult:
    """Ask the base and the result of a recipe with `probes`. The stage's artifact is probe.json, with both.

    Raises EngineFailed if there is no vLLM to be started, or if it does not serve one of them, CheckpointError.
    """

    def work(folder: Path) -> Made:
        def ask(checkpoint: Manifest, like: EngineSetup | None = None) -> ProbeResult:
            return _stored_answers(store, recipe, checkpoint, folder / checkpoint.digest, like)

        base_files = compared_part(base)
        of_base, ours = ask(base_files), ask(artifact)
        if of_base.setup != ours.setup:  # One of them was asked some time ago, or on another machine.
            of_base = ask(base_files, ours.setup)
        if of_base.setup != ours.setup:
            ours = ask(artifact, of_base.setup)
        if of_base.setup != ours.setup:
            raise EngineFailed(
                f"the base was served by {of_base.setup} and the result by {ours.setup}: use one machine"
            )
        files = [write_json(folder / "out", RESULT_FILE, ProbeDocument(base=of_base, ours=ours).to_json())]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"bytes_read": base.size + artifact.size})

    return run_stage(store, STAGE, probe_key(recipe, base, artifact), work)


def read_probes(store: Store, stage: StageResult) -> ProbeDocument:
    """Read what the stage measured. Raises StoreError if its probe.json cannot be read."""
    return read_stored(ProbeDocument, store.read_blob(stage.manifest[RESULT_FILE]), RESULT_FILE)


def _stored_answers(
    store: Store, recipe: Recipe, checkpoint: Manifest, scratch: Path, like: EngineSetup | None
) -> ProbeResult:
    """Return what one checkpoint answered, from the store if it is there.

    With a setup `like`, answers of another one do not do. Where another engine runs here by now, the answers have its
    setup, and are stored under that.
    """

    def ask(folder: Path) -> ProbeResult:
        return ask_checkpoint(store.link_files(checkpoint, folder / "checkpoint"), recipe, folder / "logs")

    def keep(result: ProbeResult, logs: Path, folder: Path) -> Made:
        log_files = [copy_log(path, folder / "out") for path in sorted(logs.glob("*.log"))]
        files = [write_json(folder / "out", RESULT_FILE, result.to_json()), *log_files]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"bytes_read": checkpoint.size})

    key = _answers_key(recipe, checkpoint, like)
    made = store.find(ANSWERS.name, key)
    if made is not None:
        store.used.append((ANSWERS.name, key))
    elif like is None:
        made = run_stage(store, ANSWERS, key, lambda folder: keep(ask(folder), folder / "logs", folder)).manifest
    else:
        asked = ask(scratch)
        key = _answers_key(recipe, checkpoint, asked.setup)
        made = run_stage(store, ANSWERS, key, lambda folder: keep(asked, scratch / "logs", folder)).manifest
    return read_stored(ProbeResult, store.read_blob(made[RESULT_FILE]), RESULT_FILE)


def _answers_key(recipe: Recipe, checkpoint: Manifest, setup: EngineSetup | None = None) -> StageKey:
    asked, engine = _asked(recipe), recipe.benchmark
    return ANSWERS.key(
        reads={"checkpoint": checkpoint.digest, "questions": digest_of_questions(asked)},
        settings={
            **asked.model_dump(),
            "flags": engine.flags,
            "draft_tokens": engine.draft_tokens,
            "allow_remote_code": recipe.allow_remote_code,
            **(vars(setup) if setup else {}),
        },
    )


def ask_checkpoint(folder: Path, recipe: Recipe, logs: Path) -> ProbeResult:
    """Serve the checkpoint in `folder` as the recipe's benchmark does, with drafts if it has a head, and ask it.

    Raises EngineFailed, CheckpointError.
    """
    if why := no_engine(recipe.benchmark):
        raise EngineFailed(why)
    asked, checkpoint = _asked(recipe), Checkpoint.open(folder)
    drafts = can_draft(checkpoint, recipe.benchmark)
    flags = serving_flags(checkpoint.config, recipe.benchmark, drafts=drafts)
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
