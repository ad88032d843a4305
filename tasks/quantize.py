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
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.tasks.artifact import Manifest, StageKey
from requant.tasks.checkpoint.assemble import assemble
from requant.tasks.checkpoint.base_check import check_base
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.companions import TEMPLATES, TOKENIZER
from requant.tasks.checkpoint.experts import split_fused_experts
from requant.tasks.checkpoint.fp8 import dequantize_fp8, is_fp8, write_dequantized
from requant.tasks.errors import RecipeError
from requant.tasks.excerpt import text_files
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.quantizing import resume
from requant.tasks.quantizing.events import EventSink
from requant.tasks.quantizing.job import Job, Rung
from requant.tasks.quantizing.memory_fallback import TIMEOUT_S, quantize_with_fallback
from requant.tasks.quantizing.samples import SampleSource, SourceUse, tokens_to_read
from requant.tasks.quantizing.tuned_blocks import expert_tokens, tuned_blocks
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.store.resume import delete_resume, download_resume, resume_uploads
from requant.tasks.texts.calibration import Calibration, CalibrationSource
from requant.tasks.texts.rendering import ReadingLimit, Rendered, render

STAGE = Stage("quantize", 6, tools=("auto-round", "transformers"))
# The files of a base that the quantized weights always depend on. With a calibration text that has chats, such as the
# default one, they also depend on the chat template (`quantize_key`). The next stage copies all other files, so an
# edited README does not trigger quantization.
QUANTIZE_INPUTS = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken", "*.py",
)  # fmt: skip
log = logging.getLogger(__name__)


def quantize_key(recipe: Recipe, base: Manifest, calibration: Calibration) -> StageKey:
    """Return the stage key.

    Raises RecipeError if the group size is still `auto`, or if the base is yet to write a calibration text, because
    these leave the key undefined.
    """
    settings = recipe.quantize
    settings.require_group_size()
    if calibration.waits_for_base:
        raise RecipeError("quantize.calibration self is not settled yet: the base has not written the text")
    reads = {"base": read_part(base).digest, "calibration": calibration.digest}
    if calibration.chats:
        reads |= {"chat_template": template_part(base).digest, "samples": "packed"}
    # The key holds the settings as the recipe spells them. `Quantize.makes`, by which recipes are compared, also treats
    # `scheme: W8A16` and `bits: 8` as equal. Here that would change the keys of all results that stores hold.
    return STAGE.key(
        reads=reads,
        settings={
            **settings.model_dump(exclude={"calibration", "gpus"}),
            "format": settings.key_format,
            "allow_remote_code": recipe.allow_remote_code,
        },
    )


def read_part(base: Manifest) -> Manifest:
    """Select the files of a base that quantize always reads."""
    return _select(base, QUANTIZE_INPUTS)


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
    calibration: Calibration,
    report: EventSink = lambda event: None,
) -> StageResult:
    """Quantize a downloaded base. `report` gets the child's events as they come.

    Raises RecipeError, CheckpointError, QuantizeFailed, QuantizeDied (retryable: the next call resumes), OutOfMemory,
    StageTimeout after TIMEOUT_S, and StoreError.
    """
    deadline_s = time.monotonic() + TIMEOUT_S
    key = quantize_key(recipe, base, calibration)
    settings = recipe.quantize

    def work(folder: Path) -> Made:
        model, head_prefixes, checkpoint = _link_model(store, recipe, base, folder)
        read = _read_calibration(store, recipe, base, calibration, folder)
        job = Job(
            settings=settings.model_copy(update={"format": settings.key_format}),
            rung=Rung.asked(settings),
            model=model,
            sources=[source.samples for source in read],
            head=head_prefixes,
            allow_remote_code=recipe.allow_remote_code,
        )
        if download_resume(store, STAGE.name, key, folder, resume.worth_fetching):
            log.info(f"going on from {resume.count_finished(folder)} blocks that another machine finished")
        log.info("loading the model into auto-round")
        with resume_uploads(store, STAGE.name, key, folder, resume.portable_files):
            result, attempts = quantize_with_fallback(job, folder, report, deadline_s)
        files = assemble(checkpoint, Checkpoint.open(result.checkpoint), result.bits, folder / "assembled")
        put_files(store, folder / "assembled", files)
        # Record the amount of work; planning/durations.py estimates later runs from it.
        work_settings = settings.model_dump(include={"iters", "nsamples", "seqlen", "batch_size", "fast"})
        record = {
            "calibration": calibration.name,
            "scheme": settings.resolved._asdict(),
            "settings": result.settings.details(),
            "work": {"parameters": _quantized_parameters(checkpoint, result.bits), **work_settings},
            "attempts": [attempt.model_dump(exclude_unset=True) for attempt in attempts],
            "blocks": [block.to_json() for block in tuned_blocks(folder / "events.jsonl")],
            **({"experts": experts} if (experts := expert_tokens(folder / "events.jsonl")) else {}),
            "peak_gpu_bytes": result.peak_gpu_bytes,
            **_sources(read, result.calibration),
        }
        return Made(Manifest.of(files), record)

    result = run_stage(store, STAGE, key, work)
    if result.state == "ran":
        delete_resume(store, STAGE.name, key)
    return result


def _link_model(store: Store, recipe: Recipe, base: Manifest, folder: Path) -> tuple[Path, list[str], Checkpoint]:
    """Link the base's files into `folder`, and check that auto-round can quantize them.

    Returns the folder for auto-round to read, the name prefixes of the MTP head's modules, and the checkpoint in the
    layout in which auto-round writes it.
    """
    model = store.link_files(read_part(base), folder / "base")
    checkpoint = Checkpoint.open(model)
    check_base(checkpoint, recipe.base.name, with_head=recipe.mtp != "drop")
    head_prefixes = checkpoint.head.prefixes if checkpoint.head else []
    if is_fp8(checkpoint.tensors.values()):
        log.info("the base is FP8: it is quantized from the BF16 weights that its scales give")
        model = write_dequantized(checkpoint, folder / "plain")
    # auto-round writes experts split and FP8 as BF16; compare in that layout.
    return model, head_prefixes, dequantize_fp8(split_fused_experts(checkpoint))


@dataclass(frozen=True)
class _ReadSource:
    """A calibration source whose files are on this machine. rendered: how its rows were rendered, if it has chats."""

    source: CalibrationSource
    samples: SampleSource
    rendered: Rendered | None

    def record(self, use: SourceUse) -> dict[str, Any]:
        """Return what the record of the stage says of this source."""
        text = self.source.text
        return {
            "source": text.name,
            "field": text.field,
            "weight": self.source.weight,
            "license": text.license,
            **use.model_dump(),
            "chats": self.rendered.to_json() if self.rendered else None,
        }


def _sources(read: Sequence[_ReadSource], uses: Sequence[SourceUse]) -> dict[str, Any]:
    """Return what the record of the stage says of its sources: nothing after a child of a version that did not say."""
    return {"sources": [one.record(use) for one, use in zip(read, uses, strict=True)]} if uses else {}


def _read_calibration(
    store: Store, recipe: Recipe, base: Manifest, calibration: Calibration, folder: Path
) -> list[_ReadSource]:
    """Bring the calibration texts into `folder`, and render those that have chats with the base's chat template."""
    settings, read = recipe.quantize, list[_ReadSource]()
    tokenizer = store.link_files(tokenizer_part(base), folder / "tokenizer") if calibration.chats else folder
    limits = tokens_to_read([source.weight for source in calibration.sources], settings.nsamples, settings.seqlen)
    for number, (source, limit) in enumerate(zip(calibration.sources, limits, strict=True)):
        text = source.text
        paths = text_files(store, text, folder / "calibration" / str(number), limit)
        max_tokens = None if text.mixed else limit
        rendered = None
        if text.chats:
            rendered = render(
                tokenizer,
                paths,
                folder / "rendered" / str(number),
                name=text.label,
                remote_code=recipe.allow_remote_code,
                limit=ReadingLimit(tokens=max_tokens, field=text.field, sample_tokens=settings.seqlen),
            )
            log.info(f"calibration: {f'{text.label}: ' if len(limits) > 1 else ''}{rendered.summary}")
        samples = SampleSource(
            name=text.label,
            paths=[rendered.path] if rendered else paths,
            rendered=rendered is not None or text.written is not None,
            mixed=text.mixed,
            weight=source.weight,
            field=text.field,
            max_tokens=max_tokens,
        )
        read.append(_ReadSource(source, samples, rendered))
    return read


def _quantized_parameters(base: Checkpoint, bits: Mapping[str, int]) -> int:
    """Count the weights of the modules that were quantized: those with fewer than 16 bits."""
    names = (f"{module}.weight" for module, width in bits.items() if width < 16)
    return sum(math.prod(base.tensors[name].shape) for name in names if name in base.tensors)
