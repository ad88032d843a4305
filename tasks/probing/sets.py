"""Ask a server all sets of questions that a recipe names, and judge the answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from requant.tasks.artifact import digest_of, sha256_of
from requant.tasks.probing import answers, retrieval, tools
from requant.tasks.probing.client import ask, render
from requant.tasks.probing.outcome import Outcome, ProbeSet
from requant.tasks.probing.question import Question, Reply
from requant.tasks.recipe.recipe import Probes
from requant.tasks.serving.client import Server

RETRIEVAL_CONCURRENCY = 4  # long prompts fill an engine; more at once would only wait there
NO_TEMPLATE = "the checkpoint has no chat template"
log = logging.getLogger(__name__)
Row = TypeVar("Row")


def ask_sets(server: Server, asked: Probes) -> dict[str, ProbeSet]:
    """Ask the sets that the recipe names, in its order. Raises EngineFailed."""
    sets: dict[str, ProbeSet] = {}
    for name in asked.sets:
        began_s = time.monotonic()
        one = sets[name] = SETS[name](server, asked)
        good = sum(not outcome.reason for outcome in one.outcomes)
        counts = f"{good} of {len(one.outcomes)} good in {time.monotonic() - began_s:.0f} s" if one.outcomes else ""
        log.info(f"{name}: {'; '.join(words for words in (counts, one.not_measured) if words)}")
    return sets


def digest_of_questions(asked: Probes) -> str:
    """Return the digest of all questions of the named sets, which a stage key names."""
    parts: dict[str, Callable[[], object]] = {
        "tools": lambda: [sha256_of(tools.ROWS), tools.MAX_TOKENS],
        "answers": lambda: sha256_of(answers.PROMPTS),
        "retrieval": retrieval.digest_of_texts,
    }
    return digest_of([(name, parts[name]()) for name in asked.sets])


def _ask_tools(server: Server, asked: Probes) -> ProbeSet:
    if not server.chat:
        return ProbeSet(outcomes=(), not_measured=NO_TEMPLATE)
    rows = _spread(tools.load_rows(), asked.limit)
    first = rows[0].question
    without = Question(first.name, first.group, first.messages, first.max_tokens)
    with_tools, bare = render(server, [first, without])
    if with_tools.tokens == bare.tokens:
        return ProbeSet(outcomes=(), not_measured="the chat template takes no tools")
    replies = ask(server, [row.question for row in rows], asked.concurrency)
    return _judged(rows, replies, tools.judge_reply)


def _ask_answers(server: Server, asked: Probes) -> ProbeSet:
    if not server.chat:
        return ProbeSet(outcomes=(), not_measured=NO_TEMPLATE)
    questions = _spread(answers.load_questions(asked.max_tokens, asked.seed), asked.limit)
    replies = ask(server, questions, asked.concurrency)
    return _judged(questions, replies, answers.judge_reply)


def _ask_retrieval(server: Server, asked: Probes) -> ProbeSet:
    """Ask for values in longer and longer texts, as far as the engine's limit and the recipe's time allow."""
    began_s = time.monotonic()
    (sample,) = render(server, [Question("sample", "sample", (), 1, text=retrieval.sample_text())])
    per_token = len(retrieval.sample_text()) / max(1, len(sample.tokens))
    longest = min(asked.max_context, sample.max_tokens)
    outcomes: list[Outcome] = []
    for length in retrieval.lengths(longest):
        spent_s = time.monotonic() - began_s
        if outcomes and 3 * spent_s > 60 * asked.retrieval_minutes:  # the next length takes twice the last at least
            reason = f"texts of {length:,} tokens and more would take over {asked.retrieval_minutes:g} minutes"
            return ProbeSet(outcomes=tuple(outcomes), not_measured=reason)
        outcomes += _ask_length(server, length, per_token, asked.limit)
    reason = ""
    if longest < asked.max_context:
        reason = f"the engine takes {sample.max_tokens:,} tokens"
    return ProbeSet(outcomes=tuple(outcomes), not_measured=reason)


def _ask_length(server: Server, length: int, per_token: float, limit: int | None) -> list[Outcome]:
    """Ask for the values in the texts of one length."""
    texts = [_fitting(server, length, number, per_token) for number in range(retrieval.TEXTS)]
    pairs = _spread([(text, needle) for text in texts for needle in text.asked], limit)
    questions = [text.question(needle, chat=server.chat) for text, needle in pairs]
    replies = ask(server, questions, RETRIEVAL_CONCURRENCY)
    return [retrieval.judge_reply(*pair, reply) for pair, reply in zip(pairs, replies, strict=True) if reply]


def _fitting(server: Server, length: int, number: int, per_token: float) -> retrieval.Haystack:
    """Make a text so long that with question and answer it has nearly `length` tokens, and not more."""
    room = length - retrieval.MAX_TOKENS
    characters = int(per_token * room * 0.97)
    while True:
        text = retrieval.make_haystack(length, number, characters)
        prompts = render(server, [text.question(needle, chat=server.chat) for needle in text.asked])
        most = max(len(prompt.tokens) for prompt in prompts)
        if most <= room:
            return text
        characters = int(characters * min(0.97, 0.99 * room / most))


def _judged(rows: Sequence[Row], replies: Sequence[Reply | None], judge: Callable[[Row, Reply], Outcome]) -> ProbeSet:
    """Judge the answers to some rows. Rows whose prompts leave no room for an answer are not judged."""
    outcomes = tuple(judge(row, reply) for row, reply in zip(rows, replies, strict=True) if reply)
    too_long = len(rows) - len(outcomes)
    return ProbeSet(
        outcomes=outcomes, not_measured=f"{too_long} prompts are too long for the engine" if too_long else ""
    )


def _spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """Return so many of the rows, evenly spread over all; None: all of them."""
    count = min(len(rows), limit or len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]


SETS: dict[str, Callable[[Server, Probes], ProbeSet]] = {
    "tools": _ask_tools,
    "answers": _ask_answers,
    "retrieval": _ask_retrieval,
}
