"""The stage publish: write the card from the measured values, and release the artifact on the Hub.

Its result is not reused: the Hub is always asked what it holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from huggingface_hub import constants

from requant.tasks.artifact import (
    CARD,
    GENERATION_CONFIG,
    MAX_CARD_BYTES,
    PICTURES,
    RECIPE,
    RELEASE,
    REPORT,
    File,
    Manifest,
    digest_of,
    git_blob_id_of,
)
from requant.tasks.card.card import make_card
from requant.tasks.card.facts import CardFacts, FileFacts
from requant.tasks.card.memory import CONTEXTS, cache_bytes
from requant.tasks.card.pinned import recipe_text
from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.checkpoint.config import ModelConfig
from requant.tasks.checkpoint.head import HEAD_SHARD
from requant.tasks.checkpoint.modules import INTEGER_PARTS
from requant.tasks.checkpoint.mtp import find_head
from requant.tasks.checkpoint.served_dtype import dtype_of_config
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.errors import redact
from requant.tasks.hub.manifest import MAX_REGULAR_FILE_BYTES, Origin, release_document
from requant.tasks.hub.release import Release, release
from requant.tasks.hub.revision import Revision
from requant.tasks.pipeline.stage import StageResult, machine_errors
from requant.tasks.planning.reasons import MTP_HEAD, why_kept
from requant.tasks.recipe.recipe import Recipe
from requant.tasks.record import StageRecord
from requant.tasks.serving.flags import drafts_by_mtp
from requant.tasks.serving.prompts import has_chat_template
from requant.tasks.store import Store

SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")


def file_facts(store: Store, recipe: Recipe, base_files: Manifest, artifact: Manifest) -> FileFacts:
    """Collect what a card says about the files of an artifact and of its base."""
    index = json.loads(store.read_blob(artifact[INDEX]))
    kept_names = tuple(name for name in index["weight_map"] if name.rsplit(".", 1)[-1] not in INTEGER_PARTS)
    in_head = (name for name, shard in index["weight_map"].items() if shard == HEAD_SHARD)
    reasons = why_kept(kept_names, recipe.quantize.layers)
    config = ModelConfig(_config(store, artifact))
    head = find_head(index["weight_map"], config)
    return FileFacts(
        digest=artifact.digest,
        weights_bytes=artifact.weights,
        base_weights_bytes=base_files.weights,
        kept_names=kept_names,
        kept_reasons=reasons | {name.removesuffix(".weight"): MTP_HEAD for name in in_head},
        packing=_quantization(store, artifact).get("packing_format"),
        dtype=dtype_of_config(config),
        fp8=bool(_quantization(store, base_files)),  # checkpoint/base_check.py refuses all other quantized bases.
        by_mtp=head is None or drafts_by_mtp(head, config),
        chat=has_chat_template({f.path for f in artifact.files}, lambda name: store.read_blob(artifact[name])),
        base_card=_base_card(store, base_files),
        cache_bytes={tokens: size for tokens in CONTEXTS if (size := cache_bytes(config, tokens)) is not None},
        sampling=_sampling(store, artifact),
    )


def _config(store: Store, artifact: Manifest) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(store.read_blob(artifact["config.json"]))
    return config


def _quantization(store: Store, artifact: Manifest) -> dict[str, Any]:
    quantization = _config(store, artifact).get("quantization_config")
    return quantization if isinstance(quantization, dict) else {}


def _sampling(store: Store, artifact: Manifest) -> dict[str, float]:
    """Return the numbers that the checkpoint's generation settings recommend for sampling."""
    if GENERATION_CONFIG not in artifact or artifact[GENERATION_CONFIG].size > MAX_CARD_BYTES:
        return {}
    try:
        document = json.loads(store.read_blob(artifact[GENERATION_CONFIG]))
        values = {key: document.get(key) for key in SAMPLING_KEYS}
        known = {
            key: value for key, value in values.items() if isinstance(value, int | float) and type(value) is not bool
        }
        return {key: value for key, value in known.items() if math.isfinite(value)}
    except (ValueError, AttributeError, OverflowError, RecursionError):  # A stranger wrote it.
        return {}


def _base_card(store: Store, base_files: Manifest) -> str:
    if CARD not in base_files or base_files[CARD].size > MAX_CARD_BYTES:
        return ""
    return store.read_blob(base_files[CARD]).decode("utf-8", "replace")


def release_files(store: Store, artifact: Manifest, facts: CardFacts, report: str) -> dict[str, bytes]:
    """Make the release files, by path: the card, the recipe, the report, the pictures, and `requant.json`.

    They are published next to the artifact's files. A picture is left out if the artifact has a file of its name.
    """
    pictures = {f"{PICTURES}/{picture.name}.png": picture for picture in facts.pictures}
    pictures = {path: picture for path, picture in pictures.items() if path not in artifact}
    files = {
        CARD: redact(make_card(replace(facts, pictures=list(pictures.values())))).encode(),
        RECIPE: recipe_text(facts).encode(),
        REPORT: redact(report).encode(),
        **{path: picture.png for path, picture in pictures.items()},
    }
    small = {f.path: git_blob_id_of(store.read_blob(f)) for f in artifact.files if f.size <= MAX_REGULAR_FILE_BYTES}
    files[RELEASE] = release_document(
        origin=Origin(facts.base, facts.recipe.digest, facts.version),
        artifact=artifact,
        release_files=[File(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()],
        blob_ids=small | {path: git_blob_id_of(data) for path, data in files.items()},
        gates=[gate.to_json() for gate in facts.gates],
        provenance=facts.provenance,
    )
    return files


@dataclass(frozen=True)
class PublishResult(StageResult):
    """The result of publishing, with the release that the repo holds now."""

    release: Release


def publish(
    store: Store,
    recipe: Recipe,
    base: Revision,
    artifact: Manifest,
    files: Mapping[str, bytes],
) -> PublishResult:
    """Release an artifact and its `release_files` in the recipe's repo, one release at a time per repo.

    Raises HubError, HubUnavailable.
    """
    assert recipe.publish is not None
    started = time.monotonic()
    key = digest_of({"endpoint": constants.ENDPOINT, "repo_id": recipe.publish.repo_id})
    with machine_errors(), store.lease("publish", key):
        folder = store.link_files(artifact, store.work_folder("publish", digest_of([key, artifact.digest])))
        for path, data in files.items():
            write_file(folder, path, [data])
        released = release(recipe.publish, base, folder, artifact, list(files), bits=recipe.quantize.asked.bits)
        shutil.rmtree(folder, ignore_errors=True)
    seconds = round(time.monotonic() - started, 3)
    state = "ran" if released.changed else "reused"
    return PublishResult("publish", key, state, seconds, artifact, StageRecord(), released)
