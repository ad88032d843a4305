"""A client for servers with OpenAI's HTTP API that sends a prompt several times at once and times streamed answers.

The server may be anybody's: the size of its answers, its numbers and the time to wait for it are bounded here.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx

from requant.tasks.errors import EngineFailed
from requant.tasks.http import is_loopback
from requant.tasks.serving.events import StreamEvent
from requant.tasks.serving.metrics import DraftCounters, parse_counters
from requant.tasks.serving.prompts import Prompt
from requant.tasks.settings import read_settings

Result = TypeVar("Result")
SEED = 42
SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "top_p": 0.9},
}
READ_TIMEOUT_S = 300.0
MAX_ANSWER_LENGTH = 64 << 20  # characters
MAX_EVENT_LENGTH = 1 << 20  # characters
COUNTER_DELAY_S = 0.2  # an engine updates its counters shortly after it has sent the last token


def api_key_header() -> dict[str, str]:
    """Return the header with the key in REQUANT_API_KEY, or no header if it is unset."""
    key = read_settings().api_key
    return {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}


@dataclass(frozen=True)
class Server:
    """A server that is ready.

    chat: whether the model has a chat template; failure: makes the error for a failure of this server from a sentence.
    """

    url: str
    model: str
    chat: bool
    failure: Callable[[str], EngineFailed] = EngineFailed

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(
            base_url=self.url,
            headers=api_key_header(),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=10),
            limits=limits,
            verify=httpx.create_ssl_context(),
            trust_env=not is_loopback(self.url),
        )


@dataclass(frozen=True)
class Answer:
    """A streamed answer.

    tokens: how many it has; sent_s: when the request was sent; pieces: when each piece of the answer came, and its
    number of tokens. Times are seconds of `time.perf_counter`.
    """

    tokens: int
    sent_s: float
    pieces: tuple[tuple[float, int], ...]

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token."""
        return self.pieces[0][0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between tokens. Tokens of one piece, such as accepted drafts, share the time since the last piece."""
        gaps: list[float] = []
        for (before, _), (now, tokens) in zip(self.pieces, self.pieces[1:], strict=False):
            gaps += [(now - before) / tokens] * tokens
        return gaps


def ask(server: Server, prompt: Prompt, sampling: str, times: int = 1) -> tuple[list[Answer], DraftCounters]:
    """Send a prompt `times` times at once. Return the answers, and what the engine counted of their drafts.

    The counts are differences of the server's counters, and include other requests that the server answers meanwhile.
    Raises EngineFailed.
    """

    async def send(client: httpx.AsyncClient) -> list[Answer]:
        tasks = [_answer(server, client, prompt, sampling, SEED + number) for number in range(times)]
        return list(await asyncio.gather(*tasks))

    return asyncio.run(_count_drafts(server, prompt.name, send))


def continue_texts(server: Server, texts: Sequence[str], tokens: int) -> tuple[int, DraftCounters]:
    """Let a server continue several texts greedily, by `tokens` tokens each, in one request.

    Return the tokens of all answers, and what the engine counted of their drafts, as `ask` does. Raises EngineFailed.
    """
    continued = functools.partial(_continue, server, texts=texts, tokens=tokens)
    return asyncio.run(_count_drafts(server, f"{len(texts)} texts", continued))


async def _count_drafts(
    server: Server, asked: str, send: Callable[[httpx.AsyncClient], Awaitable[Result]]
) -> tuple[Result, DraftCounters]:
    """Return what `send` returns, and what the engine counted meanwhile. `asked` names the request in errors."""
    async with server.client() as client:
        try:
            before = await _read_counters(client)
            result = await send(client)
            await asyncio.sleep(COUNTER_DELAY_S)
            return result, (await _read_counters(client)).since(before)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise server.failure(f"{server.url} failed while it was asked {asked!r} ({reason})") from error


async def _read_counters(client: httpx.AsyncClient) -> DraftCounters:
    """Read the server's counters, which are zero if it has none."""
    async with client.stream("GET", "/metrics") as response:
        if response.status_code != 200:
            return DraftCounters()
        body = [line async for line in _lines(response)]
    return parse_counters("\n".join(body))


async def _continue(server: Server, client: httpx.AsyncClient, *, texts: Sequence[str], tokens: int) -> int:
    path = "/v1/completions"
    asked = {"max_tokens": tokens, "ignore_eos": True, **SAMPLING["greedy"]}
    body = {"model": server.model, "prompt": list(texts), **asked}
    async with client.stream("POST", path, json=body) as response:
        words = "\n".join([line async for line in _lines(response)])
    if response.status_code != 200:
        raise server.failure(f"{server.url}{path} refused texts with status {response.status_code}: {words[:300]}")
    answer = _read_event(words, server)
    if not answer.completion_tokens:
        raise server.failure(f"{server.url}{path} answered without counting its tokens (usage)")
    return answer.completion_tokens


async def _answer(server: Server, client: httpx.AsyncClient, prompt: Prompt, sampling: str, seed: int) -> Answer:
    chat = prompt.chat and server.chat
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {
        "model": server.model,
        **({"messages": [{"role": "user", "content": prompt.text}]} if chat else {"prompt": prompt.text}),
        "max_tokens": prompt.tokens,
        "ignore_eos": True,  # a parameter of vLLM and SGLang; every checkpoint gives the same number of tokens
        **SAMPLING[sampling],
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    sent_s = time.perf_counter()
    total = 0
    pieces: list[tuple[float, int]] = []
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            words = " ".join([line async for line in _lines(response)])[:300]
            raise server.failure(
                f"{server.url}{path} refused {prompt.name!r} with status {response.status_code}: {words}"
            )
        async for event in _events(response, server):
            now, before = time.perf_counter(), total
            total = max(before, event.completion_tokens or 0)
            if total > before:
                pieces.append((now, total - before))
            elif event.has_text:
                pieces.append((now, 0))  # some servers report the number of tokens only at the end
    if not total or not pieces:
        raise server.failure(f"{server.url}{path} answered {prompt.name!r} without counting its tokens (usage)")
    return Answer(total, sent_s, _share_tokens(pieces, total))


def _share_tokens(pieces: list[tuple[float, int]], total: int) -> tuple[tuple[float, int], ...]:
    """Return the pieces with their tokens.

    If the server reported the total only, each piece gets an equal share of it, at least one token.
    """
    counted = [piece for piece in pieces if piece[1]]
    if len(counted) > 1 or len(pieces) == 1:
        return tuple(counted)
    times = [time_s for time_s, tokens in pieces if not tokens]
    share = max(1, round(total / len(times)))
    return tuple((time_s, share) for time_s in times)


async def _events(response: httpx.Response, server: Server) -> AsyncIterator[StreamEvent]:
    """Yield the events of a streamed answer. Raises EngineFailed for one that is an error or not JSON."""
    async for line in _lines(response):
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        yield _read_event(line[5:], server)


def _read_event(text: str, server: Server) -> StreamEvent:
    """Read an event, or a whole answer. Raises EngineFailed for one that is an error or not JSON."""
    try:
        event = StreamEvent.from_json(text)
    except (ValueError, RecursionError) as error:
        raise server.failure(f"{server.url} answered what is not JSON: {text[:120]!r}") from error
    if event.error is not None:
        raise server.failure(f"{server.url} answered with an error: {event.error[:300]}")
    return event


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the lines of an answer. Raises httpx.DecodingError if it is too long, or one of its lines is."""
    rest, length = "", 0
    async for text in response.aiter_text():
        length += len(text)
        *lines, rest = (rest + text).split("\n")
        if length > MAX_ANSWER_LENGTH or len(rest) > MAX_EVENT_LENGTH:
            raise httpx.DecodingError("its answer does not end")
        for line in lines:
            yield line.rstrip("\r")
    if rest:
        yield rest
