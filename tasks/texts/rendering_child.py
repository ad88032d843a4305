"""Render chats and count tokens in a process of its own: `python -m requant.tasks.texts.rendering_child JOB.json`.

JOB.json is a RenderingJob. The last line on standard output is a RenderingAnswer.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from requant.tasks.errors import RecipeError
from requant.tasks.texts.documents import Document
from requant.tasks.texts.forms import Message, Row, plain_chat
from requant.tasks.texts.rows import read_rows

# The rendered text is reused on every machine. So limits are CPU time and not wall-clock time: a machine that swaps or
# stands still must not change the text.
CHAT_LIMIT_S = 10  # for one chat: real templates take milliseconds
KILL_LIMIT_S = 20  # for one chat, after which the kernel ends the process: Python cannot interrupt one long operation
TEXT_LIMIT_S = 300  # for all chats of a text
MAX_MEMORY_BYTES = 4 << 30  # beyond what the process uses once the tokenizer is loaded
MAX_GROWTH = 20  # how many times as long as its messages a rendered chat may be
MAX_OVERHEAD = 100_000  # characters that a chat may have besides: a system prompt
MAX_TURNS = 32  # at how many turns of one long chat a sample can begin


@dataclass(frozen=True)
class RenderingJob:
    """What to render. `no_template` is empty, or says why the chat template is not used.

    field: the only column to read, if there is one; sample_tokens: the length of the samples that will be made of the
    text, or None: turns are found in chats that are longer, and tokens that no sample can have are not counted as read;
    prompts: whether chats end where the model is to answer, and those that the template refuses are left out.
    """

    model: str
    paths: Sequence[str]
    out: str
    name: str
    chats: bool
    remote_code: bool
    max_tokens: int | None = None
    max_characters: int | None = None
    no_template: str = ""
    field: str | None = None
    sample_tokens: int | None = None
    prompts: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class RenderingAnswer:
    """What a RenderingJob came to: fields as in Rendered, or a sentence that says why it cannot be done."""

    tokens: dict[str, int] = field(default_factory=dict)
    templated: int = 0
    plain: int = 0
    reason: str = ""
    recipe_error: str = ""
    checkpoint_error: str = ""
    rows: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: bytes) -> Self:
        """Read an answer. Raises ValueError or TypeError for anything else."""
        return cls(**json.loads(line))


class TemplateTimeout(Exception):
    """The chat template took more CPU time than it may."""


class TokenizerError(Exception):
    """A tokenizer that cannot be loaded."""


def main(job_path: str) -> int:
    """Do a job and write the answer. The exit status is 0 whatever the answer is."""
    job = RenderingJob.from_json(Path(job_path).read_text())
    with contextlib.redirect_stdout(sys.stderr):  # a tokenizer of the base's own code may print
        try:
            answer = render_text(job)
        except RecipeError as error:
            answer = RenderingAnswer(recipe_error=str(error))
        except TokenizerError as error:
            answer = RenderingAnswer(checkpoint_error=str(error))
    sys.stdout.write(answer.to_json() + "\n")
    return 0


def render_text(job: RenderingJob) -> RenderingAnswer:
    """Render a text, and bound the memory of this process.

    If the template does not end for one chat, it is used for none: a time limit must not decide about single chats.
    """
    tokenizer = _tokenizer(Path(job.model), job.remote_code)
    bytes_now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = bytes_now + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    try:
        missing = job.no_template or _explain_missing(tokenizer)
        return _write_rows(job, Template(tokenizer, missing, prompts=job.prompts))
    except TemplateTimeout:
        limits = f"{CHAT_LIMIT_S} s of CPU time for one chat, or {TEXT_LIMIT_S} s for all"
        return _write_rows(job, Template(tokenizer, f"the base's chat template took over {limits}"))


def _write_rows(job: RenderingJob, template: Template) -> RenderingAnswer:
    """Write the rendered rows, up to the limits of the job. Raises TemplateTimeout."""
    tokens, rows, characters, usable = Counter[str](), 0, 0, 0
    part = Path(f"{job.out}.part")
    with part.open("w", encoding="utf-8") as out:
        for row in read_rows(job.paths, job.name, chats=job.chats, field=job.field):
            plain = template.plain
            document = _document(row, template, job.sample_tokens)
            if job.prompts and template.plain > plain:
                continue
            out.write(document.to_json() + "\n")
            tokens[row.domain] += sum(document.tokens)
            usable += document.sample_tokens(job.sample_tokens) if job.sample_tokens else sum(document.tokens)
            characters += len(document.text)
            rows += 1
            if job.max_tokens is not None and usable >= job.max_tokens:
                break
            if job.max_characters is not None and characters >= job.max_characters:
                break
    os.replace(part, job.out)
    return RenderingAnswer(dict(tokens), template.templated, template.plain, template.reason, rows=rows)


def _document(row: Row, template: Template, sample_tokens: int | None) -> Document:
    """Render a row, and count the tokens of its pieces. A chat longer than a sample is cut into pieces at its turns."""

    def count(pieces: Sequence[str]) -> tuple[int, ...]:
        return tuple(len(template.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)

    if row.text:
        return Document(row.text, count([row.text]), row.domain)
    whole = Document(text := template.chat(row), count([text]), row.domain, chat=True)
    if sample_tokens is None or whole.tokens[0] <= sample_tokens:
        return whole
    cut = replace(whole, turns=template.turns(row, text))
    return replace(cut, tokens=count(cut.pieces))


class Template:
    """The chat template of a tokenizer. `missing` is empty, or says why the template is not used.

    With `prompts`, a chat ends where the model is to answer.
    """

    def __init__(self, tokenizer: Any, missing: str = "", *, prompts: bool = False) -> None:
        self.tokenizer = tokenizer
        self._options = {"add_generation_prompt": True} if prompts else {}
        self.templated = self.plain = 0
        self._seconds = 0.0
        self.reason = self._missing = missing

    def chat(self, row: Row) -> str:
        """Render a chat, as `role: content` if the template refuses it. Raises TemplateTimeout."""
        text = None if self._missing else self._apply(row, row.messages)
        if text is None:
            self.plain += 1
            return plain_chat(row.messages)
        self.templated += 1
        return text

    def turns(self, row: Row, text: str) -> tuple[int, ...]:
        """Find the places in a rendered chat where turns begin, without its beginning, fewer than MAX_TURNS.

        A turn begins where the rendering of all messages before it ends. If the rendered chat does not begin with that
        (a template may write earlier messages in another way than the last one), the turn is left out. Raises
        TemplateTimeout.
        """
        is_plain = text == plain_chat(row.messages)
        count, found = len(row.messages), set[int]()
        for number in range(1, MAX_TURNS):
            before = max(1, count * number // MAX_TURNS) if count > MAX_TURNS else number
            if before >= count:
                break
            messages = row.messages[:before]
            head = plain_chat(messages) if is_plain else self._apply(row, messages, told=False)
            if head and len(head) < len(text) and text.startswith(head):
                found.add(len(head))
        return tuple(sorted(found))

    def _apply(self, row: Row, messages: Sequence[Message], *, told: bool = True) -> str | None:
        """Render messages of a chat with the template; return None if the template refuses them.

        `told`: whether the first refusal is the reason that is given.
        """
        if self._seconds > TEXT_LIMIT_S:
            raise TemplateTimeout
        began = time.process_time()
        try:
            with _limit_cpu_time():
                tools = {"tools": [*row.tools]} if row.tools else {}
                chat = [dict(m.fields) for m in messages]
                text = self.tokenizer.apply_chat_template(chat, tokenize=False, **self._options, **tools)
            if not isinstance(text, str) or not text.strip():
                raise ValueError("it makes nothing of a chat")
            if len(text) > MAX_GROWTH * row.size + MAX_OVERHEAD:
                raise ValueError(f"it makes {len(text):,} characters of a chat")
            text.encode()  # raises for half a surrogate pair, which cannot be written
            return text
        except TemplateTimeout:
            raise
        except Exception as error:  # a stranger's template may raise anything
            first = next(iter(str(error).splitlines()), "")[:150]
            said = first if first.isprintable() else repr(first)
            if told:
                self.reason = self.reason or f"the base's chat template refuses it: {type(error).__name__}: {said}"
            return None
        finally:
            self._seconds += time.process_time() - began


def _explain_missing(tokenizer: Any) -> str:
    """Say why there is no chat template; return nothing if there is one."""
    return "" if getattr(tokenizer, "chat_template", None) else "the base has no chat template"


def _tokenizer(folder: Path, remote_code: bool) -> Any:
    """Load the tokenizer of a checkpoint. Raises TokenizerError."""
    if not remote_code and "torch" not in sys.modules:  # the base's own code may need torch
        # A tokenizer works without torch, and without it transformers takes 1.4 s less to import.
        sys.modules["torch"] = None  # type: ignore[assignment]
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
    except Exception as error:  # a stranger's files may make it raise anything
        first = next(iter(str(error).splitlines()), "")[:300]
        raise TokenizerError(f"the tokenizer of the base cannot be loaded ({type(error).__name__}: {first})") from error


@contextlib.contextmanager
def _limit_cpu_time() -> Iterator[None]:
    """Raise TemplateTimeout in the block after CHAT_LIMIT_S of CPU time.

    After KILL_LIMIT_S the kernel ends the process, also in the middle of one operation.
    """

    def end(*_: object) -> None:
        raise TemplateTimeout

    signal.signal(signal.SIGVTALRM, end)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_VIRTUAL, CHAT_LIMIT_S)
    signal.setitimer(signal.ITIMER_PROF, KILL_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
