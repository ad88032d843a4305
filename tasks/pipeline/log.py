"""Logging: no traceback of expected failures, no secrets, and every line in the log of the run that it belongs to."""

from __future__ import annotations

import logging

from requant.tasks.errors import RequantError, redact

SUCCESS_PREFIXES = ("Finished in state Completed", "Finished in state Reused")
ROOT_LOGGER = "requant"
PREFECT_LOGGERS = ("prefect.flow_runs", "prefect.task_runs", "prefect.engine", "prefect")


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
    logging.getLogger(ROOT_LOGGER).setLevel(logging.INFO)
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
