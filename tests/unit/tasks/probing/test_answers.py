"""Answers that must end: thoughts, loops, and the shipped prompts."""

from __future__ import annotations

import json
import re

import pytest

from requant.tasks.probing.answers import PROMPTS, judge_reply, load_questions
from requant.tasks.probing.loops import MAX_REPEATED, is_loop, worst_share
from requant.tasks.probing.question import Prompt, Reply
from requant.tasks.probing.thought import split_thought
from requant.tasks.texts.text import BUILTIN_FOLDER

QUESTION = load_questions(1024, 0)[0]
SENTENCE = "The answer is that water boils earlier where the pressure of the air is lower than at sea."
# The first two are the ends of greedy answers of SmolLM2-135M-Instruct, which repeats them without an end.
LOOPS = [
    "The antiderivative of x to the power of x is e^x, and it's a fundamental result in calculus. It's also a "
    "fundamental result in algebra, and it's often used to solve integrals.\n\n",
    "1234567890",
    "0\n",
    "    if row.price > 10:\n        result.append(row.name.upper())\n",
]


def tokens(text: str) -> list[int]:
    """Words and marks as numbers: a simple tokenizer."""
    return [hash(piece) for piece in re.findall(r"\w{1,6}|\s+|[^\w\s]", text)]


def reply(text: str, *, ended: bool = True, prompt_end: str = "") -> Reply:
    return Reply(tuple(tokens(text)), text, ended, Prompt((), prompt_end, 4096))


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_is_seen_behind_any_beginning(loop: str) -> None:
    assert is_loop(tokens(SENTENCE + " " + loop * 60))


def test_a_loop_in_which_a_number_grows_is_seen_in_the_middle_too() -> None:
    grows = "".join(f"{n}. The sun is a star and it is very hot and very bright and very large.\n" for n in range(40))
    assert is_loop(tokens(grows))
    texts = (BUILTIN_FOLDER / "python-evaluation.txt").read_text()[:4000]
    assert is_loop(tokens(LOOPS[0] * 60 + texts))


def test_texts_of_people_are_no_loops() -> None:
    rows = [json.loads(line) for line in (BUILTIN_FOLDER / "mixed-evaluation.jsonl").read_text().splitlines()]
    texts = [row.get("text") or "\n".join(m["content"] for m in row["messages"]) for row in rows]
    texts.append((BUILTIN_FOLDER / "python-evaluation.txt").read_text()[:60_000])
    shares = [worst_share(tokens(text)) for text in texts]
    assert len(shares) > 40 and max(shares) < MAX_REPEATED


def test_a_short_answer_is_no_loop() -> None:
    assert not is_loop(tokens("No, no, no, no, no! " * 3))


@pytest.mark.parametrize(
    ("text", "ended", "prompt_end", "reason"),
    [
        (SENTENCE, True, "", ""),
        (f"<think>\nWell.\n</think>\n\n{SENTENCE}", True, "<|im_start|>assistant\n", ""),
        (f"Well.\n</think>\n\n{SENTENCE}", True, "<|im_start|>assistant\n<think>\n", ""),
        (SENTENCE, True, "<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        (f"[THINK]Well.[/THINK]{SENTENCE}", True, "", ""),
        (SENTENCE, False, "", "unfinished answer"),
        ("Well, let me think. ", False, "assistant\n<think>\n", "unfinished thought"),
        ("<think>Well, let me think. ", True, "", "unfinished thought"),
        ("<think>\nWell.\n</think>\n\n", True, "", "empty answer"),
        (" ", True, "", "empty answer"),
        (LOOPS[0] * 60, False, "", "loop"),
        ("<think>" + LOOPS[0] * 60, False, "", "loop"),
    ],
)
def test_each_way_not_to_end_has_its_reason(text: str, ended: bool, prompt_end: str, reason: str) -> None:
    outcome = judge_reply(QUESTION, reply(text, ended=ended, prompt_end=prompt_end))
    assert outcome.reason == reason
    assert outcome.measures == {"answers_finished": not reason, "answers_without_loop": reason != "loop"}


def test_a_thought_is_not_part_of_the_answer() -> None:
    thought = split_thought(reply("I think.</think>Yes.", prompt_end="<think>\n"))
    assert (thought.begun, thought.ended, thought.answer) == (True, True, "Yes.")


def test_every_prompt_is_asked_greedily_and_sampled_with_the_seed() -> None:
    prompts = json.loads(PROMPTS.read_text())
    questions = load_questions(512, 7)
    assert 40 <= len(prompts) <= 80 and len(questions) == 2 * len(prompts)
    assert len({question.name for question in questions}) == len(questions)
    assert len({question.group for question in questions}) == len(prompts)
    assert {q.sampling for q in questions} == {"greedy", "sampled"} and {q.seed for q in questions} == {7}
    scripts = {"latin": "Hello", "cyrillic": "Почему", "han": "请用", "hangul": "김치", "arabic": "اشرح", "hindi": "पेड़"}
    assert all(any(word in prompt["text"] for prompt in prompts) for word in scripts.values())
