"""The card says which calibration text the base wrote itself."""

from __future__ import annotations

from requant.tasks.card.rows import source_rows
from requant.tasks.record import RecordedSource


def test_a_text_that_the_base_wrote_is_called_so() -> None:
    own = RecordedSource("self", None, None, 40, 9000, {"code": 3, "math": 1}, 0, 0, None)
    other = RecordedSource("builtin:python", None, None, 1, 9000, {"": 4}, 0, 0, None)
    assert source_rows([own, other]) == [
        ("`self`", "4 (3 code, 1 math)", "40", "9,000", "written by the base", ""),
        ("`builtin:python`", "4", "1", "9,000", "", ""),
    ]
