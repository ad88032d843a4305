"""Rows written with transformers: drawn from the base's own distribution, each by its own seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from requant.tasks.checkpoint.checkpoint import Checkpoint
from requant.tasks.errors import OutOfMemory
from requant.tasks.validating.model import RunSettings, Skeleton
from requant.tasks.writing.in_torch import GumbelNoise, TorchWriter
from requant.tasks.writing.rows import Order, Start
from tests.factories.pico import pico_base

CPU = torch.device("cpu")
ROW_TOKENS = 24


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Skeleton]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Skeleton(Checkpoint.open(pico_base(tmp_path_factory.mktemp("base") / "b")), RunSettings(CPU, torch.float32))
    made.hold()
    yield made
    torch.set_num_threads(threads)


def orders(count: int) -> list[Order]:
    """Rows with prompts of different lengths."""
    return [Order(n, Start("code", tuple(range(10, 14 + n % 3))), seed=100 + n) for n in range(count)]


def test_draws_follow_the_softmax_of_the_logits() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise = GumbelNoise([7], CPU)
    draws = Counter(int(noise(torch.empty(0), probabilities.log()[None]).argmax()) for _ in range(4000))
    for token, probability in enumerate(probabilities.tolist()):
        assert abs(draws[token] / 4000 - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_a_row_does_not_depend_on_the_rows_beside_it(skeleton: Skeleton) -> None:
    writer = TorchWriter(skeleton, {2}, ROW_TOKENS)
    answers = writer(orders(6))
    assert writer(orders(6)[2:3]) == answers[2:3] and len(set(map(tuple, answers))) == 6
    assert [len(answer) for answer in answers] == [ROW_TOKENS - len(order.start.tokens) for order in orders(6)]
    other_seed = Order(2, orders(6)[2].start, seed=1)
    assert writer([other_seed]) != answers[2:3]


def test_an_answer_ends_behind_the_token_that_ends_it(skeleton: Skeleton) -> None:
    whole = TorchWriter(skeleton, {2}, ROW_TOKENS)(orders(1))[0]
    stop = whole[5]
    answer = TorchWriter(skeleton, {2, stop}, ROW_TOKENS)(orders(1))[0]
    assert answer == whole[: whole.index(stop) + 1]


def test_where_memory_is_short_fewer_rows_are_written_at_once(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are the same; a memory that does not suffice for one row ends with a sentence."""
    whole = TorchWriter(skeleton, {2}, ROW_TOKENS)(orders(6))
    generate, room, widths = skeleton.model.generate, 2, []

    def short_of_memory(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("out of memory")
        widths.append(len(input_ids))
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(skeleton.model, "generate", short_of_memory)
    assert TorchWriter(skeleton, {2}, ROW_TOKENS)(orders(6)) == whole and widths == [2, 2, 2]
    room = 0
    with pytest.raises(OutOfMemory, match="leave no room to write one row: install vLLM, or name another text"):
        TorchWriter(skeleton, {2}, ROW_TOKENS)(orders(6))
