"""Log lines as users should see them: no traceback of an expected failure, no secret."""

from __future__ import annotations

import logging

from tasks.errors import RequantError, redact

ENDED_WELL = ("Finished in state Completed", "Finished in state Reused")


class Plain(logging.Filter):
    """Takes the traceback off expected failures, and secrets out of every line."""

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


def plain_logs() -> None:
    """Put the filter on Prefect's run loggers, once."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine", "prefect"):
        logger = logging.getLogger(name)
        if not any(isinstance(f, Plain) for f in logger.filters):
            logger.addFilter(Plain())
