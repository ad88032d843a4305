"""The start of the command line, before anything is imported that takes long.

From here on, Ctrl-C and SIGTERM end the process with one sentence and the exit status 130.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from types import FrameType

INTERRUPTED = "interrupted: what was finished is kept, and the same command goes on from there"
PYTHONS_THRESHOLDS = gc.get_threshold()
Handler = Callable[[int, FrameType | None], object]
# Libraries report their use to their makers unless these are set. What a user has set is left as it is.
NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # Prefect's client, huggingface_hub, vLLM and others
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_XET_TELEMETRY_ENABLED": "0",  # uploads to the Hub; hf_xet heeds none of the two above
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",  # vLLM on several machines
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    """Run the command line."""
    _handle_interrupts(end_at_once)
    collect_garbage_rarely()
    turn_off_telemetry(os.environ)
    try:
        from requant.flows.cli.main import main as run_command

        run_command()
    finally:
        gc.freeze()  # Otherwise the interpreter looks for garbage in all modules once more before it ends.


def turn_off_telemetry(environment: MutableMapping[str, str]) -> None:
    """Set the variables that keep this process and its children from reporting their use to somebody."""
    for name, value in NO_TELEMETRY.items():
        environment.setdefault(name, value)


def collect_garbage_rarely() -> None:
    """Look for garbage after 10,000 new objects instead of 700: imports make a million of them, and all of them stay.

    This saves a quarter of the CPU seconds of imports.
    """
    gc.set_threshold(10_000)


def collect_garbage_often() -> None:
    """Look for garbage as often as Python does by itself: tensors in reference cycles take gigabytes."""
    gc.set_threshold(*PYTHONS_THRESHOLDS)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal by ending the process, while there is nothing yet, or nothing any more, to be put in order.

    An exception would not do: a module that is being imported could swallow it or turn it into an ImportError.
    """
    if "--json" in sys.argv:
        os.write(1, f'{{"status": "failed", "error": "{INTERRUPTED}"}}\n'.encode())
    os.write(2, f"\nrequant: {INTERRUPTED}\n".encode())  # behind the ^C of a terminal, as click does
    os._exit(130)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt in this block, but not in the middle of an import."""
    before = _handle_interrupts(_interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle_interrupts(handler: Handler) -> dict[int, Handler | int | None]:
    """Set the handler of both signals, and return the earlier ones.

    A background job of a shell is started with SIGINT ignored, and goes on ignoring it.
    """
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, in the middle of an import as soon as the module that began it goes on.

    A debugger's means tells when that is: a trace function of its frame.
    """
    imports = [each for each in _with_callers(frame) if each.f_code.co_filename.startswith("<frozen importlib")]
    importing = imports[-1].f_back if imports else None
    if importing is None:
        raise KeyboardInterrupt
    importing.f_trace = _raise_interrupt
    sys.settrace(_trace_nothing)  # Without any trace function, that of a frame is not called.


def _with_callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _raise_interrupt(frame: FrameType, event: str, argument: object) -> None:
    sys.settrace(None)
    frame.f_trace = None
    raise KeyboardInterrupt


def _trace_nothing(frame: FrameType, event: str, argument: object) -> None:
    return None
