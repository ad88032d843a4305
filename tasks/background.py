"""Work that is repeated in a thread while other work goes on."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def repeated(
    work: Callable[[], None], every_s: float, failure: str, *, at_end: bool = True, join_timeout_s: float | None = None
) -> Iterator[None]:
    """Call `work` in a thread, with pauses of `every_s` seconds, and once more `at_end`.

    An OSError of `work` is logged with the words `failure`, into the log of the current run. The next call may succeed.
    On exit, wait up to `join_timeout_s` seconds for the thread, or with None until it ends.
    """
    stop = threading.Event()

    def loop() -> None:
        ending = False
        while not ending:
            ending = stop.wait(every_s)
            if ending and not at_end:
                return
            try:
                work()
            except OSError as error:  # a StoreError, or a full disk
                log.warning("%s: %s", failure, error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(loop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(join_timeout_s)
