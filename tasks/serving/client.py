"""Asking a server that speaks OpenAI's HTTP API: one prompt, several times at once, streamed and timed.

Answers come from a process or a machine that may be anybody's: sizes, numbers and waiting are bounded here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from requant.tasks.errors import EngineFailed
from requant.tasks.http import is_loopback
from requant.tasks.serving.metrics import Drafts, read_drafts
from requant.tasks.serving.prompts import Prompt
from requant.tasks.settings import read_settings

SEED = 42
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
}
SILENCE_S = 300.0  # seconds without a word, after which a server has failed
MAX_ANSWER_BYTES = 64 << 20  # bytes of one answer
MAX_EVENT_LENGTH = 1 << 20  # characters of one event
SETTLED_S = 0.2  # seconds after which an engine has counted what it has sent


def api_key_header() -> dict[str, str]:
    """Give the header with the key of REQUANT_API_KEY; none where it is unset."""
    key = read_settings().api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


@dataclass(frozen=True)
class Server:
    """A server that answers. `chat`: the model has a chat template. `failure` words an error of this server."""

    url: str
    model: str
    chat: bool
    failure: Callable[[str], EngineFailed] = EngineFailed

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(
            base_url=self.url,
            headers=api_key_header(),
            timeout=httpx.Timeout(SILENCE_S, connect=10),
            limits=limits,
            verify=httpx.create_ssl_context(),
            trust_env=not is_loopback(self.url),
        )


@dataclass(frozen=True)
class Answer:
    """One streamed answer: its tokens, when it was asked for, and the moment and tokens of each piece (seconds)."""

    tokens: int
    asked: float
    pieces: tuple[tuple[float, int], ...]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.pieces[0][0] - self.asked

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens. Those that came in one piece, as accepted drafts do, share the wait for it."""
        found: list[float] = []
        for (before, _), (now, tokens) in zip(self.pieces, self.pieces[1:], strict=False):
            found += [(now - before) / tokens] * tokens
        return found


def ask(server: Server, prompt: Prompt, sampling: str, times: int = 1) -> tuple[list[Answer], Drafts]:
    """Ask one prompt `times` times at once; the answers, and what was drafted for them.

    Drafts are the difference of the server's counters: of a server that others use too, theirs are in it.
    Raises EngineFailed.
    """
    return asyncio.run(_ask(server, prompt, sampling, times))


async def _ask(server: Server, prompt: Prompt, sampling: str, times: int) -> tuple[list[Answer], Drafts]:
    async with server.client() as client:
        try:
            before = await drafts(client)
            tasks = [_answer(server, client, prompt, sampling, SEED + number) for number in range(times)]
            answers = await asyncio.gather(*tasks)
            await asyncio.sleep(SETTLED_S)
            return answers, (await drafts(client)).since(before)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            said = str(error) or type(error).__name__
            raise server.failure(f"{server.url} failed while it was asked {prompt.name!r} ({said})") from error


async def drafts(client: httpx.AsyncClient) -> Drafts:
    """The server's counters; all zero where it shows none."""
    async with client.stream("GET", "/metrics") as response:
        if response.status_code != 200:
            return Drafts()
        body = [line async for line in _lines(response)]
    return read_drafts("\n".join(body))


async def _answer(server: Server, client: httpx.AsyncClient, prompt: Prompt, sampling: str, seed: int) -> Answer:
    chat = prompt.chat and server.chat
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {
        "model": server.model,
        **({"messages": [{"role": "user", "content": prompt.text}]} if chat else {"prompt": prompt.text}),
        "max_tokens": prompt.tokens,
        "ignore_eos": True,  # the same number of tokens of every checkpoint; vLLM's and SGLang's word
        **SAMPLING[sampling],
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    asked = time.perf_counter()
    total: int | None = None
    pieces: list[tuple[float, int]] = []
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            words = " ".join([line async for line in _lines(response)])[:300]
            raise server.failure(
                f"{server.url}{path} refused {prompt.name!r} with status {response.status_code}: {words}"
            )
        async for event in _events(response, server):
            now, before = time.perf_counter(), total or 0
            total = _completion_tokens(event, before)
            if total > before:
                pieces.append((now, total - before))
            elif _has_text(event):
                pieces.append((now, 0))  # a server that counts at the end only
    if not total or not pieces:
        raise server.failure(f"{server.url}{path} answered {prompt.name!r} without counting its tokens (usage)")
    return Answer(total, asked, _told_apart(pieces, total))


def _told_apart(pieces: list[tuple[float, int]], total: int) -> tuple[tuple[float, int], ...]:
    """The pieces with their tokens; where only the total is known, each piece holds an equal share, at least one."""
    known = [piece for piece in pieces if piece[1]]
    if len(known) > 1 or len(pieces) == 1:
        return tuple(known)
    silent = [moment for moment, tokens in pieces if not tokens]
    share = max(1, round(total / len(silent)))
    return tuple((moment, share) for moment in silent)


async def _events(response: httpx.Response, server: Server) -> AsyncIterator[Mapping[str, Any]]:
    async for line in _lines(response):
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        try:
            event = json.loads(line[5:])
        except (ValueError, RecursionError) as error:
            raise server.failure(f"{server.url} streamed what is not JSON: {line[:120]!r}") from error
        if isinstance(event, dict):
            if event.get("error"):
                raise server.failure(f"{server.url} answered with an error: {str(event['error'])[:300]}")
            yield event


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of an answer. Raises httpx.DecodingError for one without measure."""
    held, size = "", 0
    async for text in response.aiter_text():
        size += len(text)
        *lines, held = (held + text).split("\n")
        if size > MAX_ANSWER_BYTES or len(held) > MAX_EVENT_LENGTH:
            raise httpx.DecodingError("its answer does not end")
        for line in lines:
            yield line.rstrip("\r")
    if held:
        yield held


def _completion_tokens(event: Mapping[str, Any], before: int) -> int:
    usage = event.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and before <= tokens < 1 << 31 else before


def _has_text(event: Mapping[str, Any]) -> bool:
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    parts = delta if isinstance(delta, dict) else choice
    return any(
        isinstance(parts.get(key), str) and parts[key] for key in ("text", "content", "reasoning_content", "reasoning")
    )
