"""Commands that serve a model: those that the benchmark ran, or else those that it would have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from requant.tasks.card.facts import CardFacts
from requant.tasks.recipe.engine_flags import MODEL, arguments, command_line, with_drafts, without_drafts
from requant.tasks.redaction import public
from requant.tasks.serving.flags import with_dtype

ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}


@dataclass(frozen=True)
class VllmCommand:
    """A command that serves a model in vLLM, with its MTP head (`mtp`) or without.

    line: the command to type; ran: whether the benchmark ran it; no_drafts: why vLLM does not draft with the head.
    """

    mtp: bool
    line: str
    ran: bool
    no_drafts: str | None = None


@dataclass(frozen=True)
class Serving:
    """The engines that load a model, and the commands that serve it."""

    refused: Mapping[str, str]  # why an engine does not load it, by engine
    vllm: Sequence[VllmCommand]
    sglang: str  # the command
    sglang_drafts: bool

    def loads(self, engine: str) -> bool:
        """Check whether `vllm`, `sglang` or `transformers` loads the model. True if that is not known."""
        return engine not in self.refused


def serving_of(facts: CardFacts) -> Serving:
    """Choose the commands by the benchmark's result and the plan's verdicts on engines."""
    refused = {engine: why for engine in ENGINES if (why := _refusal(facts, engine, "loads"))}
    if facts.benchmark.commands:  # vLLM has just served it, so the plan's verdict was wrong
        refused.pop("vllm", None)
    drafts = facts.head and not facts.packed_head and not _refusal(facts, "sglang", "mtp")
    modes = (True, False) if facts.head else (False,)
    return Serving(refused, [_vllm(facts, mtp=mtp) for mtp in modes], _sglang(facts, drafts=drafts), drafts)


def _refusal(facts: CardFacts, engine: str, what: str) -> str | None:
    """Say why an engine does not load the model (`loads`) or draft (`mtp`). None if it does, or if nobody knows."""
    verdict = facts.engines.get(engine)
    return None if verdict is None or getattr(verdict, what) else verdict.reason


def _vllm(facts: CardFacts, *, mtp: bool) -> VllmCommand:
    """Write the command as the benchmark ran it, if it did. Paths of its machine are cut to file names."""
    ran = next((one.words for one in facts.benchmark.commands or () if one.mtp is mtp), None)
    if ran is not None:
        return VllmCommand(mtp, command_line(public(list(ran)), facts.model), ran=True)
    asked = facts.recipe.benchmark
    flags = with_drafts(asked.flags, asked.draft_tokens) if mtp else without_drafts(asked.flags)
    words = ["vllm", "serve", MODEL, *_trust(facts), *arguments(with_dtype(flags, facts.dtype))]
    no_drafts = _refusal(facts, "vllm", "mtp") if mtp else None
    return VllmCommand(mtp, command_line(public(words), facts.model), ran=False, no_drafts=no_drafts)


def _sglang(facts: CardFacts, *, drafts: bool) -> str:
    """Write the command. Source of the flags: https://docs.sglang.io/docs/advanced_features/speculative_decoding"""
    words = ["python", "-m", "sglang.launch_server", "--model-path", facts.model, *_trust(facts)]
    words += arguments(with_dtype({}, facts.dtype))
    if drafts:
        count = facts.recipe.benchmark.draft_tokens
        words += ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(count)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(count + 1)]
    return command_line(words, facts.model)


def _trust(facts: CardFacts) -> list[str]:
    return ["--trust-remote-code"] if facts.recipe.allow_remote_code else []
