"""The stage self_calibration: let the base write the text that it is calibrated with.

Rows begin with shipped prompts and are sampled from the base's whole distribution, at temperature 1. Text that is
drawn so is the text over which the KL divergence of the result from the base is an average. It has the base's own
template, thinking, tools and languages, and no license of others. On one model, GPTQ with such text came within 0.0003
bits per byte of validation data, and random tokens within 0.002 (openai/parameter-golf#1019, at temperature 0.8; see
also Williams et al., "Self-calibration for Language Model Quantization and Pruning", NAACL 2025).

vLLM writes the text where there is one, otherwise transformers. Which one did is recorded, and not part of the key: the
first text for a key is used by all, and the key of quantize names its digest.
"""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from requant.tasks.artifact import Manifest, StageKey
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.companions import TEMPLATES, TOKENIZER
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.quantizing.packing import Length
from requant.tasks.quantizing.samples import Supply
from requant.tasks.recipe.quantize_section import SELF
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.store import Store
from requant.tasks.store.resume import delete_resume, download_resume, resume_uploads
from requant.tasks.texts.documents import Document
from requant.tasks.writing.amount import max_row_tokens, needed_tokens, outputs_of, own_samples
from requant.tasks.writing.engine import WritingBase, stop_ids
from requant.tasks.writing.in_vllm import SAMPLING
from requant.tasks.writing.prompts import digest_of_prompts, find_starts
from requant.tasks.writing.rows import Row, batch_files, more_offered
from requant.tasks.writing.write import Need, WrittenText, write_text

STAGE = Stage("self_calibration", 1)
TEXT_FILE = "text.jsonl"
# The files of a base that its text depends on: its weights, tokenizer and chat template, and what ends an answer.
INPUTS = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py",
    *TOKENIZER, *TEMPLATES,
)  # fmt: skip
TIMEOUT_HOURS = 24
log = logging.getLogger(__name__)


def self_calibration_key(recipe: Recipe, base: Manifest) -> StageKey:
    """Return the stage key for a recipe with all its outputs, which share one text."""
    inputs = Manifest.of(f for f in base.files if any(fnmatch.fnmatch(f.path, pattern) for pattern in INPUTS))
    return STAGE.key(
        reads={"base": inputs.digest, "prompts": digest_of_prompts()},
        settings={
            "tokens": needed_tokens(recipe),
            "row_tokens": max_row_tokens(recipe),
            # The base writes until these samples can be made of the text: see _fill_samples.
            "samples": [list(one) for one in sorted({(o.seqlen, own_samples(o)) for o in outputs_of(recipe)})],
            "seed": recipe.quantize.seed,
            "sampling": SAMPLING,
            "allow_remote_code": recipe.allow_remote_code,
        },
    )


def self_calibration(
    store: Store, recipe: Recipe, base: Manifest, progress: Callable[[float], None] = lambda share: None
) -> StageResult:
    """Let a downloaded base write calibration text. The stage's artifact is text.jsonl.

    It holds documents, each a prompt with its answer. Calibration takes their `ids`, which are what the base read and
    wrote: a tokenizer can make other tokens of the same text.

    Raises RecipeError, CheckpointError, EngineFailed, OutOfMemory, RenderingTimeout (retryable), and StoreError.
    """
    key = self_calibration_key(recipe, base)

    def work(folder: Path) -> Made:
        from requant.tasks.validating.model import load_tokenizer  # torch takes seconds to import

        model = store.link_files(base, folder / "base")
        tokenizer = load_tokenizer(model, remote_code=recipe.allow_remote_code)
        longest = Checkpoint.open(model).text_config.get("max_position_embeddings")
        row_tokens = max_row_tokens(recipe)
        if type(longest) is int and longest > 0:
            row_tokens = min(row_tokens, longest)
        starts, summary = find_starts(
            model, tokenizer, folder / "prompts", row_tokens=row_tokens, remote_code=recipe.allow_remote_code
        )
        log.info(f"rows begin with {len(starts)} prompts: {summary}")
        writing = WritingBase(
            folder=model,
            stops=stop_ids(model, tokenizer),
            row_tokens=row_tokens,
            flags=recipe.benchmark.flags,
            logs=folder / "logs",
            remote_code=recipe.allow_remote_code,
        )
        if download_resume(store, STAGE.name, key, folder, more_offered):
            log.info(f"going on from {len(batch_files(folder))} batches that another machine finished")
        with resume_uploads(store, STAGE.name, key, folder, batch_files):
            need = Need(needed_tokens(recipe), recipe.quantize.seed, lambda rows: _fill_samples(recipe, rows))
            text = write_text(writing, starts, need, folder, progress)
        files = [write_file(folder / "out", TEXT_FILE, _lines(text, tokenizer))]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {**_record(text), "prompts": summary, "bytes_read": base.size})

    result = run_stage(store, STAGE, key, work)
    if result.state == "ran":
        delete_resume(store, STAGE.name, key)
    return result


def _fill_samples(recipe: Recipe, rows: Sequence[Row]) -> bool:
    """Check whether the samples of every output can be made of these rows."""
    supply = Supply(SELF)
    for row in rows:
        supply.add(row.domain, Length((len(row.tokens),), chat=True))
    return all(sum(supply.room(one.seqlen, one.seed).values()) >= own_samples(one) for one in outputs_of(recipe))


def _lines(text: WrittenText, tokenizer: Any) -> Iterator[bytes]:
    """Yield the lines of text.jsonl."""
    for row in text.rows:
        readable = tokenizer.decode(row.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        document = Document(readable, (len(row.tokens),), row.domain, chat=True, ids=row.tokens)
        yield document.to_json().encode() + b"\n"


def _record(text: WrittenText) -> dict[str, object]:
    """Return what provenance says of a text: what wrote it, how much of it is used, and what each expert gets of it."""
    tokens = Counter[str]()
    for row in text.rows:
        tokens[row.domain] += len(row.tokens)
    unused = Counter(row.problem for row in text.written if row.problem)
    return {
        "engines": dict(Counter(row.engine for row in text.written)),
        "rows": len(text.rows),
        "tokens": dict(tokens),
        "written_tokens": sum(len(row.tokens) for row in text.written),
        "unused_rows": dict(unused),
        "experts": text.choice.to_json() if text.choice else None,
    }
