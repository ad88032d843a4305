"""publish: the card from measured values, then a staged release. The Hub is always asked what it holds."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub import constants
from prefect import task

from tasks.artifact import Manifest, digest_of
from tasks.checkpoint.checkpoint import INDEX
from tasks.checkpoint.packing import PARTS
from tasks.checkpoint.writer import write_file
from tasks.gates import Gate
from tasks.hub.card import CardFacts, make_card
from tasks.hub.release import CARD, release
from tasks.hub.revision import Revision
from tasks.pictures import CARD_KINDS, FOLDER, Picture, write_pictures
from tasks.prefect_stage import options, say, shown
from tasks.recipe import Recipe
from tasks.serving.prompts import has_chat_template
from tasks.stage import StageResult, machine_errors
from tasks.store import Store, open_store
from tasks.store.lease import lease

log = logging.getLogger(__name__)


def card_for(
    store: Store,
    recipe: Recipe,
    base: Revision,
    base_files: Manifest,
    artifact: Manifest,
    gates: list[Gate],
    measured: dict[str, Any],
    speed: dict[str, Any],
    stages: list[StageResult],
    pictures: Sequence[Picture] = (),
) -> str:
    """The card of an artifact."""
    names = json.loads(store.read_blob(artifact[INDEX]))["weight_map"]
    base_card = ""
    if CARD in base_files and base_files[CARD].size < 1 << 20:
        base_card = store.read_blob(base_files[CARD]).decode("utf-8", "replace")
    return make_card(
        CardFacts(
            recipe=recipe,
            base_sha=base.sha,
            base_bytes=_weights(base_files),
            digest=artifact.digest,
            size=_weights(artifact),
            kept_names=tuple(n for n in names if n.rsplit(".", 1)[-1] not in PARTS),
            measured=measured,
            gates=gates,
            benchmark=speed,
            provenance={s.name: s.provenance for s in stages},
            base_card=base_card,
            pictures=pictures,
            chat=has_chat_template({f.path for f in artifact.files}, lambda name: store.read_blob(artifact[name])),
        )
    )


def publish(
    store: Store,
    recipe: Recipe,
    base: Revision,
    artifact: Manifest,
    card: str,
    pictures: Sequence[Picture] = (),
    say: Callable[[str], None] = log.info,
) -> StageResult:
    """Release an artifact with its card to the recipe's repo; one release of a repo at a time.

    Raises HubError, HubUnavailable.
    """
    assert recipe.publish is not None
    started = time.monotonic()
    repo_id = recipe.publish.repo_id
    key = digest_of({"endpoint": constants.ENDPOINT, "repo_id": repo_id})
    with machine_errors(), lease(store.backend, "publish", key, on_wait=say):
        folder = store.hand_out(artifact, store.work_folder("publish", artifact.digest))
        write_file(folder, CARD, [card.encode()])
        shown = write_pictures(folder / FOLDER, pictures, CARD_KINDS)
        released = release(
            repo_id,
            folder,
            artifact,
            beside=[CARD, *(f"{FOLDER}/{name}" for name in shown)],
            tag=f"{base.sha[:7]}-{artifact.digest[:7]}",
            message=f"Requant of {base.repo_id}@{base.sha[:7]} ({artifact.digest[:7]})",
            private=recipe.publish.private,
            say=say,
        )
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - started, 3)
    published = {**vars(released), "url": released.url}
    state = "ran" if released.changed else "reused"
    return StageResult("publish", key, state, seconds, artifact, {"published": published})


def _weights(manifest: Manifest) -> int:
    """Bytes of the weight files: what a card's sizes speak of."""
    return sum(f.size for f in manifest.files if f.path.endswith(".safetensors"))


@task(**options("publish", hours=12, retries=8))
def publish_task(
    recipe: Recipe, base: Revision, artifact: Manifest, card: str, pictures: Sequence[Picture] = ()
) -> Any:
    return shown(publish(open_store(), recipe, base, artifact, card, pictures, say()))
