"""How Prefect runs a stage: what is retried, what a log line may hold."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
from prefect.states import Completed, Failed

from requant.tasks.artifact import Manifest
from requant.tasks.errors import SECRET_VARIABLES, CheckpointError, HubUnavailable, QuantizeDied, StoreUnreachable
from requant.tasks.pipeline.log import Redacting, log_into_runs, set_up_logging
from requant.tasks.pipeline.prefect import may_succeed_later, options, stage_summary
from requant.tasks.pipeline.stage import StageResult
from requant.tasks.record import StageRecord

SECRET = "hf_AbCdEfGhIjKlMnOp"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", SECRET)


def line(message: str, *args: Any, error: BaseException | None = None) -> str:
    """What a handler prints of a record that has passed the filter."""
    info = None
    if error is not None:
        try:
            raise error
        except BaseException:
            info = sys.exc_info()
    record = logging.LogRecord("prefect.task_runs", logging.ERROR, "x.py", 1, message, args, info)
    assert Redacting().filter(record)
    return logging.Formatter("%(levelname)s %(message)s").format(record)


def test_an_expected_failure_is_one_line_without_a_traceback() -> None:
    text = line("Task run failed with exception: %r", ValueError("x"), error=CheckpointError("a.safetensors is cut"))
    assert text == "ERROR a.safetensors is cut"


def test_an_unexpected_failure_keeps_its_traceback() -> None:
    text = line("Task run failed", error=KeyError("surprise"))
    assert text.startswith("ERROR Task run failed\nTraceback") and "KeyError: 'surprise'" in text


def test_a_secret_is_taken_out_of_the_message_and_of_its_arguments() -> None:
    assert line(f"token {SECRET}") == "ERROR token <HF_TOKEN>"
    assert line("token %s and %s", SECRET, {"auth": SECRET}) == "ERROR token <HF_TOKEN> and {'auth': '<HF_TOKEN>'}"


def test_a_secret_is_taken_out_of_an_expected_failure() -> None:
    assert line("failed", error=HubUnavailable(f"GET /x?token={SECRET}")) == "ERROR GET /x?token=<HF_TOKEN>"


def test_a_secret_is_taken_out_of_a_traceback() -> None:
    assert SECRET not in line("failed", error=RuntimeError(f"Authorization: Bearer {SECRET}"))


def test_a_line_whose_arguments_do_not_fit_does_not_stop_the_run() -> None:
    record = logging.LogRecord("prefect", logging.INFO, "x.py", 1, "100% of %s %s", ("one",), None)
    Redacting().filter(record)


def test_a_line_with_a_percent_sign_and_no_arguments_is_printed_as_it_is() -> None:
    assert line("50% done") == "ERROR 50% done"


def test_every_handler_of_ours_and_of_prefect_has_the_filter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger("requant"), "handlers", [handler])
    log_into_runs()
    set_up_logging()
    for name in ("requant", "prefect.flow_runs", "prefect.task_runs"):
        handlers = logging.getLogger(name).handlers
        assert handlers, name
        for found in handlers:
            assert [type(f) for f in found.filters].count(Redacting) == 1


def test_a_record_of_a_module_reaches_the_handlers_without_a_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("requant"), "handlers", [logging.StreamHandler(sys.stdout)])
    set_up_logging()
    logging.getLogger("requant.tasks.any.module").info("a token %s", SECRET)
    assert capsys.readouterr().out == "a token <HF_TOKEN>\n"


def test_a_record_outside_of_a_run_is_not_sent_to_prefect(recwarn: pytest.WarningsRecorder) -> None:
    log_into_runs()
    logging.getLogger("requant.tasks.any.module").info("nobody's")
    assert not [str(w.message) for w in recwarn if "flow run" in str(w.message)]


@pytest.mark.parametrize("error", [HubUnavailable("503"), QuantizeDied("killed")])
def test_a_failure_that_passes_by_itself_is_retried(error: Exception) -> None:
    assert may_succeed_later(None, None, Failed(data=error)) is True  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("cut"),
        StoreUnreachable("waited long enough"),
        ValueError("bug"),
        ConnectionError(),
        TimeoutError(),
    ],
)
def test_any_other_failure_is_not_retried(error: Exception) -> None:
    assert may_succeed_later(None, None, Failed(data=error)) is False  # type: ignore[arg-type]


def test_a_stage_is_retried_with_a_delay_that_grows_and_never_cached_by_prefect() -> None:
    made = options("download", hours=12)
    delays = made["retry_delay_seconds"](made["retries"])
    assert made["retries"] >= 3 and delays == sorted(delays) and delays[-1] > delays[0]
    assert made["retry_jitter_factor"] > 0
    assert (made["name"], made["timeout_seconds"], made["persist_result"]) == ("download", 12 * 3600, False)
    assert "requant" in made["tags"]


def test_a_reused_stage_says_so_in_its_state() -> None:
    result = StageResult("x", "k", "reused", 0.1, Manifest.of([]), StageRecord())
    state = stage_summary(result)
    assert state.is_completed() and state.name == "Reused" and state.data == result
    assert Completed().name == "Completed"


def test_a_stage_that_ran_hands_over_its_result() -> None:
    result = StageResult("x", "k", "ran", 0.1, Manifest.of([]), StageRecord())
    assert stage_summary(result) is result
