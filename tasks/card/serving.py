"""Commands that serve a model: those that the benchmark ran, or else those that it would have run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from requant.tasks.card.facts import CardFacts
from requant.tasks.checkpoint.document import EngineVerdict
from requant.tasks.recipe.engine_flags import MODEL, arguments, command_line, speculates, with_drafts, without_drafts
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
    judged: Sequence[str]  # what is expected of the other engines, in clauses with their versions
    vllm: Sequence[VllmCommand]
    sglang: str  # the command
    sglang_drafts: bool
    transformers_install: str  # the command

    @property
    def ran(self) -> bool:
        """Whether the benchmark ran a command of vLLM."""
        return any(command.ran for command in self.vllm)

    def loads(self, engine: str) -> bool:
        """Check whether `vllm`, `sglang` or `transformers` may load the model. True if that is not known or judged."""
        return engine not in self.refused


def serving_of(facts: CardFacts) -> Serving:
    """Choose the commands by the benchmark's result and the plan's verdicts on engines."""
    verdicts = {engine: facts.engines[engine] for engine in ENGINES if engine in facts.engines}
    if facts.benchmark.commands:  # vLLM has just served it, whatever the plan expected
        verdicts.pop("vllm", None)
    refused = {engine: _reason(engine, one) for engine, one in verdicts.items() if one.loads is False}
    judged = [_expected(engine, one, head=facts.head) for engine, one in verdicts.items() if engine not in refused]
    sglang = facts.engines.get("sglang")  # a head that was not judged is not asked for drafts
    drafts = facts.head and not facts.packed_head and (sglang is None or sglang.mtp is True)
    asked = any(map(speculates, facts.recipe.benchmark.flags))
    modes = (True, False) if facts.head and (facts.files.by_mtp or asked) else (False,)
    return Serving(
        refused,
        judged,
        [_vllm(facts, mtp=mtp) for mtp in modes],
        _sglang(facts, drafts=drafts),
        drafts,
        _install(facts, "transformers", "auto-round"),
    )


def _install(facts: CardFacts, *packages: str) -> str:
    """Return the command that installs packages, in the versions with which the files were made."""
    versions = facts.tools
    return " ".join(["pip install", *(f"{one}=={versions[one]}" if one in versions else one for one in packages)])


def _reason(engine: str, verdict: EngineVerdict) -> str:
    return f"{verdict.reason} ({ENGINES[engine]} {verdict.version})"


def _expected(engine: str, verdict: EngineVerdict, *, head: bool) -> str:
    """Say what headers and configs let expect of an engine that may load the model."""
    subject = f"{ENGINES[engine]} {verdict.version}"
    if verdict.loads is None:
        return f"whether {subject} loads it is not judged ({verdict.reason})"
    if not head or engine == "transformers":
        return f"{subject} loads it"
    if verdict.mtp is None:
        return f"{subject} loads it, and whether it drafts is not judged ({verdict.reason})"
    return f"{subject} loads it and {'drafts' if verdict.mtp else 'does not draft'}"


def _vllm(facts: CardFacts, *, mtp: bool) -> VllmCommand:
    """Write the command as the benchmark ran it, if it did. Paths of its machine are cut to file names."""
    ran = next((one.words for one in facts.benchmark.commands or () if one.mtp is mtp), None)
    if ran is not None:
        return VllmCommand(mtp, command_line(public(list(ran)), facts.model), ran=True)
    asked = facts.recipe.benchmark
    flags = with_drafts(asked.flags, asked.draft_tokens) if mtp else without_drafts(asked.flags)
    words = ["vllm", "serve", MODEL, *_trust(facts), *arguments(with_dtype(flags, facts.dtype))]
    verdict = facts.engines.get("vllm") if mtp else None
    no_drafts = _reason("vllm", verdict) if verdict is not None and verdict.mtp is False else None
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
