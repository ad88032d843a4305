"""The stage `acceptance`: does the engine accept the drafts of the quantized checkpoint as often as the base's?

The engine counts the drafts of both at the same places of the text for validation, with the same flags. The quantized
checkpoint is counted by the server that the benchmark started for it; the base by one of its own, afterwards, since a
GPU may hold only one of them. The count of a base is kept, and serves all that is made from it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.tasks.artifact import Manifest, StageKey
from requant.tasks.checkpoint.checkpoint import read_json
from requant.tasks.checkpoint.writer import write_json
from requant.tasks.documents import read_stored
from requant.tasks.errors import CheckpointError, EngineFailed
from requant.tasks.evaluation_text import MAX_CHARACTERS, text_for_measuring
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.recipe.engine_flags import server_address, speculates
from requant.tasks.recipe.recipe import Benchmark, Recipe
from requant.tasks.redaction import public
from requant.tasks.serving.drafts import ServedCheckpoint, count_drafts
from requant.tasks.serving.flags import serving_flags
from requant.tasks.serving.result import BenchmarkResult
from requant.tasks.serving.vllm import find_server, find_vllm, serve_vllm
from requant.tasks.store import Store
from requant.tasks.texts.rows import read_rows
from requant.tasks.texts.text import Text
from requant.tasks.validate import compared_part
from requant.tasks.validating.drafts import DraftComparison, DraftCount, EngineSetup

STAGE = Stage("acceptance", 2)
COUNT = Stage("drafts", 2)
RESULT_FILE, COUNT_FILE = "acceptance.json", "drafts.json"
NO_BASE_SERVER = "the server has the result alone: name one that has the base in benchmark.base_engine"
log = logging.getLogger(__name__)


def drafts_in(engine: str, asked: Benchmark, *, head: bool) -> bool:
    """Check whether a result drafts in an engine, which is never auto here. `head`: the result has an MTP head."""
    return (head or any(map(speculates, asked.flags))) and (engine == "vllm" or engine.startswith("url:"))


def serves_base(engine: str, asked: Benchmark) -> bool:
    """Check whether the base can be served beside a result: a server that runs already has only the result."""
    return engine == "vllm" or asked.base_engine is not None


def without_addresses(sentence: str, asked: Benchmark) -> str:
    """Take the addresses of the recipe's servers and folders of this machine out of a sentence that is published."""
    for engine in (asked.engine, asked.base_engine or ""):
        if engine.startswith("url:"):
            sentence = sentence.replace(server_address(engine), "the server")
    return str(public(sentence))


def acceptance_key(recipe: Recipe, base: Manifest, artifact: Manifest, text: Text, engine: str) -> StageKey:
    settings = {**_settings(recipe), "engine": engine, "base_engine": recipe.benchmark.base_engine}
    return STAGE.key(
        reads={"base": compared_part(base).digest, "artifact": artifact.digest, "text": text.digest}, settings=settings
    )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings on which a count of drafts depends, without the engine."""
    settings = recipe.benchmark.model_dump(include={"flags", "draft_tokens", "acceptance_precision"})
    return {**settings, "allow_remote_code": recipe.allow_remote_code}


@dataclass(frozen=True)
class DraftCounter:
    """Counts the drafts of checkpoints as a recipe asks, or takes the count from the store."""

    store: Store
    recipe: Recipe
    text: Text

    def count(self, checkpoint: Manifest, engine: str, like: EngineSetup, scratch: Path) -> DraftCount:
        """Return the count of a checkpoint in the setup `like`, from the store if it is there.

        Otherwise the checkpoint is served, with files in the folder `scratch`. Where another engine runs here by now,
        the count has another setup, and is stored under that.
        """
        key = self._key(checkpoint, engine, like)
        stored = self.store.find(COUNT.name, key)
        if stored is not None:
            self.store.used.append((COUNT.name, key))
            return self._read(stored)
        with self.serve(checkpoint, engine, scratch) as running:
            return self._count(checkpoint, running)

    def _key(self, checkpoint: Manifest, engine: str, setup: EngineSetup) -> str:
        return COUNT.key(
            reads={"checkpoint": checkpoint.digest, "text": self.text.digest},
            settings={**_settings(self.recipe), "engine": engine, **vars(setup)},
        )

    def _count(self, checkpoint: Manifest, running: ServedCheckpoint) -> DraftCount:
        """Count the drafts of a checkpoint that is being served, or take the count in this setup from the store."""

        def work(scratch: Path) -> Made:
            remote_code = self.recipe.allow_remote_code
            path = text_for_measuring(self.store, self.text, scratch / "words", running.folder, remote_code)
            text = "\n\n".join(row.text for row in read_rows([path], self.text.name))[:MAX_CHARACTERS]
            log.info(f"counting drafts at places of {self.text.name}")
            precision = self.recipe.benchmark.acceptance_precision
            made = count_drafts(running.server, text, precision, running.setup)
            files = [write_json(scratch / "out", COUNT_FILE, made.to_json())]
            put_files(self.store, scratch / "out", files)
            return Made(Manifest.of(files), {"drafted": made.tokens, "acceptance": made.rate})

        key = self._key(checkpoint, running.engine, running.setup)
        return self._read(run_stage(self.store, COUNT, key, work).manifest)

    def _read(self, stored: Manifest) -> DraftCount:
        return read_stored(DraftCount, self.store.read_blob(stored[COUNT_FILE]), COUNT_FILE)

    def count_while_served(self, checkpoint: Manifest, running: ServedCheckpoint) -> None:
        """Count the drafts of a checkpoint that is being served, and keep the count for `acceptance`.

        If that fails, what else is measured is not lost: `acceptance` counts itself, or says why it cannot.
        """
        try:
            self._count(checkpoint, running)
        except (EngineFailed, CheckpointError) as error:
            log.warning(f"the drafts were not counted: {error}")

    @contextlib.contextmanager
    def serve(self, checkpoint: Manifest, engine: str, scratch: Path) -> Iterator[ServedCheckpoint]:
        """Serve a checkpoint in vLLM, or find the server that has it.

        Raises EngineFailed, also if vLLM measured the result elsewhere and is not on this machine.
        """
        folder = self.store.link_files(checkpoint, scratch / "checkpoint")
        if engine.startswith("url:"):
            server = find_server(engine.removeprefix("url:"), chat=False)
            yield ServedCheckpoint(folder, server, engine, EngineSetup())
            return
        if find_vllm() is None:
            raise EngineFailed("drafts are counted by vLLM, and there is none here: install it, or set REQUANT_VLLM")
        asked, remote_code = self.recipe.benchmark, self.recipe.allow_remote_code
        flags = serving_flags(read_json(folder / "config.json"), asked, drafts=True)
        log_path = scratch / "logs" / "vllm.log"
        with serve_vllm(folder, flags, log_path, chat=False, remote_code=remote_code) as running:
            setup = EngineSetup(f"vLLM {running.version}", running.hardware)
            yield ServedCheckpoint(folder, running.server, engine, setup)


def acceptance(
    store: Store, recipe: Recipe, base: Manifest, artifact: Manifest, text: Text, benchmark: BenchmarkResult
) -> StageResult:
    """Compare the drafts of an artifact with its base's, in the engine that measured the artifact's speed.

    The stage's artifact is acceptance.json. Raises EngineFailed, CheckpointError.
    """
    counter = DraftCounter(store, recipe, text)

    def work(folder: Path) -> Made:
        def count(checkpoint: Manifest, engine: str, like: EngineSetup) -> DraftCount:
            return counter.count(checkpoint, engine, like, folder / checkpoint.digest)

        engine, base_files = benchmark.engine, compared_part(base)
        base_engine = recipe.benchmark.base_engine or engine
        ours = count(artifact, engine, EngineSetup(benchmark.version, benchmark.hardware))
        of_base = count(base_files, base_engine, EngineSetup() if base_engine.startswith("url:") else ours.setup)
        if engine == base_engine == "vllm" and of_base.setup != ours.setup:
            # The artifact was measured some time ago, or on another machine.
            ours = count(artifact, engine, of_base.setup)
            if ours.setup != of_base.setup:
                raise EngineFailed(
                    f"the base was served by {of_base.setup} and the result by {ours.setup}: use one machine"
                )
        document = DraftComparison(text=text.name, quantized=ours, base=of_base)
        files = [write_json(folder / "out", RESULT_FILE, document.to_json())]
        put_files(store, folder / "out", files)
        rates = {"acceptance": ours.rate, "base_acceptance": of_base.rate}
        return Made(Manifest.of(files), {**rates, "bytes_read": base.size + artifact.size})

    return run_stage(store, STAGE, acceptance_key(recipe, base, artifact, text, benchmark.engine), work)


def read_comparison(store: Store, compared: Manifest) -> DraftComparison:
    """Read the artifact of an acceptance stage. Raises StoreError if its acceptance.json cannot be read."""
    return read_stored(DraftComparison, store.read_blob(compared[RESULT_FILE]), RESULT_FILE)
