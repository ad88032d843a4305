"""validate: is the quantized checkpoint whole, lossless where it should be, and close to its base?

Measuring is the stage and is kept. Comparing with the recipe's limits is `tasks.gates`, afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from tasks.artifact import Manifest, sha256_of
from tasks.checkpoint.account import Account, account
from tasks.checkpoint.checkpoint import Checkpoint
from tasks.checkpoint.writer import write_file, write_json
from tasks.gates import most_repeated
from tasks.mtp_fix import REWRITTEN
from tasks.prefect_stage import options, say, shown
from tasks.recipe import PACKED_HEADS, Recipe
from tasks.stage import Made, Stage, StageResult, put_files, run_stage
from tasks.store import Store, open_store
from tasks.text import EVALUATION

if TYPE_CHECKING:  # torch takes seconds to import, and a reused stage needs none of it
    import torch

    from tasks.measure import Measurement

STAGE = Stage("validate", 1, tools=("transformers",))
MEASURE = Stage("measure", 1, tools=("transformers",))
RESULT, ARRAYS = "validation.json", "measurement.safetensors"
log = logging.getLogger(__name__)


def compared_part(base: Manifest) -> Manifest:
    """The files of a base that a checkpoint made of it is compared with."""
    return Manifest.of(f for f in base.files if f.path not in REWRITTEN)


def validate_key(recipe: Recipe, base: Manifest, artifact: Manifest) -> str:
    return STAGE.key(
        reads={"base": compared_part(base).digest, "artifact": artifact.digest, "text": sha256_of(EVALUATION)},
        settings={"mtp": recipe.mtp, "allow_remote_code": recipe.allow_remote_code},
    )


def validate(
    store: Store, recipe: Recipe, base: Manifest, artifact: Manifest, say: Callable[[str], None] = log.info
) -> StageResult:
    """Measure an artifact against its base; what was measured is in the artifact `validation.json`."""

    def work(folder: Path) -> Made:
        ours = store.hand_out(artifact, folder / "artifact")
        theirs = store.hand_out(compared_part(base), folder / "base")
        from tasks.measure import Measurement, precision

        device, dtype = precision(theirs)
        of_base, of_ours = (
            Measurement.from_bytes(measurement(store, m, p, device, dtype, recipe.allow_remote_code, say))
            for m, p in ((compared_part(base), theirs), (artifact, ours))
        )
        source = Checkpoint.open(theirs).sound()
        keep_head = recipe.mtp != "drop" and source.head is not None
        found = account(Checkpoint.open(ours), source, with_head=keep_head, pack_head=recipe.mtp in PACKED_HEADS)
        values = measured_values(found, of_base, of_ours, keep_head=keep_head)
        files = [write_json(folder / "out", RESULT, values)]
        put_files(store, folder / "out", files)
        return Made(Manifest.of(files), {"measured": values})

    return run_stage(store, STAGE, validate_key(recipe, base, artifact), work, say)


def measurement(
    store: Store,
    manifest: Manifest,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    remote_code: bool,
    say: Callable[[str], None],
) -> bytes:
    """The measurement of one checkpoint, kept: a base is measured once for all that is made of it."""
    from tasks.measure import VERSION, measure

    key = MEASURE.key(
        reads={"checkpoint": manifest.digest, "text": sha256_of(EVALUATION)},
        settings={"code": VERSION, "device": device.type, "dtype": str(dtype)},
    )

    def work(scratch: Path) -> Made:
        found = measure(folder, EVALUATION, device, dtype, remote_code=remote_code, say=say)
        files = [write_file(scratch, ARRAYS, [found.to_bytes()])]
        put_files(store, scratch, files)
        return Made(Manifest.of(files), {"perplexity": found.perplexity, "acceptance": found.acceptance})

    return store.read_blob(run_stage(store, MEASURE, key, work, say).manifest[ARRAYS])


def validate_folders(ours: Path, theirs: Path, *, remote_code: bool = False, pack_head: bool = False) -> dict[str, Any]:
    """The same for two folders, without a store: what `requant validate` measures."""
    checkpoint, base = Checkpoint.open(ours), Checkpoint.open(theirs).sound()
    keep_head = base.head is not None and (checkpoint.head is not None or _promises_head(checkpoint))
    found = account(checkpoint, base, with_head=keep_head, pack_head=pack_head)
    tensors = checkpoint.tensors
    retyped = any(name in tensors and tensors[name].shape != t.shape for name, t in base.tensors.items())
    if checkpoint.fatal or found.unaccounted or retyped:
        return structure_only(found, keep_head=keep_head)
    from tasks.measure import measure, precision

    device, dtype = precision(theirs)
    of_base, of_ours = (measure(p, EVALUATION, device, dtype, remote_code=remote_code) for p in (theirs, ours))
    return measured_values(found, of_base, of_ours, keep_head=keep_head)


def _promises_head(checkpoint: Checkpoint) -> bool:
    from tasks.checkpoint.mtp import layer_count

    return layer_count(checkpoint.text_config) > 0


def structure_only(found: Account, *, keep_head: bool) -> dict[str, Any]:
    """The values of a checkpoint whose tensors do not even fit its base: it cannot be run."""
    names = ("same_tokens", "perplexity_increase", "top1_agreement", "most_repeated_token", "mtp_acceptance_ratio")
    return {**vars(found), "head_kept": keep_head, **dict.fromkeys(names)}


def measured_values(found: Account, of_base: Measurement, of_ours: Measurement, *, keep_head: bool) -> dict[str, Any]:
    """Everything that gates and the card need, from the account of the files and the two measurements."""
    same = of_base.tokens.shape == of_ours.tokens.shape
    ratio = None
    if of_base.acceptance and of_ours.acceptance is not None:
        ratio = of_ours.acceptance / of_base.acceptance
    return {
        **structure_only(found, keep_head=keep_head),
        "same_tokens": float((of_base.tokens == of_ours.tokens).mean()) if same else 0.0,
        "tokens": int(of_base.tokens.size),
        "perplexity": of_ours.perplexity,
        "base_perplexity": of_base.perplexity,
        "perplexity_increase": of_ours.perplexity / of_base.perplexity - 1,
        "top1_agreement": float((of_base.top1 == of_ours.top1).mean()) if same else 0.0,
        "most_repeated_token": most_repeated(of_ours.generated.tolist()),
        "mtp_acceptance": of_ours.acceptance,
        "base_mtp_acceptance": of_base.acceptance,
        "mtp_acceptance_ratio": ratio,
    }


def read_values(store: Store, result: StageResult) -> dict[str, Any]:
    """What a validate stage measured."""
    values: dict[str, Any] = json.loads(store.read_blob(result.manifest[RESULT]))
    return values


@task(**options("validate", hours=12))
def validate_task(recipe: Recipe, base: Manifest, artifact: Manifest) -> Any:
    return shown(validate(open_store(), recipe, base, artifact, say()))
