"""Render chats and count tokens in a process of its own: `python -m requant.tasks.texts.rendering_child JOB.json`.

Its last line on standard output is a JSON object: what came of it, or `recipe` or `checkpoint` with a sentence.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from requant.tasks.errors import RecipeError
from requant.tasks.texts.rows import content_of, plain_chat, read_rows

# Seconds of CPU time, and none of the clock: what a text becomes is kept for every machine, so that one that swaps or
# stands still must not decide it.
ROW_S = 10  # that the template may take for one chat: real ones take milliseconds
HARD_S = 20  # after which the kernel ends the process: Python cannot stop one long operation
ALL_S = 300  # for all chats of a text
MEMORY_BYTES = 4 << 30  # what the process may take beyond what it has when the tokenizer is loaded
GROWTH = 20  # times as long as its words may a rendered chat be
OVERHEAD = 100_000  # characters that any chat may have beside its words: a system prompt, tools


class Unending(Exception):
    """A chat that took the template longer than it may."""


def main(job_path: str) -> int:
    """Do the job; 0, whatever came of it: the answer says it."""
    job = json.loads(Path(job_path).read_text())
    answer: dict[str, Any]
    with contextlib.redirect_stdout(sys.stderr):  # a tokenizer of the base's own code may print
        try:
            answer = rendered(job)
        except RecipeError as error:
            answer = {"recipe": str(error)}
        except Unloadable as error:
            answer = {"checkpoint": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


class Unloadable(Exception):
    """A tokenizer that cannot be loaded."""


def rendered(job: Mapping[str, Any]) -> dict[str, Any]:
    """Write the documents; a template that does not end is left out for all of them, so that no limit of time decides
    about a single one."""
    tokenizer = _tokenizer(Path(job["model"]), job["remote_code"])
    bytes_now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = bytes_now + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        return _rendered(job, Template(tokenizer, job["reason"] if not job["template"] else _missing(tokenizer)))
    except Unending:
        reason = f"the base's chat template took over {ROW_S} s of CPU time for one chat, or {ALL_S} s for all"
        return _rendered(job, Template(tokenizer, reason))


def _rendered(job: Mapping[str, Any], template: Template) -> dict[str, Any]:
    tokens, characters = Counter[str](), 0
    part = Path(job["out"] + ".part")
    with part.open("w", encoding="utf-8") as out:
        for row in read_rows(job["paths"], job["name"], chats=job["chats"]):
            text = row.text or template.chat(row.messages)
            out.write(json.dumps({"text": text, "domain": row.domain}) + "\n")
            tokens[row.domain] += len(template.tokenizer(text, add_special_tokens=False)["input_ids"])
            characters += len(text)
            if job["most_tokens"] is not None and tokens.total() >= job["most_tokens"]:
                break
            if job["most_characters"] is not None and characters >= job["most_characters"]:
                break
    os.replace(part, job["out"])
    return {
        "out": job["out"], "tokens": dict(tokens), "templated": template.templated, "plain": template.plain,
        "reason": template.reason,
    }  # fmt: skip


class Template:
    """The chat template of a tokenizer. `missing`: why it is not used at all."""

    def __init__(self, tokenizer: Any, missing: str = "") -> None:
        self.tokenizer = tokenizer
        self.templated = self.plain = 0
        self._seconds = 0.0
        self.reason = self._missing = missing

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render a chat; plainly if the template refuses it. Raises Unending."""
        text = None if self._missing else self._rendered(messages)
        if text is None:
            self.plain += 1
            return plain_chat(messages)
        self.templated += 1
        return text

    def _rendered(self, messages: Sequence[Mapping[str, Any]]) -> str | None:
        """Render a chat by the template; None if it refuses the chat."""
        if self._seconds > ALL_S:
            raise Unending
        began = time.process_time()
        try:
            with _bounded():
                text = self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False)
            if not isinstance(text, str) or not text.strip():
                raise ValueError("it makes nothing of a chat")
            if len(text) > GROWTH * sum(len(content_of(m)) for m in messages) + OVERHEAD:
                raise ValueError(f"it makes {len(text):,} characters of a chat")
            text.encode()  # half a surrogate pair is no text, and cannot be written
            return text
        except Unending:
            raise
        except Exception as error:  # whatever a stranger's template raises
            first = next(iter(str(error).splitlines()), "")[:150]
            said = first if first.isprintable() else repr(first)
            self.reason = self.reason or f"the base's chat template refuses it: {type(error).__name__}: {said}"
            return None
        finally:
            self._seconds += time.process_time() - began


def _missing(tokenizer: Any) -> str:
    return "" if getattr(tokenizer, "chat_template", None) else "the base has no chat template"


def _tokenizer(folder: Path, remote_code: bool) -> Any:
    if not remote_code and "torch" not in sys.modules:  # the base's own code may need it
        # A tokenizer works without torch, and transformers takes 1.4 s less to import where there seems to be none.
        sys.modules["torch"] = None  # type: ignore[assignment]
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # whatever the files of a stranger make it raise
        first = next(iter(str(error).splitlines()), "")[:300]
        raise Unloadable(f"the tokenizer of the base cannot be loaded ({type(error).__name__}: {first})") from error


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise Unending after ROW_S of CPU time; end the process after HARD_S of it in one operation."""

    def end(*_: object) -> None:
        raise Unending

    signal.signal(signal.SIGVTALRM, end)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, ROW_S)
    signal.setitimer(signal.ITIMER_PROF, HARD_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
