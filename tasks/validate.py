"""validate: is the quantized checkpoint whole, lossless where it should be, and close to its base?

Measuring is the stage and is kept. Comparing with the recipe's limits is `requant.tasks.validating.gates`, afterwards.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prefect import task

from requant.tasks.artifact import REWRITTEN, Manifest
from requant.tasks.checkpoint.audit import Account, account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.weight_error import fidelity
from requant.tasks.checkpoint.writer import write_file, write_json
from requant.tasks.download import text_files
from requant.tasks.errors import CheckpointError, RecipeError, RequantError, TooFewTokens
from requant.tasks.evaluate import Scores, asked, evaluate, evaluated, recovery, whole
from requant.tasks.pipeline.prefect import options, stage_summary
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.recipe.recipe import PACKED_HEADS, Eval, Recipe
from requant.tasks.store import Store, open_store
from requant.tasks.texts.rendering import render
from requant.tasks.texts.rows import read_rows
from requant.tasks.texts.text import EVALUATION, Text
from requant.tasks.validating.gates import most_repeated

if TYPE_CHECKING:  # torch takes seconds to import, and a reused stage needs none of it
    import torch

    from requant.tasks.validating.measured import Measurement

STAGE = Stage("validate", 4, tools=("transformers",))
MEASURE = Stage("measure", 1, tools=("transformers",))
CHARACTERS = 4_000_000  # of a data set that are looked at: the windows are spread over them
RESULT_FILE, MEASUREMENT_FILE = "validation.json", "measurement.safetensors"
log = logging.getLogger(__name__)


def compared_part(base: Manifest) -> Manifest:
    """The files of a base that a checkpoint made of it is compared with."""
    return Manifest.of(f for f in base.files if f.path not in REWRITTEN)


def validate_key(recipe: Recipe, base: Manifest, artifact: Manifest, text: Text) -> str:
    return STAGE.key(
        reads={"base": compared_part(base).digest, "artifact": artifact.digest, "text": text.digest},
        settings={"mtp": recipe.mtp, "allow_remote_code": recipe.allow_remote_code, **asked(recipe.eval)},
    )


def validate(
    store: Store,
    recipe: Recipe,
    base: Manifest,
    artifact: Manifest,
    text: Text,
) -> StageResult:
    """Measure an artifact against its base on a text; what was measured is in the artifact `validation.json`."""

    def work(folder: Path) -> Made:
        ours = store.link_files(artifact, folder / "artifact")
        theirs = store.link_files(compared_part(base), folder / "base")
        manifests = {ours: artifact, theirs: compared_part(base)}

        @functools.cache
        def words() -> Path:
            return one_file(store, text, folder / "words", theirs, recipe.allow_remote_code)

        def kept(path: Path, device: torch.device, dtype: torch.dtype) -> Measurement:
            remote_code = recipe.allow_remote_code
            return measurement(store, manifests[path], path, text, words, device, dtype, remote_code)

        def scored(path: Path) -> Scores:
            return evaluated(store, recipe, manifests[path], path, *whole(theirs))

        keep_head = recipe.mtp != "drop" and Checkpoint.open(theirs).head is not None
        values = measured_values(
            ours,
            theirs,
            kept,
            scored if recipe.eval else None,
            keep_head=keep_head,
            pack_head=recipe.mtp in PACKED_HEADS,
            remote_code=recipe.allow_remote_code,
        )
        if values.get("not_measured") and values["same_tokens"] is None and not values["unaccounted"]:
            raise CheckpointError(str(values["not_measured"]))  # of this machine, perhaps: not kept for ever
        files = [write_json(folder / "out", RESULT_FILE, {"text": text.name, **values})]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"measured": values, "bytes_read": base.size + artifact.size})

    return run_stage(store, STAGE, validate_key(recipe, base, artifact, text), work)


def measurement(
    store: Store,
    manifest: Manifest,
    folder: Path,
    text: Text,
    words: Callable[[], Path],
    device: torch.device,
    dtype: torch.dtype,
    remote_code: bool,
) -> Measurement:
    """The measurement of one checkpoint on a text, whose file `words` gives; kept: a base is measured once for all that
    is made of it."""
    from requant.tasks.validating.measure import VERSION, measure
    from requant.tasks.validating.measured import Measurement

    key = MEASURE.key(
        reads={"checkpoint": manifest.digest, "text": text.digest},
        settings={"code": VERSION, "device": device.type, "dtype": str(dtype)},
    )

    def work(scratch: Path) -> Made:
        found = measure(folder, words(), device, dtype, remote_code=remote_code)
        files = [write_file(scratch, MEASUREMENT_FILE, [found.to_bytes()])]
        put_files(store, scratch, files)
        return Made(Manifest.of(files), {"perplexity": found.perplexity, "acceptance": found.acceptance})

    return Measurement.from_bytes(store.read_blob(run_stage(store, MEASURE, key, work).manifest[MEASUREMENT_FILE]))


def one_file(
    store: Store,
    text: Text,
    folder: Path,
    model: Path,
    remote_code: bool = False,
) -> Path:
    """A text as one file to measure on: of a data set its first CHARACTERS, its chats rendered as `model` has them.

    Raises RecipeError where there is nothing to read.
    """
    if text.path is not None and text.path.suffix == ".txt":
        return text.path
    paths = text_files(store, text, folder / "text")
    documents, size = [], 0
    try:
        if text.chats:
            rendered = render(
                model,
                paths,
                folder / "rendered",
                name=text.name,
                remote_code=remote_code,
                most_characters=CHARACTERS,
            )
            log.info(f"validation text: {rendered.summary}")
            paths = [rendered.path]
        for row in read_rows(paths, text.name):
            documents.append(row.text)
            size += len(row.text)
            if size >= CHARACTERS:
                break
    except RecipeError as error:
        raise RecipeError(f"validation.text: {error}") from error
    write_file(folder, "text.txt", ["\n\n".join(documents)[:CHARACTERS].encode()])
    return folder / "text.txt"


def validate_folders(
    ours: Path,
    theirs: Path,
    text: Path = EVALUATION,
    *,
    remote_code: bool = False,
    pack_head: bool = False,
    tasks: Eval | None = None,
) -> dict[str, Any]:
    """The same for two folders, without a store: what `requant validate` measures."""
    checkpoint, base = Checkpoint.open(ours), Checkpoint.open(theirs).sound()

    def measured(path: Path, device: torch.device, dtype: torch.dtype) -> Measurement:
        from requant.tasks.validating.measure import measure

        try:
            return measure(path, text, device, dtype, remote_code=remote_code)
        except TooFewTokens:
            _check_text(base, text, remote_code)
            raise

    def scored(path: Path) -> Scores:
        assert tasks is not None
        return evaluate(path, tasks, *whole(theirs), remote_code=remote_code)

    keep_head = base.head is not None and (checkpoint.head is not None or _promises_head(checkpoint))
    return measured_values(
        ours,
        theirs,
        measured,
        scored if tasks else None,
        keep_head=keep_head,
        pack_head=pack_head,
        remote_code=remote_code,
    )


def _check_text(base: Checkpoint, text: Path, remote_code: bool) -> None:
    """Raises RecipeError if the base's tokenizer too makes too few tokens of a text: then the text is too short."""
    from requant.tasks.validating.measure import windows

    try:
        windows(base.folder, text, base, remote_code=remote_code)
    except TooFewTokens as error:
        raise RecipeError(f"validation.text: {error}: name a longer text") from error
    except CheckpointError as error:
        log.debug("the base's tokenizer does not tell whether the text is too short: %s", error)


def _promises_head(checkpoint: Checkpoint) -> bool:
    from requant.tasks.checkpoint.mtp import layer_count

    return layer_count(checkpoint.text_config) > 0


def measured_values(
    ours: Path,
    theirs: Path,
    measured: Callable[[Path, torch.device, torch.dtype], Measurement],
    scored: Callable[[Path], Scores] | None = None,
    *,
    keep_head: bool,
    pack_head: bool,
    remote_code: bool,
) -> dict[str, Any]:
    """Everything that gates, report and card need: first from the files, then from running both."""
    from requant.tasks.validating.compare import compare
    from requant.tasks.validating.measure import precision
    from requant.tasks.validating.model import completed_config

    checkpoint, base = Checkpoint.open(ours), Checkpoint.open(theirs).sound()
    log.info("comparing every tensor and file with the base's")
    found = account(checkpoint, base, with_head=keep_head, pack_head=pack_head, completed=completed_config)
    values = from_files(found, keep_head=keep_head, vision="vision_config" in base.config)
    if scored is not None:
        values |= {"tasks": None, "worst_task_recovery": None}
    values["matrices"] = [asdict(matrix) for matrix in fidelity(checkpoint, base)] or None
    device, dtype = precision(theirs)
    try:
        of_ours = measured(ours, device, dtype)
    except Exception as error:
        values["not_measured"] = _why_not(error, sound=not found.unaccounted)
        return values
    of_base = measured(theirs, device, dtype)
    values |= side_by_side(of_base, of_ours)
    if values["same_tokens"] != 1.0:
        values["not_measured"] = "its tokenizer makes other tokens than the base's"
    else:
        try:
            values |= compare(ours, theirs, of_ours, of_base, device, dtype, remote_code=remote_code)
        except Exception as error:
            values["not_measured"] = _why_not(error, sound=not found.unaccounted)
    if scored is not None:
        values |= recovery(scored(theirs), scored(ours))
    return values


def _why_not(error: Exception, *, sound: bool) -> str:
    """Why a checkpoint could not be run, as a sentence. Raises what has another cause than the checkpoint.

    One that is not sound in itself can fail in torch and transformers in any way: its tensors do not fit each other, or
    not the config.
    """
    import torch

    if isinstance(error, CheckpointError):
        return str(error)
    if sound or isinstance(error, RequantError | OSError | MemoryError | torch.OutOfMemoryError):
        raise error
    first = next(iter(str(error).splitlines()), "")
    return f"it cannot be run: {type(error).__name__}: {first[:200]}"


def from_files(found: Account, *, keep_head: bool, vision: bool) -> dict[str, Any]:
    """The values of the files alone. A checkpoint that cannot be run has no others."""
    names = (
        "matrices", "blocks", "same_tokens", "perplexity_increase", "kl_divergence", "top1_agreement",
        "most_repeated_token", "long_context", "vision_difference", "mtp_acceptance_ratio", "speculative_agreement",
    )  # fmt: skip
    return {**vars(found), "head_kept": keep_head, "vision": vision, **dict.fromkeys(names)}


def side_by_side(of_base: Measurement, of_ours: Measurement) -> dict[str, Any]:
    """The figures of two measurements."""
    from requant.tasks.validating.measured import perplexity_increase

    same = of_base.tokens.shape == of_ours.tokens.shape
    increase, increase_interval = perplexity_increase(of_ours, of_base) if same else (None, None)
    numbers = bool(np.isfinite(of_ours.nll).all())  # else it chooses nothing, and its drafts are as good as any
    drafts = of_ours.acceptance if numbers else None
    ratio = drafts / of_base.acceptance if drafts is not None and of_base.acceptance else None
    length, finite = of_ours.context.tolist()
    return {
        "same_tokens": float((of_base.tokens == of_ours.tokens).mean()) if same else 0.0,
        "tokens": int(of_base.tokens.size),
        "perplexity": of_ours.perplexity,
        "perplexity_interval": of_ours.perplexity_interval,
        "base_perplexity": of_base.perplexity,
        "base_perplexity_interval": of_base.perplexity_interval,
        "perplexity_increase": increase,
        "perplexity_increase_interval": increase_interval,
        "top1_agreement": float((of_base.top1 == of_ours.top1).mean()) if same else 0.0,
        "most_repeated_token": sum(map(most_repeated, of_ours.generated.tolist())) / len(of_ours.generated),
        "long_context": finite / length,
        "long_context_tokens": length,
        "mtp_acceptance": of_ours.acceptance,
        "base_mtp_acceptance": of_base.acceptance,
        "mtp_acceptance_ratio": ratio,
        "mtp_acceptance_by_position": of_ours.acceptance_by_position,
        "base_mtp_acceptance_by_position": of_base.acceptance_by_position,
        "greedy_acceptance_by_position": of_ours.greedy_acceptance_by_position,
        "base_greedy_acceptance_by_position": of_base.greedy_acceptance_by_position,
        "speculative_agreement": float(of_ours.speculative.mean()) if numbers and of_ours.speculative.size else None,
    }


def read_values(store: Store, result: StageResult) -> dict[str, Any]:
    """What a validate stage measured."""
    values: dict[str, Any] = json.loads(store.read_blob(result.manifest[RESULT_FILE]))
    return values


@task(**options("validate", hours=12))
def validate_task(recipe: Recipe, base: Manifest, artifact: Manifest, text: Text) -> Any:
    return stage_summary(validate(open_store(), recipe, base, artifact, text))
