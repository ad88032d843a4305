"""The card and the report say how many tokens of the calibration each expert got."""

from __future__ import annotations

from requant.tasks.card.rows import expert_rows
from requant.tasks.record import StageRecord


def test_the_tokens_of_experts_are_summed_up_by_module() -> None:
    record = StageRecord({"experts": {"layers.0.mlp.experts": [1000, 0, 2600, 0], "layers.1.mlp.experts": [900] * 4}})
    assert expert_rows(record.experts) == [
        ("`layers.0.mlp.experts`", "4", "900", "0", "2,600", "1, 3"),
        ("`layers.1.mlp.experts`", "4", "900", "900", "900", "none"),
    ]


def test_a_record_without_experts_or_with_a_damaged_list_has_no_rows() -> None:
    for experts in (None, [], {"a": 5}, {"a": []}):
        assert expert_rows(StageRecord({"experts": experts}).experts) == []
