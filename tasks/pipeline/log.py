"""Logging: no traceback of expected failures, no secrets, and every line in the log of the run that it belongs to."""

from __future__ import annotations

import logging
import re
import sys
from typing import Literal, TextIO

from requant.tasks.errors import RequantError, redact

SUCCESS_PREFIXES = ("Finished in state Completed", "Finished in state Reused")
ROOT_LOGGER = "requant"
# Of a task that is tried again. Source: prefect 3.8.8, task_engine.py (handle_retry).
RETRY = re.compile(
    r"failed with exception: (?P<quote>['\"]?)(?P<error>.*)(?P=quote) - "
    r"Retry (?P<number>\d+)/(?P<tries>\d+) will start (?P<wait_s>[\d.]+) second",
    re.DOTALL,
)
PREFECT_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine", "prefect")


Verbosity = Literal["quiet", "normal", "verbose"]
_verbosity: Verbosity | None = None


def set_verbosity(verbosity: Verbosity) -> None:
    """Choose what this process prints. The command line does so; the log of a worker has everything."""
    global _verbosity
    _verbosity = verbosity
    logging.getLogger(ROOT_LOGGER).setLevel({"quiet": "WARNING", "normal": "INFO", "verbose": "DEBUG"}[verbosity])


def verbosity() -> Verbosity:
    """Return what was chosen: `verbose` where nobody chose."""
    return _verbosity or "verbose"


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the moment: while bars are shown, that puts lines above them."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        """Keep sys.stderr."""


class PrefectLines(logging.Filter):
    """Keeps Prefect's own lines from a terminal, unless they were asked for. Another try is told in few words."""

    def filter(self, record: logging.LogRecord) -> bool:
        if verbosity() == "verbose" or not record.name.startswith("prefect"):
            return True
        retry = RETRY.search(record.getMessage())
        if retry is not None:
            again = (
                f"try {int(retry['number']) + 1} of {int(retry['tries']) + 1} begins in {float(retry['wait_s']):.1f} s"
            )
            record.msg, record.args = f"{retry['error']}; {again}", ()
        return verbosity() == "normal" and retry is not None


class Redacting(logging.Filter):
    """Removes the traceback of expected failures, and secrets from every line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, RequantError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = str(error), ()
        if isinstance(record.args, tuple):
            record.args = tuple(str(a) if isinstance(a, RequantError) else a for a in record.args)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # The arguments do not fit the format.
            message = str(record.msg)
        record.msg, record.args = redact(message), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        # The embedded server has no UI, and Requant logs by itself what succeeded.
        return not record.msg.startswith(("View at http://127.0.0.1", *SUCCESS_PREFIXES))


def set_up_logging() -> None:
    """Log at the level INFO, and add the redacting filter to every handler of this process. May be repeated.

    The filter is added to handlers, which get the records of all loggers below theirs. A filter of a logger would see
    only the records of this one logger.
    """
    if _verbosity is None:
        logging.getLogger(ROOT_LOGGER).setLevel(logging.INFO)
    for name in (None, "prefect"):  # what is printed; the handlers of runs are elsewhere
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(one, PrefectLines) for one in handler.filters):
                handler.addFilter(PrefectLines())
    for name in (None, ROOT_LOGGER, *PREFECT_LOGGERS):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(one, Redacting) for one in handler.filters):
                handler.addFilter(Redacting())


def log_into_runs() -> None:
    """Send Requant's log records to Prefect too, each to the flow or task run that it belongs to. May be repeated.

    Prefect's setting PREFECT_LOGGING_EXTRA_LOGGERS does nearly the same. But every worker would need it, and Prefect
    warns about each record outside of a run, such as those of the thread that watches the run.
    """
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect.logging.handlers import APILogHandler

    logger = logging.getLogger(ROOT_LOGGER)
    if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
        handler = APILogHandler()
        handler.addFilter(lambda record: FlowRunContext.get() is not None or TaskRunContext.get() is not None)
        logger.addHandler(handler)
    set_up_logging()
