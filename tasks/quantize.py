"""The stage quantize: let auto-round quantize a base in a child process, and assemble the artifact.

This module is the stage as a whole, from its key to its artifact. Its parts, such as the child process, are the modules
of `tasks/quantizing/`. Its settings are the section `quantize` of a recipe, in `tasks/recipe/quantize_section.py`.

The child can be watched, stopped after a timeout, and killed. If it is killed, the next run goes on after its finished
blocks. If it runs out of memory, it is started again with settings that need less, from the block that failed.
"""

from __future__ import annotations

import fnmatch
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefect import task

from requant.tasks.artifact import Manifest
from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.base_check import check_base
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8, is_fp8, write_dequantized
from requant.tasks.download import text_files
from requant.tasks.pipeline.prefect import BlockProgress, options, stage_summary
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.quantizing import resume
from requant.tasks.quantizing.events import EventSink
from requant.tasks.quantizing.job import Job, Rung
from requant.tasks.quantizing.ladder import down_the_ladder
from requant.tasks.quantizing.tuned_blocks import tuned_blocks
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.store.resume import delete_resume, download_resume, resume_uploads
from requant.tasks.texts.rendering import TEMPLATES, TOKENIZER, ReadingLimit, render
from requant.tasks.texts.text import Text

STAGE = Stage("quantize", 6, tools=("auto-round", "transformers"))
# The files of a base that the quantized weights always depend on. With a calibration text that has chats, such as the
# default one, they also depend on the chat template (`quantize_key`). All other files of the base join in the next
# stage, so that a new README does not quantize again.
READ = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
log = logging.getLogger(__name__)


def quantize_key(recipe: Recipe, base: Manifest, calibration: Text) -> str:
    """Return the stage key. Raises RecipeError if the group size is still `auto`, which does not determine the key."""
    settings = recipe.quantize
    _ = settings.resolved  # It raises for a group size of auto.
    reads = {"base": read_part(base).digest, "calibration": calibration.digest}
    if calibration.chats:
        reads["chat_template"] = template_part(base).digest
    return STAGE.key(
        reads=reads,
        settings={
            **settings.model_dump(exclude={"calibration"}),
            "format": settings.key_format,
            "allow_remote_code": recipe.allow_remote_code,
        },
    )


def read_part(base: Manifest) -> Manifest:
    """Select the files of a base that quantize always reads."""
    return _select(base, READ)


def template_part(base: Manifest) -> Manifest:
    """Select the files of a base that hold its chat template."""
    return _select(base, TEMPLATES)


def tokenizer_part(base: Manifest) -> Manifest:
    """Select the files of a base that render chats and count tokens."""
    return _select(base, ("config.json", "*.py", *TOKENIZER, *TEMPLATES))


def _select(base: Manifest, patterns: Iterable[str]) -> Manifest:
    return Manifest.of(f for f in base.files if any(fnmatch.fnmatch(f.path, pattern) for pattern in patterns))


def quantize(
    store: Store,
    recipe: Recipe,
    base: Manifest,
    calibration: Text,
    report: EventSink = lambda event: None,
) -> StageResult:
    """Quantize a downloaded base. `report` gets the child's events as they come.

    Raises QuantizeFailed, QuantizeDied (retryable: the next call resumes), OutOfMemory, CheckpointError.
    """
    key = quantize_key(recipe, base, calibration)
    settings = recipe.quantize

    def work(folder: Path) -> Made:
        model = store.link_files(read_part(base), folder / "base")
        checkpoint = Checkpoint.open(model)
        check_base(checkpoint, recipe.base.repo_id, with_head=recipe.mtp != "drop")
        head = checkpoint.head
        if is_fp8(checkpoint.tensors.values()):
            log.info("the base is FP8: it is quantized from the BF16 weights that its scales give")
            model = write_dequantized(checkpoint, folder / "plain")
        checkpoint = dequantize_fp8(split_fused_experts(checkpoint))  # the layout in which auto-round writes it
        texts = text_files(store, calibration, folder / "calibration")
        chats = None
        if calibration.chats:
            tokenizer = store.link_files(tokenizer_part(base), folder / "tokenizer")
            max_tokens = None if calibration.mixed else 4 * settings.nsamples * settings.seqlen
            chats = render(
                tokenizer,
                texts,
                folder / "rendered",
                name="the calibration text",
                remote_code=recipe.allow_remote_code,
                limit=ReadingLimit(tokens=max_tokens),
            )
            log.info(f"calibration: {chats.summary}")
            texts = [chats.path]
        job = Job(
            settings=settings.model_copy(update={"format": settings.key_format}),
            rung=Rung.asked(settings),
            model=model,
            texts=texts,
            mixed=calibration.mixed,
            head=head.prefixes if head else [],
            allow_remote_code=recipe.allow_remote_code,
        )
        if download_resume(store, STAGE.name, key, folder, resume.worth_fetching):
            log.info(f"going on from {resume.count_finished(folder)} blocks that another machine finished")
        with resume_uploads(store, STAGE.name, key, folder, resume.portable_files):
            result, attempts = down_the_ladder(job, folder, report)
        files = assemble(checkpoint, Checkpoint.open(result.checkpoint), result.bits, folder / "assembled")
        put_files(store, folder / "assembled", files)
        # With the amount of work, a plan can estimate how long another run takes.
        work_settings = settings.model_dump(include={"iters", "nsamples", "seqlen", "batch_size", "fast"})
        record = {
            "calibration": calibration.name,
            "scheme": settings.resolved._asdict(),
            "settings": result.settings.details(),
            "work": {"parameters": _quantized_parameters(checkpoint, result.bits), **work_settings},
            "attempts": [attempt.model_dump(exclude_unset=True) for attempt in attempts],
            "blocks": [block.to_json() for block in tuned_blocks(folder / "events.jsonl")],
            "peak_gpu_bytes": result.peak_gpu_bytes,
            **({"chats": chats.to_json()} if chats else {}),
        }
        return Made(Manifest.of(files), record)

    result = run_stage(store, STAGE, key, work)
    if result.state == "ran":
        delete_resume(store, STAGE.name, key)
    return result


def _quantized_parameters(base: Checkpoint, bits: Mapping[str, int]) -> int:
    """Count the weights of the modules that were quantized: those with fewer than 16 bits."""
    names = (f"{module}.weight" for module, width in bits.items() if width < 16)
    return sum(math.prod(base.tensors[name].shape) for name in names if name in base.tensors)


@task(**options("quantize", hours=48))
def quantize_task(recipe: Recipe, base: Manifest, calibration: Text) -> Any:
    return stage_summary(quantize(open_store(), recipe, base, calibration, BlockProgress()))
