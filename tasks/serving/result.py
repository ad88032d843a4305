"""The result of a benchmark: benchmark.json in the store, what `requant bench --json` prints, a part of a run's report.

The keys are a contract with users: `requant schema bench` prints them as a JSON Schema. A key that has no meaning for
an engine, which a description below calls absent, is left out of the document.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Self

from pydantic import Field, JsonValue, ValidationError

from requant.tasks.documents import StoredDocument, first_problem
from requant.tasks.errors import StoreError


class TokenGaps(StoredDocument):
    """Seconds between two tokens of an answer."""

    median: float | None = Field(None, description="Median, in seconds; null for answers of one token")
    p99: float | None = Field(None, description="99th percentile, in seconds; null where it was not measured")


class PromptResult(StoredDocument):
    """What was measured of one prompt, with one way of sampling and one number of requests at once."""

    set: str = Field(description="The prompt set: card, code, prose or chat; text in transformers")
    name: str = Field(description="The prompt's name in its set")
    mtp: bool = Field(description="Whether the engine drafted with the MTP head")
    sampling: str = Field(description="The way of sampling: greedy or sampled")
    concurrency: int = Field(description="How many requests were sent at once")
    tokens: int = Field(description="Output tokens of all these requests")
    tokens_per_second: float = Field(description="Output tokens of all these requests per second")
    prefill_tokens_per_second: float | None = Field(
        None, description="Tokens of the prompt per second; absent for an engine"
    )
    first_token_seconds: float = Field(description="Seconds to the first token, the median of the requests")
    inter_token_seconds: TokenGaps = Field(description="Seconds between two tokens")
    drafted_tokens: int | None = Field(None, description="Tokens that were drafted; absent for transformers")
    accepted_tokens: int | None = Field(None, description="Drafted tokens that were accepted; absent for transformers")
    acceptance: float | None = Field(
        None, description="Draft acceptance rate: accepted tokens divided by drafted tokens; null without drafts"
    )
    acceptance_by_position: tuple[float, ...] = Field(
        (), description="Share of drafts whose 1st, 2nd, ... token was accepted; empty without drafts"
    )


class SpeedSummary(StoredDocument):
    """What the prompts of one setting come to."""

    tokens: int = Field(description="Output tokens of all prompts")
    tokens_per_second: float = Field(description="Output tokens of all prompts per second of generating them")
    first_token_seconds: float = Field(description="Seconds to the first token, the median of the prompts")
    inter_token_seconds: float | None = Field(
        description="Seconds between two tokens, the median of the prompts' medians; null for answers of one token"
    )
    acceptance: float | None = Field(
        description="Draft acceptance rate: accepted tokens divided by drafted tokens; null without drafts"
    )


class MtpComparison(StoredDocument):
    """Speed with the MTP head and without, decoding greedily, one request at a time."""

    on: SpeedSummary | None = Field(description="With the MTP head; null where that was not measured")
    off: SpeedSummary | None = Field(description="Without the MTP head; null where that was not measured")
    speedup: float | None = Field(description="Tokens per second with the head divided by those without, or null")


class ServeCommand(StoredDocument):
    """A command that started the engine."""

    mtp: bool = Field(description="Whether the engine drafted with the MTP head")
    words: tuple[str, ...] = Field(
        description="The command's words, with MODEL in place of the checkpoint, without host and port"
    )


class BenchmarkResult(StoredDocument):
    """How fast a checkpoint is in an engine, and how many of its drafts are accepted."""

    engine: str = Field(description="vllm, torch (transformers), none, or url: and the address of a server")
    prompts: tuple[PromptResult, ...] = Field(
        (), description="A row for each prompt, way of sampling, number of requests at once, and MTP on or off"
    )
    tokens_per_second: float | None = Field(
        None,
        description="Output tokens per second, greedy, one request at a time, with MTP where it was measured; "
        "null for the engine none",
    )
    prefill_tokens_per_second: float | None = Field(
        None, description="Tokens of a prompt per second, the median of the rows; absent for an engine"
    )
    acceptance: float | None = Field(
        None, description="Draft acceptance rate in the rows that tokens_per_second is of; null without drafts"
    )
    mtp: MtpComparison | None = Field(None, description="MTP on and off side by side; absent for torch and none")
    model: str | None = Field(None, description="The served model's name; absent unless a running server was measured")
    version: str | None = Field(None, description="The engine and its version; absent for a running server and none")
    hardware: str | None = Field(None, description="The GPUs by name, or the CPU; absent for a running server and none")
    sampling: dict[str, dict[str, float]] | None = Field(
        None, description="The sampling parameters of each way of sampling; absent for torch and none"
    )
    concurrency: tuple[int, ...] | None = Field(
        None, description="The numbers of requests at once; absent for torch and none"
    )
    flags: dict[str, JsonValue] | None = Field(
        None, description="The recipe's flags of the engine; absent for torch and none"
    )
    draft_tokens: int | None = Field(
        None, description="Tokens that the MTP head drafts at a time; absent for torch and none"
    )
    commands: tuple[ServeCommand, ...] | None = Field(
        None, description="The commands that started the engine; absent for torch and none"
    )
    peak_gpu_bytes: int | None = Field(
        None,
        description="Peak GPU memory in bytes; null without a GPU or where it is not known; absent for a running "
        "server and none",
    )
    logs: tuple[str, ...] | None = Field(None, description="Paths of the engine's logs")

    @classmethod
    def from_json(cls, document: bytes | str) -> Self:
        """Read a benchmark.json. Raises StoreError if the document is not the result of a benchmark."""
        try:
            return cls.model_validate_json(document, strict=True)
        except ValidationError as error:
            place, problem = first_problem(error)
            raise StoreError(
                f"benchmark.json is not the result of a benchmark ({place or 'the document'}: {problem}): "
                "use the version of Requant that wrote it, or another store"
            ) from error

    def with_logs(self, paths: Iterable[str]) -> Self:
        """Return the result with the paths of the engine's logs."""
        return self.model_copy(update={"logs": tuple(paths)})

    def summary(self, *, mtp: bool, sampling: str, concurrency: int) -> SpeedSummary | None:
        """Summarize the prompts of one setting; None where nothing was measured with it."""
        return summarize(self.prompts, mtp=mtp, sampling=sampling, concurrency=concurrency)


def summarize(
    prompts: Sequence[PromptResult], *, mtp: bool, sampling: str = "greedy", concurrency: int = 1
) -> SpeedSummary | None:
    """Summarize the rows of one setting; None where there are none.

    Tokens per second are all tokens over all time, so that a long answer weighs more than a short one.
    """
    setting = (mtp, sampling, concurrency)
    chosen = [p for p in prompts if (p.mtp, p.sampling, p.concurrency) == setting]
    if not chosen:
        return None
    tokens = sum(p.tokens for p in chosen)
    seconds = sum(p.tokens / p.tokens_per_second for p in chosen)
    drafted = sum(p.drafted_tokens or 0 for p in chosen)
    accepted = sum(p.accepted_tokens or 0 for p in chosen)
    gaps = [p.inter_token_seconds.median for p in chosen if p.inter_token_seconds.median is not None]
    return SpeedSummary(
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 3),
        first_token_seconds=round(statistics.median(p.first_token_seconds for p in chosen), 5),
        inter_token_seconds=round(statistics.median(gaps), 6) if gaps else None,
        acceptance=round(accepted / drafted, 4) if drafted else None,
    )


def compare_mtp(prompts: Sequence[PromptResult]) -> MtpComparison:
    """Compare the speed with MTP and without, decoding greedily, one request at a time."""
    on, off = summarize(prompts, mtp=True), summarize(prompts, mtp=False)
    speedup = round(on.tokens_per_second / off.tokens_per_second, 3) if on and off else None
    return MtpComparison(on=on, off=off, speedup=speedup)
