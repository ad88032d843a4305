"""Write rows with a vLLM that this process started. It takes token ids and returns them (vLLM 0.10.2 and later)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import httpx
from pydantic import JsonValue

from requant.tasks.recipe.engine_flags import without_drafts
from requant.tasks.serving.client import Server
from requant.tasks.serving.flags import fitting_flags
from requant.tasks.writing.rows import Order

ANSWER_TIMEOUT_S = 3600.0  # for one row, while all rows of a batch are written
LENGTH_FLAG = "max-model-len"
# From the whole distribution, as the Gumbel noise in in_torch.py does. Where a request says nothing else, vLLM samples
# with the settings of generation_config.json.
SAMPLING: dict[str, float] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


def writing_flags(config: Mapping[str, Any], flags: Mapping[str, JsonValue], row_tokens: int) -> dict[str, JsonValue]:
    """Return the flags of a recipe's benchmark for a base with this config.json and rows of `row_tokens` tokens.

    Those of drafts are left out: many rows at once occupy a GPU fully, so that drafts would make it slower.
    """
    kept = {
        k: v
        for k, v in fitting_flags(config, without_drafts(flags)).items()
        if k.replace("_", "-").lower() != LENGTH_FLAG
    }
    return {**kept, LENGTH_FLAG: row_tokens}


class VllmWriter:
    """Writes rows of at most `row_tokens` tokens with a server, all rows of a batch at once."""

    def __init__(self, server: Server, stops: Collection[int], row_tokens: int) -> None:
        self._server, self._stops, self._row_tokens = server, sorted(stops), row_tokens

    def __call__(self, orders: Sequence[Order]) -> list[list[int]]:
        """Return the answers as token ids, each with the id that ended it, if one did. Raises EngineFailed."""
        return asyncio.run(self._write(orders))

    async def _write(self, orders: Sequence[Order]) -> list[list[int]]:
        async with self._server.client() as client:
            client.timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=10)
            try:
                return await asyncio.gather(*(self._answer(client, order) for order in orders))
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                raise self._server.failure(f"vLLM failed while it wrote calibration text ({reason})") from error

    async def _answer(self, client: httpx.AsyncClient, order: Order) -> list[int]:
        most = self._row_tokens - len(order.start.tokens)
        body = {
            "model": self._server.model,
            "prompt": list(order.start.tokens),
            "max_tokens": most,
            "seed": order.seed,
            "stop_token_ids": self._stops,
            "return_token_ids": True,
            **SAMPLING,
        }
        response = await client.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise self._server.failure(
                f"vLLM refused to write calibration text with status {response.status_code}: {response.text[:300]}"
            )
        try:
            tokens = response.json()["choices"][0]["token_ids"]
            if not isinstance(tokens, list) or len(tokens) > most or not all(type(token) is int for token in tokens):
                raise TypeError("no list of token ids")
        except (ValueError, LookupError, TypeError) as error:
            raise self._server.failure(
                "vLLM wrote calibration text without the ids of its tokens: install vLLM 0.10.2 or later"
            ) from error
        return tokens
