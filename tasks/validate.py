"""validate: is the quantized checkpoint complete, lossless where it should be, and close to its base?

The stage measures, and the store keeps what it measured. `requant.tasks.validating.gates` compares the values with the
recipe's limits afterwards.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from requant.tasks.artifact import GENERATION_CONFIG, REWRITTEN, Manifest, StageKey
from requant.tasks.checkpoint.audit import account
from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.rounded_inputs import rounded_inputs
from requant.tasks.checkpoint.served_dtype import Dtype, dtype_of_flags, rounded_scales
from requant.tasks.checkpoint.writer import write_file, write_json
from requant.tasks.documents import first_problem, read_stored
from requant.tasks.errors import CheckpointError, RecipeError, RequantError, StoreError, TokenizerError, TooFewTokens
from requant.tasks.evaluate import do_not_remember, evaluate_pair, evaluation_key, remember_in
from requant.tasks.evaluation_text import text_for_measuring
from requant.tasks.pipeline.stage import Made, Stage, StageResult, put_files, run_stage
from requant.tasks.recipe.recipe import PACKED_HEADS, Recipe
from requant.tasks.store import Store, cache_folder
from requant.tasks.texts.text import EVALUATION, Text
from requant.tasks.validating.measured import (
    NOT_COMPARED,
    NOT_EVALUATED,
    NOT_RUN,
    Audit,
    Behaviour,
    Divergence,
    Evaluation,
    MatrixError,
    Measured,
    NoiseFloor,
)

if TYPE_CHECKING:  # torch takes seconds to import, and a reused stage does not need it
    from requant.tasks.validating.measurement import Measurement
    from requant.tasks.validating.model import RunSettings

STAGE = Stage("validate", 7, tools=("transformers",))
# This version stays as it is: the key also has VERSION of validating/measure.py, and that is the one to raise. To merge
# the two would change all keys.
MEASURE = Stage("measure", 1, tools=("transformers",))
NOISE = Stage("noise_floor", 1, tools=("transformers",))  # as with MEASURE
RESULT_FILE, MEASUREMENT_FILE = "validation.json", "measurement.safetensors"
NOISE_FILE = "noise_floor.json"
log = logging.getLogger(__name__)


def compared_part(base: Manifest) -> Manifest:
    """Return the files of a base that a checkpoint is compared with."""
    return Manifest.of(f for f in base.files if f.path not in REWRITTEN)


def measured_part(checkpoint: Manifest) -> Manifest:
    """Return the files of a checkpoint on which a measurement of it depends: all but how answers are sampled."""
    return Manifest.of(f for f in checkpoint.files if f.path != GENERATION_CONFIG)


def validate_key(recipe: Recipe, base: Manifest, artifact: Manifest, text: Text) -> StageKey:
    return STAGE.key(
        reads={"base": compared_part(base).digest, "artifact": artifact.digest, "text": text.digest},
        settings={
            "mtp": recipe.mtp,
            "allow_remote_code": recipe.allow_remote_code,
            "tokens": recipe.validation.tokens,
            **({"served": served} if (served := dtype_of_flags(recipe.benchmark.flags)) else {}),
            **evaluation_key(recipe),
        },
    )


def validate(
    store: Store,
    recipe: Recipe,
    base: Manifest,
    artifact: Manifest,
    text: Text,
) -> StageResult:
    """Measure an artifact against its base on a text. The stage's output is `validation.json`.

    Raises CheckpointError if the checkpoint has all its tensors but cannot be run.
    """

    def work(folder: Path) -> Made:
        from requant.tasks.validating.measure import run_settings

        quantized_folder = store.link_files(artifact, folder / "artifact")
        base_folder = store.link_files(compared_part(base), folder / "base")
        manifests = {quantized_folder: artifact, base_folder: compared_part(base)}
        tokens = recipe.validation.tokens
        base_checkpoint = Checkpoint.open(base_folder).sound()
        run_with = run_settings(base_folder, recipe.allow_remote_code, dtype_of_flags(recipe.benchmark.flags))

        @functools.cache
        def text_file() -> Path:
            return text_for_measuring(store, text, folder / "words", base_folder, recipe.allow_remote_code)

        @functools.cache
        def measure_one(path: Path, settings: RunSettings) -> Measurement:
            rounded = scales_rounded_to(Checkpoint.open(path), settings)
            tokenizer = measured_part(manifests[settings.tokens_of]).digest if settings.tokens_of else None
            checkpoint = measured_part(manifests[path]).digest
            asked = MeasurementKey(checkpoint, text.digest, tokens, settings, rounded, tokenizer)
            return measure_or_reuse(store, asked, path, text_file, folder / "measured" / path.name)

        def evaluate_both() -> Evaluation:
            assert recipe.eval is not None
            remember = remember_in(store, manifests, recipe.eval)
            return evaluate_pair(recipe, base_folder, quantized_folder, folder / "logs", remember)

        measured = measured_values(
            Checkpoint.open(quantized_folder),
            base_checkpoint,
            measure_one,
            evaluate_both if recipe.eval else None,
            keep_head=recipe.mtp != "drop" and base_checkpoint.head is not None,
            pack_head=recipe.mtp in PACKED_HEADS,
            settings=run_with,
        )
        if measured.not_measured and not measured.behaviour.was_run and not measured.audit.unaccounted:
            # The cause may be this machine, so the result must not be stored.
            raise CheckpointError(measured.not_measured)

        def noise_of(of_base: Measurement, settings: RunSettings) -> NoiseFloor:
            asked = MeasurementKey(measured_part(compared_part(base)).digest, text.digest, tokens, settings)
            return noise_or_reuse(store, asked, base_folder, of_base)

        measured = with_noise_floor(measured, base_folder, measure_one, noise_of, run_with)
        values = measured.to_json()
        names: dict[str, Any] = {"text": text.name}
        if text.domains:
            names["texts"] = {domain: part.name for domain, part in text.domains}
        files = [write_json(folder / "out", RESULT_FILE, {**names, **values})]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"measured": values, "bytes_read": base.size + artifact.size})

    return run_stage(store, STAGE, validate_key(recipe, base, artifact, text), work)


@dataclass(frozen=True)
class MeasurementKey:
    """What a measurement depends on: a checkpoint, a text, how many tokens of each domain, and how it is run.

    `scales`: the dtype to which its scales are rounded; None if they are not. `tokenizer`: the checkpoint whose
    tokenizer is used; None for its own.
    """

    checkpoint: str
    text: str
    tokens: int | None
    settings: RunSettings
    scales: Dtype | None = None
    tokenizer: str | None = None

    def of(self, stage: Stage) -> str:
        from requant.tasks.validating.measure import VERSION

        device, dtype = self.settings.device.type, str(self.settings.dtype)
        settings = {"code": VERSION, "device": device, "dtype": dtype, "tokens": self.tokens}
        if self.settings.remote_code:  # left out where it is not used, so that keys made before stay
            settings["allow_remote_code"] = True
        if self.scales:
            settings["scales"] = self.scales
        tokenizer = {"tokenizer": self.tokenizer} if self.tokenizer else {}
        return stage.key(reads={"checkpoint": self.checkpoint, "text": self.text, **tokenizer}, settings=settings)


def scales_rounded_to(checkpoint: Checkpoint, settings: RunSettings) -> Dtype | None:
    """Return the dtype to which a checkpoint's scales are rounded when it is run; None if they are not."""
    return rounded_scales(checkpoint.tensors.values(), settings.served_dtype(checkpoint.config))


def measure_or_reuse(
    store: Store, asked: MeasurementKey, folder: Path, text_file: Callable[[], Path], linked: Path
) -> Measurement:
    """Measure the checkpoint in `folder` on a text, or take the measurement from the store.

    A base is measured once for all checkpoints that are made from it. `text_file` returns the file of the text, and is
    called only if the checkpoint is measured. The measurement's file is linked into the folder `linked`.
    """
    from requant.tasks.validating.measure import measure
    from requant.tasks.validating.measurement import Measurement

    def work(scratch: Path) -> Made:
        result = measure(folder, text_file(), asked.settings, asked.tokens)
        files = [write_file(scratch, MEASUREMENT_FILE, [result.to_bytes()])]
        put_files(store, scratch, files)
        return Made(Manifest.of(files), {"perplexity": result.perplexity, "acceptance": result.acceptance})

    manifest = run_stage(store, MEASURE, asked.of(MEASURE), work).manifest
    return Measurement.load(store.link_files(manifest, linked) / MEASUREMENT_FILE)


def noise_or_reuse(store: Store, asked: MeasurementKey, base_folder: Path, of_base: Measurement) -> NoiseFloor:
    """Measure the noise floor of a base, or take it from the store: it is measured once."""
    from requant.tasks.validating.noise import noise_floor

    def work(scratch: Path) -> Made:
        floor = noise_floor(base_folder, of_base, asked.settings).to_json()
        files = [write_json(scratch, NOISE_FILE, floor)]
        put_files(store, scratch, files)
        return Made(Manifest.of(files), {"noise_floor": floor})

    manifest = run_stage(store, NOISE, asked.of(NOISE), work).manifest
    return read_stored(NoiseFloor, store.read_blob(manifest[NOISE_FILE]), NOISE_FILE)


def with_noise_floor(
    measured: Measured,
    base_folder: Path,
    measure_one: Callable[[Path, RunSettings], Measurement],
    noise_of: Callable[[Measurement, RunSettings], NoiseFloor],
    settings: RunSettings,
) -> Measured:
    """Add the noise floor of the base, if the checkpoint was compared with it and the floor can be measured."""
    if measured.divergence.kl_divergence is None:
        return measured
    try:
        return measured.with_noise_floor(noise_of(measure_one(base_folder, settings), settings))
    except CheckpointError as error:
        log.warning(f"the noise floor of the base is not measured: {error}")
        return measured


def validate_folders(
    quantized_folder: Path,
    base_folder: Path,
    text: Path = EVALUATION,
    *,
    remote_code: bool = False,
    pack_head: bool = False,
    tasks: Recipe | None = None,
    tokens: int | None = None,
) -> Measured:
    """Measure a checkpoint against its base without reusing or storing measurements.

    `text` is a file that `text_for_measuring` returned, and `tokens` how many are measured of each domain. `tasks` is
    the recipe whose lm-eval tasks are run, if it names any.
    """
    from requant.tasks.validating.measure import run_settings

    checkpoint, base = Checkpoint.open(quantized_folder), Checkpoint.open(base_folder).sound()
    run_with = run_settings(base_folder, remote_code)

    @functools.cache
    def measure_one(path: Path, settings: RunSettings) -> Measurement:
        from requant.tasks.validating.measure import measure

        try:
            return measure(path, text, settings, tokens)
        except TooFewTokens:
            _check_text(base, text, remote_code)
            raise

    def noise_of(of_base: Measurement, settings: RunSettings) -> NoiseFloor:
        from requant.tasks.validating.noise import noise_floor

        return noise_floor(base_folder, of_base, settings)

    def evaluate_both() -> Evaluation:
        assert tasks is not None
        logs = cache_folder() / "validate" / quantized_folder.resolve().name
        return evaluate_pair(tasks, base_folder, quantized_folder, logs, do_not_remember)

    keep_head = base.head is not None and (checkpoint.head is not None or _promises_head(checkpoint))
    measured = measured_values(
        checkpoint,
        base,
        measure_one,
        evaluate_both if tasks and tasks.eval else None,
        keep_head=keep_head,
        pack_head=pack_head,
        settings=run_with,
    )
    return with_noise_floor(measured, base_folder, measure_one, noise_of, run_with)


def _check_text(base: Checkpoint, text: Path, remote_code: bool) -> None:
    """Raise RecipeError if the base's tokenizer also yields too few tokens, which means the text is too short."""
    from requant.tasks.validating.windows import windows

    try:
        windows(base.folder, text, base, remote_code=remote_code)
    except TooFewTokens as error:
        raise RecipeError(f"validation.text: {error}: name a longer text") from error
    except CheckpointError as error:
        log.debug("the base's tokenizer does not tell whether the text is too short: %s", error)


def _promises_head(checkpoint: Checkpoint) -> bool:
    return checkpoint.config.mtp_layers > 0


def measured_values(
    checkpoint: Checkpoint,
    base: Checkpoint,
    measure_one: Callable[[Path, RunSettings], Measurement],
    evaluate_both: Callable[[], Evaluation] | None = None,
    *,
    keep_head: bool,
    pack_head: bool,
    settings: RunSettings,
) -> Measured:
    """Measure everything that gates, report and card need: first from the files, then by running both checkpoints.

    `measure_one` runs a checkpoint on the text; `evaluate_both` runs the lm-eval tasks of both, or is None. `settings`
    are chosen once for all that is compared, since how much memory of a GPU is free changes.
    """
    from requant.tasks.checkpoint.weight_error import fidelity
    from requant.tasks.validating.model import completed_config, room

    log.info("comparing every tensor and file with the base's")
    audit = account(checkpoint, base, with_head=keep_head, pack_head=pack_head, completed=completed_config)
    compared = fidelity(checkpoint, base, settings.device, room(settings.device))
    matrices = tuple(MatrixError(**vars(matrix)) for matrix in compared)
    not_compared = "none of its quantized matrices can be dequantized" if audit.packed and not matrices else None
    behaviour, divergence, not_measured = _run_both(
        checkpoint.folder, base.folder, measure_one, settings, sound=not audit.unaccounted
    )
    evaluation = NOT_EVALUATED if evaluate_both else None
    if evaluate_both and behaviour.same_tokens is not None:
        evaluation = evaluate_both()
    return Measured(
        audit=Audit(**vars(audit)),
        head_kept=keep_head,
        vision="vision_config" in base.config,
        matrices=matrices or None,
        divergence=divergence,
        behaviour=behaviour,
        evaluation=evaluation,
        not_measured=not_measured or not_compared,
        not_computed=rounded_inputs(checkpoint),
    )


def _run_both(
    quantized_folder: Path,
    base_folder: Path,
    measure_one: Callable[[Path, RunSettings], Measurement],
    settings: RunSettings,
    *,
    sound: bool,
) -> tuple[Behaviour, Divergence, str | None]:
    """Run both checkpoints on the text and compare them. The third value says why something could not be measured.

    `sound`: all tensors and settings of the quantized checkpoint are accounted for.
    """
    from requant.tasks.validating.compare import compare, side_by_side
    from requant.tasks.validating.loaded import last_model_stays

    behaviour, same_tokens, why_not = NOT_RUN, None, None
    try:
        with last_model_stays():  # The quantized one is measured last, and its weights are compared then.
            try:
                of_base, of_quantized = _pair(base_folder, quantized_folder, measure_one, settings)
                behaviour = side_by_side(of_base, of_quantized)
                same_tokens = behaviour.same_tokens
            except TokenizerError as error:
                why_not = str(error)
            if same_tokens != 1.0:
                log.warning(f"{why_not or 'its tokenizer makes other tokens'}: it is measured on the base's tokens")
                on_base = replace(settings, tokens_of=base_folder)
                of_base, of_quantized = _pair(base_folder, quantized_folder, measure_one, settings, on_base)
                behaviour = side_by_side(of_base, of_quantized).model_copy(update={"same_tokens": same_tokens})
            return behaviour, compare(quantized_folder, base_folder, of_quantized, of_base, settings), why_not
    except Exception as error:
        if not _is_caused_by_checkpoint(error, sound=sound):
            raise
        return behaviour, NOT_COMPARED, _why_not(error)


def _pair(
    base_folder: Path,
    quantized_folder: Path,
    measure_one: Callable[[Path, RunSettings], Measurement],
    settings: RunSettings,
    of_quantized: RunSettings | None = None,
) -> tuple[Measurement, Measurement]:
    """Measure the base, and then the quantized checkpoint, with settings of its own if there are any."""
    from requant.tasks.validating.measurement import aligned

    of_base = measure_one(base_folder, settings)
    return aligned(of_base, measure_one(quantized_folder, of_quantized or settings))


def _is_caused_by_checkpoint(error: Exception, *, sound: bool) -> bool:
    """Check whether the checkpoint is the cause of an error, and not this machine or Requant.

    A checkpoint that is not sound can make torch and transformers fail in any way, since its tensors do not fit each
    other or the config.
    """
    import torch

    if isinstance(error, CheckpointError):
        return True
    return not sound and not isinstance(error, RequantError | OSError | MemoryError | torch.OutOfMemoryError)


def _why_not(error: Exception) -> str:
    """Return why a checkpoint could not be run, as a sentence."""
    if isinstance(error, CheckpointError):
        return str(error)
    first_line = next(iter(str(error).splitlines()), "")
    return f"it cannot be run: {type(error).__name__}: {first_line[:200]}"


def read_values(store: Store, result: StageResult) -> Measured:
    """Read what a validate stage measured. Raises StoreError if the file in the store is not valid."""
    try:
        return Measured.from_json(json.loads(store.read_blob(result.manifest[RESULT_FILE])))
    except ValueError as error:
        where, why = RESULT_FILE, str(error)
        if isinstance(error, ValidationError):
            where, why = first_problem(error)
        raise StoreError(
            f"{RESULT_FILE} of the artifact {STAGE.name}/{result.key} cannot be read ({where or RESULT_FILE}: {why}): "
            "delete the artifact and run again"
        ) from error
