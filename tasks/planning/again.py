"""Say why a stage runs although the store has an earlier result of it: what its stage key covers that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from requant.tasks.artifact import KeyParts, StageKey
from requant.tasks.planning.base_diff import flat
from requant.tasks.planning.document import BaseChanges
from requant.tasks.planning.durations import MAX_RECORDS
from requant.tasks.store import Store

# What a stage works on, the most specific first: results that share it are results of one thing.
SUBJECTS = ("artifact", "quantized", "base")
# Other inputs of stages, by the names that keys have for them.
INPUTS = {
    "adapter": "another adapter",
    "calibration": "another calibration text",
    "chat_template": "another chat template of the base",
    "samples": "samples that are packed otherwise",
    "text": "another text to measure on",
    "prompts": "other prompts",
}
# Said of a stage whose earlier results have records without what their keys cover.
UNEXPLAINED = "the store has results of an older Requant, which did not record what they were made from"
MAX_REASONS = 5
MAX_VALUE_CHARACTERS = 40


def why_again(store: Store, stage: str, key: StageKey, before: StageKey | None, changed: str) -> str | None:
    """Name the differences between a stage key that the store lacks and that of the most similar result it has.

    `before` is the key with the last download of another commit of the base, None if there was none, and `changed` says
    in words what changed in the base since. Return None if the store has no result of the same base or artifact.
    """
    newest_first = sorted(store.records(stage, MAX_RECORDS).values(), key=lambda one: one.started, reverse=True)
    found = [
        (list(_differences(parts, key.parts, changed)), record.started[:10])
        for record in newest_first
        if (parts := record.key_parts) is not None and _is_similar(parts, key.parts, before)
    ]
    if not found:
        return None
    reasons, date = min(found, key=lambda one: len(one[0]))
    more = [f"and {len(reasons) - MAX_REASONS} more"] if len(reasons) > MAX_REASONS else []
    return f"{', '.join([*reasons[:MAX_REASONS], *more])} (since the result of {date})"


def changes_in_words(sha: str, changes: BaseChanges, files: int) -> str:
    """Say how many of a base's files changed since the commit that was downloaded last."""
    count = sum(map(len, (changes.files.added, changes.files.removed, changes.files.changed)))
    return f"{count} of {files} files changed since {sha[:7]}"


def has_unexplained(store: Store, stage: str) -> bool:
    """Check whether the store has results of an older Requant, whose records do not say what their keys cover."""
    return any(record.started and record.key_parts is None for record in store.records(stage, MAX_RECORDS).values())


def _is_similar(old: KeyParts, now: KeyParts, before: StageKey | None) -> bool:
    subject = next((name for name in SUBJECTS if name in now.reads), None)
    if subject is None or subject not in old.reads:
        return False
    same = {now.reads[subject], *([before.parts.reads[subject]] if before is not None else [])}
    return old.reads[subject] in same


def _differences(old: KeyParts, now: KeyParts, changed: str) -> Iterator[str]:
    if old.version != now.version:
        yield f"the stage's version went from {old.version} to {now.version}"
    for name in sorted({*old.tools, *now.tools}):
        if (was := old.tools.get(name, "none")) != (now_is := now.tools.get(name, "none")):
            yield f"{name} {was} -> {now_is}"
    for name in sorted({*old.reads, *now.reads}):
        if old.reads.get(name) != now.reads.get(name):
            yield f"the base: {changed}" if name == "base" and changed else INPUTS.get(name, f"another {name}")
    yield from _changed_settings(dict(flat(old.settings)), dict(flat(now.settings)))


def _changed_settings(old: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*old, *now}):
        was, now_is = old.get(name, "not set").strip('"'), now.get(name, "not set").strip('"')
        if was == now_is:
            continue
        told = max(len(was), len(now_is)) <= MAX_VALUE_CHARACTERS
        yield f"{name} {was} -> {now_is}" if told else f"another {name}"
