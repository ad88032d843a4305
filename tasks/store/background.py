"""Work that is done again and again while something else goes on."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def repeated(
    work: Callable[[], None], every: float, failed: str, *, at_end: bool = True, patience: float | None = None
) -> Iterator[None]:
    """Call `work` every so many seconds in a thread, and once more `at_end`.

    What it cannot read or write is logged as `failed`, into the log of the run at hand; the next call may succeed.
    `patience`: seconds that the end waits for it; None: as long as it takes.
    """
    stop = threading.Event()

    def loop() -> None:
        ending = False
        while not ending:
            ending = stop.wait(every)
            if ending and not at_end:
                return
            try:
                work()
            except OSError as error:  # StoreError is one; a full disk another
                log.warning("%s: %s", failed, error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(loop,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(patience)
