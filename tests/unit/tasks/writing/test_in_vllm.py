"""Rows from a server: what it is asked for, and what is not taken from it."""

from __future__ import annotations

import json

import pytest

from requant.tasks.errors import EngineFailed
from requant.tasks.serving.client import Server
from requant.tasks.writing.in_vllm import VllmWriter, writing_flags
from requant.tasks.writing.rows import Order, Start
from tests.factories.answers import answers

ORDERS = [Order(number, Start("code", (5, 6)), seed=number) for number in range(3)]


def written(status: int, document: object) -> list[list[int]]:
    """What is made of a server's answer to every request."""
    with answers(status, json.dumps(document).encode()) as server:
        return VllmWriter(Server(server.url, "a model", chat=False), {2}, row_tokens=8)(ORDERS)


def test_answers_are_the_token_ids_that_the_server_names() -> None:
    assert written(200, {"choices": [{"text": "x", "token_ids": [7, 8, 2]}]}) == [[7, 8, 2]] * 3


@pytest.mark.parametrize("choice", [
    {"text": "x"}, {"token_ids": None}, {"token_ids": ["7"]}, {"token_ids": [True]}, {"token_ids": [7] * 7},
])  # fmt: skip
def test_a_server_without_token_ids_is_told_so_in_a_sentence(choice: object) -> None:
    with pytest.raises(EngineFailed, match=r"without the ids of its tokens: install vLLM 0\.10\.2 or later"):
        written(200, {"choices": [choice]})


def test_a_refusal_is_passed_on() -> None:
    with pytest.raises(EngineFailed, match=r"refused to write calibration text with status 400: .*too long"):
        written(400, {"error": "too long"})


def test_vllm_gets_the_recipes_flags_without_drafts_and_with_the_length_of_a_row() -> None:
    flags = {"tensor-parallel-size": 2, "max_model_len": 40_960, "speculative-config": {"method": "mtp"}}
    assert writing_flags({}, flags, 2048) == {"tensor-parallel-size": 2, "max-model-len": 2048}


def test_a_base_is_not_served_with_flags_of_the_results_quantization() -> None:
    flags = {"quantization": "gptq_marlin"}
    assert writing_flags({}, flags, 8) == {"max-model-len": 8}
    assert writing_flags({"quantization_config": {}}, flags, 8) == {**flags, "max-model-len": 8}
