"""Will each engine load a checkpoint, and will MTP draft there? Decided from headers and configs alone.

One module per engine (`vllm`, `sglang`, `hf`) and per quantization method (`auto_round`, `gptq`, `compressed`), each
naming the source and version of its rules. The rules for vLLM are compared with vLLM's own classes, and the verdicts
with what vLLM does, by tests/engines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import sglang, transformers, vllm
from requant.tasks.checkpoint.compat.rule import Patterns
from requant.tasks.checkpoint.inventory import missing_parts
from requant.tasks.checkpoint.modules import modules_of
from requant.tasks.checkpoint.mtp import LAYER_COUNTS, layer_count

VIDEO, IMAGE, PROCESSOR = "video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"
_REPEATED_REPEAT = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")
FINE = "nothing is in the way"
FIX = "run requant mtp-fix"


@dataclass(frozen=True)
class Judgement:
    """What keeps each engine from loading, and from drafting; and the patterns on which an engine would hang: too slow
    when tried, or repeats of repeats, which `re`, as SGLang uses it, does not get out of."""

    loading: dict[str, str | None]
    drafting: dict[str, str | None]
    hostile: list[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Judgement:
        patterns = Patterns()
        first = checkpoint.fatal[0] if checkpoint.fatal else None
        head = checkpoint.head
        of_head = modules_of(checkpoint.tensors[name] for name in head.names) if head else {}
        rest = {name: module for name, module in checkpoint.modules.items() if name not in of_head}
        vision = missing_vision_files(checkpoint)
        file = f"{vision[0]} is missing: copy it from the base" if vision else None
        incomplete = _incomplete(checkpoint)
        loading = {
            "vllm": file or first or vllm.load_problem(checkpoint, rest, patterns),
            "sglang": file or first or sglang.load_problem(checkpoint, rest, patterns),
            "transformers": first or transformers.load_problem(checkpoint),
        }
        drafting = {
            "vllm": incomplete or _mendable(vllm.head_problem(checkpoint, of_head, patterns)),
            "sglang": incomplete or _mendable(sglang.head_problem(checkpoint, of_head, patterns)),
            "transformers": transformers.IGNORED,
        }
        looks = [
            p for p in _strings(checkpoint.quantization) if p not in patterns.hostile and _REPEATED_REPEAT.search(p)
        ]
        return cls(loading, drafting, [*patterns.hostile, *looks])

    @property
    def verdicts(self) -> dict[str, dict[str, Any]]:
        found = {}
        for engine, loading in self.loading.items():
            drafting = self.drafting[engine]
            found[engine] = {
                "loads": loading is None,
                "mtp": loading is None and drafting is None,
                "reason": loading or drafting or FINE,
            }
        return found

    @property
    def draft_problem(self) -> str | None:
        return self.drafting["vllm"] or self.drafting["sglang"]


def _strings(quantization: Mapping[str, Any]) -> list[str]:
    """What may be a pattern: the keys and list entries of a quantization config's parts; as many as one can look at."""
    parts = (part for part in quantization.values() if isinstance(part, dict | list))
    every = (entry for part in parts for entry in part if isinstance(entry, str) and len(entry) <= 1000)
    return list(islice(every, 100_000))


def verdicts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """`{engine: {loads, mtp, reason}}`. `mtp` is False without a head; `reason` names what to change."""
    return Judgement.of(checkpoint).verdicts


def draft_problem(checkpoint: Checkpoint) -> str | None:
    """Why vLLM or SGLang would not draft from this checkpoint's head, or None."""
    return Judgement.of(checkpoint).draft_problem


def missing_vision_files(checkpoint: Checkpoint) -> list[str]:
    """The processor files that vLLM needs for a vision model.

    Settings for images, and for videos where the config has a token for them; each in a file of its own, or both in
    transformers 5's `processor_config.json`. vLLM 0.32 does not start without the former. Without the latter it does
    not either, or, where `preprocessor_config.json` is there, takes the sizes of images for videos; both count here.
    With the limits of images and videos set to 0 it asks for neither.
    """
    if not isinstance(checkpoint.config.get("vision_config"), dict):
        return []
    needed = {IMAGE: "image_processor"}
    if "video_token_id" in checkpoint.config:
        needed[VIDEO] = "video_processor"
    nested = _nested(checkpoint)
    return [file for file, key in needed.items() if key not in nested and not checkpoint.file(file).is_file()]


def _nested(checkpoint: Checkpoint) -> dict[str, Any]:
    """processor_config.json, or {}: what is wrong with it is told elsewhere."""
    path = checkpoint.file(PROCESSOR)
    try:
        document = json.loads(path.read_bytes()) if path.is_file() and path.stat().st_size < 1 << 20 else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _incomplete(checkpoint: Checkpoint) -> str | None:
    """What the head lacks before any config is asked."""
    head = checkpoint.head
    promised = layer_count(checkpoint.text_config)
    if head is None:  # vLLM starts with an uninitialized head where one is promised, and accepts no draft
        return f"there is no MTP head, though config.json promises one: {FIX}" if promised else "there is no MTP head"
    missing = missing_parts(checkpoint, head)
    if missing:
        return f"{missing[0]} is missing from the head: {FIX}"
    if not promised and any(key in checkpoint.text_config for key in LAYER_COUNTS):
        return f"config.json promises 0 MTP layers ({' or '.join(LAYER_COUNTS)}), and there is a head: {FIX}"
    stray = _stray(checkpoint, promised)
    return f"{stray} is beyond the {promised} MTP layers that config.json promises: {FIX}" if stray else None


def _stray(checkpoint: Checkpoint, promised: int) -> str | None:
    """A tensor of a layer that the config does not count: vLLM has no parameter for it."""
    head = checkpoint.head
    if head is None or not promised:
        return None
    first = 0 if head.layout == "mtp" else checkpoint.text_config["num_hidden_layers"]
    for name in head.names:
        number = name.partition("layers.")[2].partition(".")[0]
        if number.isdigit() and len(number) < 9 and int(number) >= first + promised:
            return name
    return None


def _mendable(problem: str | None) -> str | None:
    return f"{problem}: {FIX}" if problem else None
