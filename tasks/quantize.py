"""quantize: auto-round in a child process, its packed parts assembled with everything else from the base.

The child can be watched, timed out and killed. Killed, its finished blocks stay finished; out of memory, it is
started again with the next rung of a ladder of settings, from the block that failed.
"""

from __future__ import annotations

import fnmatch
import logging
import math
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
from requant.tasks.quantizing.ladder import down_the_ladder, tuned_blocks
from requant.tasks.recipe.quantize import Quantize
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.store.resume import delete_resume, download_resume, resume_uploads
from requant.tasks.texts.rendering import TEMPLATES, TOKENIZER, render
from requant.tasks.texts.text import Text

STAGE = Stage("quantize", 6, tools=("auto-round", "transformers"))
# What the quantized weights depend on in any case; with chats to calibrate with, the default, also on the chat template
# (`quantize_key`). Everything else of the base joins at the next stage, so that a new README costs no GPU hours.
READ = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
log = logging.getLogger(__name__)


def quantize_key(recipe: Recipe, base: Manifest, calibration: Text) -> str:
    """The stage key. Raises RecipeError for a group size of auto: keys are made of the number that it comes to."""
    _scheme(recipe)
    reads = {"base": read_part(base).digest, "calibration": calibration.digest}
    if calibration.chats:
        reads["chat_template"] = template_part(base).digest
    return STAGE.key(
        reads=reads,
        settings={**_settings(recipe.quantize), "allow_remote_code": recipe.allow_remote_code},
    )


def _settings(asked: Quantize) -> dict[str, Any]:
    """List the settings that shape the quantized weights; formats that make the same bytes have one name."""
    return {**asked.model_dump(exclude={"calibration"}), "format": asked.key_format}


def read_part(base: Manifest) -> Manifest:
    """The files of a base that quantize reads."""
    return Manifest.of(f for f in base.files if any(fnmatch.fnmatch(f.path, pattern) for pattern in READ))


def template_part(base: Manifest) -> Manifest:
    """Select the files of a base that hold its chat template, beside those that quantize reads in any case."""
    return Manifest.of(f for f in base.files if any(fnmatch.fnmatch(f.path, pattern) for pattern in TEMPLATES))


def quantize(
    store: Store,
    recipe: Recipe,
    base: Manifest,
    calibration: Text,
    report: EventSink = lambda event: None,
) -> StageResult:
    """Quantize a downloaded base. `report` gets the child's events as they come.

    Raises QuantizeFailed, QuantizeDied (retryable: resumes), OutOfMemory, CheckpointError.
    """

    def work(folder: Path) -> Made:
        model = store.link_files(read_part(base), folder / "base")
        checkpoint = Checkpoint.open(model)
        check_base(checkpoint, recipe.base.repo_id, with_head=recipe.mtp != "drop")
        head = checkpoint.head
        if is_fp8(checkpoint.tensors.values()):
            log.info("the base is FP8: it is quantized from the BF16 weights that its scales give")
            model = write_dequantized(checkpoint, folder / "plain")
        checkpoint = dequantize_fp8(split_fused_experts(checkpoint))  # as auto-round packs it
        texts = text_files(store, calibration, folder / "calibration")
        chats = None
        if calibration.chats:
            tokenizer = store.link_files(tokenizer_part(base), folder / "tokenizer")
            most = None if calibration.mixed else 4 * recipe.quantize.nsamples * recipe.quantize.seqlen
            chats = render(
                tokenizer,
                texts,
                folder / "rendered",
                name="the calibration text",
                remote_code=recipe.allow_remote_code,
                most_tokens=most,
            )
            log.info(f"calibration: {chats.summary}")
            texts = [chats.path]
        job = {
            **_settings(recipe.quantize),
            **_scheme(recipe),
            "model": str(model),
            "texts": [str(path) for path in texts],
            "mixed": calibration.mixed,
            "head": head.prefixes if head else [],
            "allow_remote_code": recipe.allow_remote_code,
        }
        if download_resume(store, STAGE.name, key, folder, resume.worth_fetching):
            log.info(f"going on from {resume.finished(folder)} blocks that another machine finished")
        with resume_uploads(store, STAGE.name, key, folder, resume.portable):
            result, attempts = down_the_ladder(job, folder, report)
        packed = Checkpoint.open(Path(result["checkpoint"]))
        files = assemble(checkpoint, packed, result["bits"], folder / "assembled")
        put_files(store, folder / "assembled", files)
        record = {
            "calibration": calibration.name,
            "scheme": _scheme(recipe),
            "settings": result["settings"],
            "work": _work(job, checkpoint, result["bits"]),
            "attempts": attempts,
            "blocks": tuned_blocks(folder / "events.jsonl"),
            "peak_gpu_bytes": result["peak_gpu_bytes"],
            **({"chats": chats.to_json()} if chats else {}),
        }
        return Made(Manifest.of(files), record)

    key = quantize_key(recipe, base, calibration)
    result = run_stage(store, STAGE, key, work)
    if result.state == "ran":
        delete_resume(store, STAGE.name, key)
    return result


def _scheme(recipe: Recipe) -> dict[str, Any]:
    return dict(zip(("bits", "group_size", "sym"), recipe.quantize.resolved, strict=True))


def _work(job: dict[str, Any], base: Checkpoint, bits: dict[str, int]) -> dict[str, Any]:
    """How much was done, so that a plan can say how long the next one takes."""
    shapes = (base.tensors[f"{m}.weight"].shape for m, b in bits.items() if b < 16 and f"{m}.weight" in base.tensors)
    asked = {key: job[key] for key in ("iters", "nsamples", "seqlen", "batch_size", "fast")}
    return {"parameters": sum(map(math.prod, shapes)), **asked}


def tokenizer_part(base: Manifest) -> Manifest:
    """Select the files of a base that render chats and count tokens."""
    patterns = ("config.json", "*.py", *TOKENIZER, *TEMPLATES)
    return Manifest.of(f for f in base.files if any(fnmatch.fnmatch(f.path, pattern) for pattern in patterns))


@task(**options("quantize", hours=48))
def quantize_task(recipe: Recipe, base: Manifest, calibration: Text) -> Any:
    return stage_summary(quantize(open_store(), recipe, base, calibration, BlockProgress()))
