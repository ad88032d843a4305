"""Judges from headers and configs whether each engine will load a checkpoint and draft with its MTP head.

There is one module for each engine (`vllm`, `sglang`, `transformers`) and for each quantization method that has rules
(`auto_round`, `gptq`, `compressed`, `modelopt`, `quark`). Each names the source and version of its rules. What they do
not know is `NotJudged`. tests/engines compares the rules for vLLM with vLLM's own classes, and the verdicts with what
vLLM does.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.checkpoint.compat import sglang, transformers, vllm
from requant.tasks.checkpoint.compat.drafting import NO_HEAD, EngineLacks, head_finding
from requant.tasks.checkpoint.compat.rule import Finding, NotJudged, Patterns
from requant.tasks.checkpoint.config import JsonObject, QuantizationConfig
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.checkpoint.heads.drafters import drafter_kind, is_no_base
from requant.tasks.checkpoint.untrusted import MAX_SMALL_JSON_BYTES

VIDEO, IMAGE, PROCESSOR = "video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"
# Model types whose settings for videos differ from those for images.
OWN_VIDEO_SETTINGS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
_REPEATED_REPEAT = re.compile(r"\([^()]*[*+}][^()]*\)[*+{]")
FINE = "nothing is in the way"
DRAFTING = ("vllm", "sglang")  # the engines that draft with a head
VERSIONS = {"vllm": vllm.VERSION, "sglang": sglang.VERSION, "transformers": transformers.VERSION}


@dataclass(frozen=True)
class Judgement:
    """What keeps each engine from loading a checkpoint, and from drafting, or why that is not judged.

    `hostile`: regular expressions on which an engine would hang. They were too slow when tried, or repeat a repetition,
    on which the module `re` that SGLang uses may not terminate.
    """

    loading: dict[str, Finding]
    drafting: dict[str, Finding]
    hostile: list[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Judgement:
        """Judge a checkpoint."""
        kind = drafter_kind(checkpoint.config)
        if kind is not None:
            why = NotJudged(f"it is {is_no_base(kind)}")
            return cls(dict.fromkeys(VERSIONS, why), dict.fromkeys(VERSIONS, why), [])
        patterns = Patterns()
        fatal = checkpoint.fatal[0] if checkpoint.fatal else None
        head_modules = checkpoint.head_modules
        main_modules = {name: module for name, module in checkpoint.modules.items() if name not in head_modules}
        missing = missing_vision_files(checkpoint)
        lacks_file = f"{missing[0]} is missing: copy it from the base" if missing else None
        loading: dict[str, Finding] = {
            "vllm": lacks_file or fatal or vllm.load_problem(checkpoint, main_modules, patterns),
            "sglang": lacks_file or fatal or sglang.load_problem(checkpoint, main_modules, patterns),
            "transformers": fatal or transformers.load_problem(checkpoint),
        }
        judges = {"vllm": vllm.head_problem, "sglang": sglang.head_problem}
        drafting: dict[str, Finding] = {
            **{
                engine: head_finding(checkpoint, engine) or judge(checkpoint, head_modules, patterns)
                for engine, judge in judges.items()
            },
            "transformers": NO_HEAD if checkpoint.head is None else transformers.IGNORED,
        }
        suspicious = (p for p in _possible_patterns(checkpoint.quantization) if _REPEATED_REPEAT.search(p))
        hostile = [*patterns.hostile, *(p for p in suspicious if p not in patterns.hostile)]
        return cls(loading, drafting, hostile)

    @property
    def verdicts(self) -> dict[str, EngineVerdict]:
        """The verdict on each engine. `reason` names what to change."""
        return {engine: self._verdict(engine) for engine in self.loading}

    def _verdict(self, engine: str) -> EngineVerdict:
        loading, drafting = self.loading[engine], self.drafting[engine]
        loads, drafts = _answer(loading), _answer(drafting)
        mtp = False if False in (loads, drafts) else None if None in (loads, drafts) else True
        reasons = [loading] if loads is False else [loading, drafting]
        reason = "; ".join(dict.fromkeys(text for text in reasons if text)) or FINE
        return EngineVerdict(loads=loads, mtp=mtp, reason=reason, version=VERSIONS[engine])

    @property
    def load_problem(self) -> str | None:
        """Why neither vLLM nor SGLang loads the checkpoint; None if one does, or if that is not judged."""
        found = [self.loading[engine] for engine in DRAFTING]
        if not all(_answer(finding) is False for finding in found):
            return None
        reasons = "; ".join(dict.fromkeys(text for text in found if text))
        return f"neither vLLM {vllm.VERSION} nor SGLang {sglang.VERSION} loads it: {reasons}"

    @property
    def draft_problem(self) -> str | None:
        """Why vLLM or SGLang would not draft; None if both would, or if that is not judged."""
        return next(iter(self._draft_problems.values()), None)

    @property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """For each engine whether it loads the main model, and whether it drafts: no 0, not judged 1, yes 2.

        Drafting counts by itself, even where a missing file keeps the engine from loading the main model.
        """
        rank = {False: 0, None: 1, True: 2}
        return {
            engine: (rank[_answer(loading)], rank[_answer(self.drafting[engine])])
            for engine, loading in self.loading.items()
        }

    @property
    def drafts(self) -> bool:
        """Whether vLLM or SGLang drafts with the head as it is."""
        return any(self.drafting[engine] is None for engine in DRAFTING)

    @property
    def head_problem(self) -> str | None:
        """Why vLLM or SGLang would not draft, if the head is what is wrong and not the whole checkpoint."""
        of_heads = (found for engine, found in self._draft_problems.items() if found != self.loading[engine])
        return next(of_heads, None)

    @property
    def _draft_problems(self) -> dict[str, Finding]:
        return {
            engine: found
            for engine in DRAFTING
            if _answer(found := self.drafting[engine]) is False and not isinstance(found, EngineLacks)
        }


def _possible_patterns(quantization: QuantizationConfig) -> list[str]:
    """Return keys and list entries in the parts of a quantization config, at most 100,000."""
    parts = (part for part in quantization.values() if isinstance(part, dict | list))
    entries = (entry for part in parts for entry in part if isinstance(entry, str) and len(entry) <= 1000)
    return list(islice(entries, 100_000))


def missing_vision_files(checkpoint: Checkpoint) -> list[str]:
    """Return the missing processor files that vLLM needs for a vision model.

    These are settings for images and, if the config has a token for videos, for videos. Each has a file of its own, or
    both are in transformers 5's `processor_config.json`. vLLM 0.32 does not start without the settings for images.
    Without those for videos it uses those for images. That is reported only for OWN_VIDEO_SETTINGS: other families, as
    Qwen2.5-VL, have no file for videos. vLLM needs no settings if its limits of images and videos are set to 0.
    """
    if not isinstance(checkpoint.config.get("vision_config"), dict):
        return []
    needed = {IMAGE: "image_processor"}
    processor = _read_processor_config(checkpoint)
    shared = checkpoint.file(IMAGE).is_file() and checkpoint.config.get("model_type") not in OWN_VIDEO_SETTINGS
    if "video_token_id" in checkpoint.config and not shared:
        needed[VIDEO] = "video_processor"
    return [file for file, key in needed.items() if key not in processor and not checkpoint.file(file).is_file()]


def _read_processor_config(checkpoint: Checkpoint) -> JsonObject:
    """Read processor_config.json; an empty object if there is none, or if it cannot be read."""
    path = checkpoint.file(PROCESSOR)
    try:
        readable = path.is_file() and path.stat().st_size < MAX_SMALL_JSON_BYTES
        document = json.loads(path.read_bytes()) if readable else {}
    except (OSError, ValueError, RecursionError):
        return JsonObject()
    return JsonObject(document if isinstance(document, dict) else {})


def _answer(finding: Finding) -> bool | None:
    """Return whether an engine loads or drafts; None if that is not judged."""
    return None if isinstance(finding, NotJudged) else finding is None
