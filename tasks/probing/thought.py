"""The thought before an answer: whether it was begun and ended, by the marks that chat templates use."""

from __future__ import annotations

from dataclasses import dataclass

from requant.tasks.probing.question import Reply

# What begins and ends a thought: Qwen, DeepSeek, GLM, Kimi and others; Magistral; Seed-OSS; Gemma 4; gpt-oss.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
)


@dataclass(frozen=True)
class Thought:
    """What an answer has of a thought.

    begun, ended: whether it was; answer: the text behind it, which is empty if the thought was not ended.
    """

    begun: bool
    ended: bool
    answer: str


def split_thought(reply: Reply) -> Thought:
    """Split an answer into thought and rest. The prompt itself may have begun the thought, or have ended it."""
    for begin, end in MARKS:
        open_in_prompt = reply.prompt.end.rfind(begin) > reply.prompt.end.rfind(end)
        if open_in_prompt or begin in reply.text or end in reply.text:
            _, ended, rest = reply.text.rpartition(end)
            return Thought(True, bool(ended), rest.strip() if ended else "")
    return Thought(False, False, reply.text.strip())
