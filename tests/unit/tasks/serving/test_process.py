"""What is said of an engine that failed, and which command starts one."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.errors import RecipeError
from requant.tasks.serving.process import describe_status, error_lines
from requant.tasks.serving.vllm import find_vllm


def test_what_a_log_says_cannot_move_a_terminals_cursor_or_fill_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\x1b[31mValueError: a\x07b\x1b[0m\xff" + b"x" * 10_000)
    (line,) = error_lines(log)
    assert line.isprintable() and len(line) == 400 and line.startswith("ValueError: a?b")
    assert error_lines(tmp_path / "none") == []


@pytest.mark.parametrize(("status", "words"), [(1, "exit status 1"), (137, "SIGKILL"), (139, "signal 11")])
def test_how_it_ended_is_said_in_words(status: int, words: str) -> None:
    assert words in describe_status(status)


def test_a_command_that_does_not_exist_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUANT_VLLM", "/nowhere/vllm serve")
    with pytest.raises(RecipeError, match="REQUANT_VLLM names the command '/nowhere/vllm'"):
        find_vllm()
    monkeypatch.setenv("REQUANT_VLLM", "vllm 'serve")
    with pytest.raises(RecipeError, match="is no command"):
        find_vllm()
    monkeypatch.setenv("REQUANT_VLLM", " ")
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_vllm() is None
