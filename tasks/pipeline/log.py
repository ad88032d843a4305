"""Log lines as users should see them: no traceback of an expected failure, no secret, and in the log of their run."""

from __future__ import annotations

import logging

from requant.tasks.errors import RequantError, redact

ENDED_WELL = ("Finished in state Completed", "Finished in state Reused")
ROOT_LOGGER = "requant"  # the logger above all of ours
PREFECTS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine", "prefect")


class Redacting(logging.Filter):
    """Take the traceback off expected failures, and secrets out of every line."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, RequantError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = str(error), ()
        if isinstance(record.args, tuple):
            record.args = tuple(str(a) if isinstance(a, RequantError) else a for a in record.args)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit the format
            message = str(record.msg)
        record.msg, record.args = redact(message), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
        # The embedded server has no UI to look at, and what ended well says so itself.
        return not record.msg.startswith(("View at http://127.0.0.1", *ENDED_WELL))


def set_up_logging() -> None:
    """Let our loggers tell what goes on, and have every handler of this process redact what it gets. May be repeated.

    A handler sees the records of all loggers below its own; a filter of a logger sees only those of that logger.
    """
    logging.getLogger(ROOT_LOGGER).setLevel(logging.INFO)
    for name in (None, ROOT_LOGGER, *PREFECTS):
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(found, Redacting) for found in handler.filters):
                handler.addFilter(Redacting())


def log_into_runs() -> None:
    """Send the records of our loggers to Prefect too, each to the flow or task run that it belongs to. May be repeated.

    Prefect's setting PREFECT_LOGGING_EXTRA_LOGGERS does much the same, but every worker would have to have it, and
    Prefect warns of each record outside of a run, as those of a thread that watches over the process.
    """
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect.logging.handlers import APILogHandler

    ours = logging.getLogger(ROOT_LOGGER)
    if not any(isinstance(handler, APILogHandler) for handler in ours.handlers):
        handler = APILogHandler()
        handler.addFilter(lambda record: FlowRunContext.get() is not None or TaskRunContext.get() is not None)
        ours.addHandler(handler)
    set_up_logging()
