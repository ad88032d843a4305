"""publish: the card from measured values, then a staged release. The Hub is always asked what it holds."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import constants
from prefect import task

import requant
from requant.tasks.artifact import CARD, PICTURES, RECIPE, RELEASE, REPORT, File, Manifest, digest_of, git_blob_id_of
from requant.tasks.card.card import make_card
from requant.tasks.card.facts import CardFacts
from requant.tasks.card.origin import recipe_text
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.checkpoint.packing import PARTS
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import redact
from requant.tasks.hub.manifest import SMALL, release_document
from requant.tasks.hub.release import release
from requant.tasks.hub.revision import Revision
from requant.tasks.measuring.gates import Gate
from requant.tasks.pipeline.prefect import options, shown
from requant.tasks.pipeline.stage import StageResult, machine_errors
from requant.tasks.planning.reasons import why_kept
from requant.tasks.plots import Picture
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.serving.prompts import has_chat_template
from requant.tasks.store import Store, open_store
from requant.tasks.store.lease import lease

MAX_CARD = 1 << 20  # bytes of a base's card that are looked at
log = logging.getLogger(__name__)


def beside_for(
    store: Store,
    recipe: Recipe,
    base: Revision,
    base_files: Manifest,
    artifact: Manifest,
    gates: list[Gate],
    measured: dict[str, Any],
    speed: dict[str, Any],
    stages: list[StageResult],
    report: str,
    pictures: Sequence[Picture] = (),
    others: Mapping[str, Recipe] | None = None,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, bytes]:
    """What goes beside an artifact's files, by path: the card, the recipe, the report, pictures, and `requant.json`.

    others: what the same run makes of the base beside this; engines: which load it and draft, as its plan says.
    """
    drawn = {f"{PICTURES}/{p.name}.png": p for p in pictures if f"{PICTURES}/{p.name}.png" not in artifact}
    kept_names = tuple(name for name in _names(store, artifact) if name.rsplit(".", 1)[-1] not in PARTS)
    facts = CardFacts(
        recipe=recipe,
        base=base,
        base_bytes=base_files.weights,
        digest=artifact.digest,
        size=artifact.weights,
        kept_names=kept_names,
        packing=_quantization(store, artifact).get("packing_format"),
        measured=measured,
        gates=gates,
        benchmark=speed,
        provenance={s.name: s.provenance for s in stages},
        base_card=_base_card(store, base_files),
        pictures=list(drawn.values()),
        others=others or {},
        engines=engines or {},
        why=why_kept(kept_names, recipe.quantize.layers),
        fp8=bool(_quantization(store, base_files)),  # of packed bases none comes this far
        version=requant.__version__,
        chat=has_chat_template({f.path for f in artifact.files}, lambda name: store.read_blob(artifact[name])),
    )
    beside = {
        CARD: redact(make_card(facts)).encode(),
        RECIPE: recipe_text(facts).encode(),
        REPORT: redact(report).encode(),
        **{path: picture.png for path, picture in drawn.items()},
    }
    small = {f.path: git_blob_id_of(store.read_blob(f)) for f in artifact.files if f.size <= SMALL}
    beside[RELEASE] = release_document(
        version=facts.version,
        base=base,
        artifact=artifact,
        beside=[File(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in beside.items()],
        blob_ids=small | {path: git_blob_id_of(data) for path, data in beside.items()},
        recipe_digest=recipe.digest,
        gates=[gate.to_json() for gate in gates],
        provenance=facts.provenance,
    )
    return beside


def _names(store: Store, artifact: Manifest) -> list[str]:
    return list(json.loads(store.read_blob(artifact[INDEX]))["weight_map"])


def _quantization(store: Store, artifact: Manifest) -> dict[str, Any]:
    found = json.loads(store.read_blob(artifact["config.json"])).get("quantization_config")
    return found if isinstance(found, dict) else {}


def _base_card(store: Store, base_files: Manifest) -> str:
    if CARD not in base_files or base_files[CARD].size > MAX_CARD:
        return ""
    return store.read_blob(base_files[CARD]).decode("utf-8", "replace")


def publish(
    store: Store,
    recipe: Recipe,
    base: Revision,
    artifact: Manifest,
    beside: Mapping[str, bytes],
) -> StageResult:
    """Release an artifact, and what goes `beside` it, to the recipe's repo; one release of a repo at a time.

    Raises HubError, HubUnavailable.
    """
    assert recipe.publish is not None
    started = time.monotonic()
    key = digest_of({"endpoint": constants.ENDPOINT, "repo_id": recipe.publish.repo_id})
    with machine_errors(), lease(store.backend, "publish", key):
        folder = store.hand_out(artifact, store.work_folder("publish", artifact.digest))
        for path, data in beside.items():
            write_file(folder, path, [data])
        released = release(recipe.publish, base, folder, artifact, list(beside))
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - started, 3)
    state = "ran" if released.changed else "reused"
    return StageResult("publish", key, state, seconds, artifact, {"published": released.to_json()})


@task(**options("publish", hours=12, retries=8))
def publish_task(recipe: Recipe, base: Revision, artifact: Manifest, beside: Mapping[str, bytes]) -> Any:
    return shown(publish(open_store(), recipe, base, artifact, beside))
