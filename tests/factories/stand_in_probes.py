"""A model of a stand-in engine that answers probes: its tokens are characters, and it does what it is asked.

ENGINE_DAMAGE names sets (tools, answers, retrieval) in which a quantized checkpoint fails, or `start`: a base is then
too large to be served. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ROWS = ROOT / "tasks" / "probing" / "questions" / "tools.jsonl"
MAX_MODEL_LEN = int(os.environ.get("ENGINE_LENGTH", 5_000))  # tokens
THOUGHT = "<think>\nThey ask something.\n</think>\n\n"


class ProbedModel:
    """The checkpoint in a folder."""

    def __init__(self, folder: Path) -> None:
        config = folder / "config.json"
        quantized = config.exists() and "quantization_config" in json.loads(config.read_text())
        damage = os.environ.get("ENGINE_DAMAGE", "").split(",")
        if "start" in damage and not quantized:
            sys.exit("RuntimeError: CUDA out of memory")
        self.damage = damage if quantized else []
        self.rows = [json.loads(line) for line in ROWS.read_text().splitlines()]

    def answer(self, path: str, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Answer /tokenize, and /v1/completions of token ids; None for other requests."""
        if path == "/tokenize":
            text = asked.get("prompt") or _rendered(asked)
            return {
                "count": len(text), "max_model_len": MAX_MODEL_LEN, "tokens": list(map(ord, text)),
                "token_strs": list(text) if asked.get("return_token_strs") else None,
            }  # fmt: skip
        if path == "/v1/completions" and _is_tokens(asked["prompt"]):
            text = self._reply("".join(map(chr, asked["prompt"])))
            cut = text[: asked["max_tokens"]]
            reason = "stop" if cut == text else "length"
            return {"choices": [{"text": cut, "token_ids": list(map(ord, cut)), "finish_reason": reason}]}
        return None

    def _reply(self, prompt: str) -> str:
        if tools := re.search(r"^TOOLS (.*)$", prompt, re.MULTILINE):
            return self._calls(json.loads(tools[1]), prompt)
        if key := re.search(r"What is the access code of the (.*?)\?", prompt):
            sentences = re.findall(r"The access code of the (.*?) is (\d+)\.", prompt)
            others = [value for name, value in sentences if name != key[1]]
            return others[0] if "retrieval" in self.damage else dict(sentences)[key[1]]
        return THOUGHT + ("and again " * 1000 if "answers" in self.damage else "This is the answer.")

    def _calls(self, tools: list[dict[str, Any]], prompt: str) -> str:
        """Write the expected calls of the row that has this question, in the form of Qwen."""
        row = next(row for row in self.rows if row["messages"][-1]["content"] in prompt)
        written = []
        for call in row["calls"]:
            ((name, parameters),) = call.items()
            arguments = {key: _example(values) for key, values in parameters.items() if "" not in values}
            if "tools" in self.damage:
                arguments["surplus"] = 1
            written.append(f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>")
        return "\n".join(written) or f"None of the {len(tools)} tools fits."


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _rendered(asked: dict[str, Any]) -> str:
    """Render messages as a chat template would."""
    tools = f"TOOLS {json.dumps(asked['tools'])}\n" if asked.get("tools") else ""
    return tools + "".join(f"{m['role']}: {m['content']}\n" for m in asked["messages"]) + "assistant:\n"


def _example(values: list[Any]) -> Any:
    value = next(one for one in values if one != "")
    if not isinstance(value, dict):
        return value
    return {key: _example(of) for key, of in value.items() if isinstance(of, list) and "" not in of}
