"""Asking an engine questions: prompts rendered by its chat template, answers as token ids.

vLLM's own endpoints are used (0.32): /tokenize renders messages and tools and counts tokens, and /v1/completions takes
and returns token ids. So no chat template runs in this process, and no parser of the server touches an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, Field, ValidationError

from requant.tasks.probing.question import Prompt, Question, Reply
from requant.tasks.progress import progress
from requant.tasks.serving.client import SAMPLING, Server

ANSWER_TIMEOUT_S = 3600.0  # an answer is sent as a whole when it is finished
MAX_BODY_BYTES = 256 << 20
END_TOKENS = 16  # of a prompt, in which a template may begin or end a thought
# Templates that can leave the thought out have one of these switches (Qwen, GLM; DeepSeek). Others ignore them.
NO_THOUGHT = {"enable_thinking": False, "thinking": False}
Body = TypeVar("Body", bound=BaseModel)
Result = TypeVar("Result")


class _Tokens(BaseModel):
    """The answer of /tokenize: the tokens of a prompt and the engine's limit on prompt and answer together."""

    tokens: tuple[int, ...]
    max_model_len: int = Field(ge=1)
    token_strs: tuple[str, ...] = ()


class _Choice(BaseModel):
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None


class _Completion(BaseModel):
    """The answer of /v1/completions to one prompt."""

    choices: tuple[_Choice]


def render(server: Server, questions: Sequence[Question]) -> list[Prompt]:
    """Render questions with the engine's chat template. Raises EngineFailed."""
    return asyncio.run(_with_client(server, questions, _render, concurrency=1))


def ask(server: Server, questions: Sequence[Question], concurrency: int) -> list[Reply | None]:
    """Ask questions, `concurrency` at once, and return the answers in the order of the questions.

    An answer ends with the engine's limit on prompt and answer together. It is None where the prompt alone reaches the
    limit. Raises EngineFailed.
    """
    with progress("probe", len(questions), "requests") as bar:

        async def answer(server: Server, client: httpx.AsyncClient, question: Question) -> Reply | None:
            reply = await _ask(server, client, question)
            bar.advance()
            return reply

        return asyncio.run(_with_client(server, questions, answer, concurrency))


async def _with_client(
    server: Server,
    questions: Sequence[Question],
    do: Callable[[Server, httpx.AsyncClient, Question], Awaitable[Result]],
    concurrency: int,
) -> list[Result]:
    """Call `do` for each question, and raise EngineFailed for what HTTP raises. The first failure ends all others."""
    slots = asyncio.Semaphore(concurrency)

    async def one(client: httpx.AsyncClient, question: Question) -> Result:
        async with slots:
            return await do(server, client, question)

    async with server.client() as client:
        client.timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=10)
        tasks = [asyncio.ensure_future(one(client, question)) for question in questions]
        try:
            return list(await asyncio.gather(*tasks))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise server.failure(f"{server.url} failed while it was probed ({reason})") from error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _render(server: Server, client: httpx.AsyncClient, question: Question) -> Prompt:
    body: dict[str, Any] = {"model": server.model, "return_token_strs": True}
    if question.messages:
        body["messages"] = list(question.messages)
        body |= {"tools": list(question.tools)} if question.tools else {}
        body |= {} if question.think else {"chat_template_kwargs": NO_THOUGHT}
    else:
        body["prompt"] = question.text
    answer = await _post(server, client, "/tokenize", body, _Tokens)
    return Prompt(answer.tokens, "".join(answer.token_strs[-END_TOKENS:]), answer.max_model_len)


async def _ask(server: Server, client: httpx.AsyncClient, question: Question) -> Reply | None:
    prompt = await _render(server, client, question)
    room = prompt.max_tokens - len(prompt.tokens)
    if room < 1:
        return None
    body = {
        "model": server.model,
        "prompt": list(prompt.tokens),
        "max_tokens": min(question.max_tokens, room),
        **SAMPLING[question.sampling],
        "seed": question.seed,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
    }
    (choice,) = (await _post(server, client, "/v1/completions", body, _Completion)).choices
    return Reply(choice.token_ids, choice.text, choice.finish_reason == "stop", prompt)


async def _post(server: Server, client: httpx.AsyncClient, path: str, body: dict[str, Any], kind: type[Body]) -> Body:
    """Send a request and read its answer. Raises EngineFailed for a refusal, and for an answer of another form."""
    content = bytearray()
    async with client.stream("POST", path, json=body) as response:
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > MAX_BODY_BYTES:
                raise server.failure(f"{server.url}{path} answered with over {MAX_BODY_BYTES:,} bytes")
        if response.status_code != 200:
            words = bytes(content[:300]).decode("utf-8", "replace")
            raise server.failure(f"{server.url}{path} refused a probe with status {response.status_code}: {words}")
    try:
        return kind.model_validate_json(bytes(content))
    except (ValidationError, RecursionError) as error:
        raise server.failure(
            f"{server.url}{path} answers in another form than vLLM 0.32: probe with that version or a later one"
        ) from error
