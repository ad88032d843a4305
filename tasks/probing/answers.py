"""The set `answers`: does the model end its thought and its answer, or does it loop?

Each prompt is asked twice: greedily, where loops are most frequent, and sampled.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from requant.tasks.probing.loops import is_loop
from requant.tasks.probing.outcome import Outcome
from requant.tasks.probing.question import Question, Reply, Sampling
from requant.tasks.probing.thought import split_thought

PROMPTS = Path(__file__).parent / "questions" / "prompts.json"
SAMPLINGS: tuple[Sampling, ...] = ("greedy", "sampled")


@functools.cache
def load_questions(max_tokens: int, seed: int) -> tuple[Question, ...]:
    """Return the questions: each prompt with each way of sampling, and at most `max_tokens` of answer."""
    prompts = json.loads(PROMPTS.read_text(encoding="utf-8"))
    return tuple(
        Question(
            name=f"{prompt['name']}, {sampling}",
            group=prompt["name"],
            messages=({"role": "user", "content": prompt["text"]},),
            max_tokens=max_tokens,
            think=True,
            sampling=sampling,
            seed=seed,
        )
        for prompt in prompts
        for sampling in SAMPLINGS
    )


def judge_reply(question: Question, reply: Reply) -> Outcome:
    """Judge an answer.

    `answers_without_loop`: no part of it mostly repeats itself. `answers_finished`: the model ended it, and its thought
    before it, within the question's tokens, and it is not empty.
    """
    thought, loop = split_thought(reply), is_loop(reply.tokens)
    open_thought = thought.begun and not thought.ended
    finished = reply.ended and not open_thought and bool(thought.answer)
    if loop:
        reason = "loop"
    elif open_thought:
        reason = "unfinished thought"
    elif not reply.ended:
        reason = "unfinished answer"
    else:
        reason = "" if finished else "empty answer"
    measures = {"answers_finished": finished, "answers_without_loop": not loop}
    return Outcome(question=question.name, group=question.group, measures=measures, reason=reason)
