"""Leases: two runs of one stage key do the work once, on any number of machines.

A lease is an object `leases/<stage>/<key>/<generation>` that names its owner and counts heartbeats. Taking one is
a conditional write of the next generation's name; the owner beats by rewriting its object. A lease that stops
beating, or whose process on this machine is gone, is dead, and the next generation may be taken. No clocks of
two machines are ever compared: an observer only watches whether the count moves.

A lease also names the blobs that its owner's work relies on, which gc leaves alone (gc.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from requant.tasks.errors import StoreError
from requant.tasks.store.backend import Backend
from requant.tasks.store.background import repeated

log = logging.getLogger(__name__)

BEAT_S = 10.0  # seconds between heartbeats
DEAD_AFTER_S = 60.0  # seconds without one, as the observer sees it
POLL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """Who holds a lease: machine, process, when that process started, and how often it has beaten."""

    machine: str
    pid: int
    started: float
    token: str
    beats: int = 0
    needs: Sequence[str] = ()  # the sha256 of blobs that its work relies on: gc leaves them alone

    @classmethod
    def this_process(cls) -> Owner:
        return cls(_machine(), os.getpid(), _start_of(os.getpid()), os.urandom(8).hex())

    @property
    def is_gone(self) -> bool:
        """True only if it ran on this machine and certainly no longer does."""
        if self.machine != _machine():
            return False
        try:
            return _start_of(self.pid) != self.started
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class LeaseHandle:
    """A lease in hand."""

    def __init__(self, backend: Backend, name: str, owner: Owner, needs: Callable[[], Iterable[str]]) -> None:
        self._backend, self._name, self._owner, self._needs = backend, name, owner, needs
        self._writing = threading.Lock()
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """One heartbeat, at once: from now on everyone can read what is needed."""
        with self._writing:
            asked = time.monotonic()
            self._owner = replace(self._owner, beats=self._owner.beats + 1, needs=sorted(self._needs()))
            self._backend.write(self._name, self._owner.to_json())
            self._renewed = asked

    def assert_held(self) -> None:
        """Raises StoreError if others may take this process for dead by now, as when it was suspended."""
        if time.monotonic() - self._renewed > DEAD_AFTER_S / 2:
            raise StoreError(f"the lease {self._name} was not renewed in time: run again")


@contextlib.contextmanager
def lease(
    backend: Backend,
    stage: str,
    key: str,
    beat: float | None = None,
    needs: Callable[[], Iterable[str]] = tuple,
) -> Iterator[LeaseHandle]:
    """Hold the lease of a stage key. Blocks while another run holds it, and logs once who that is.

    After it is held, look for the artifact again: the run that held it before may have made it. `needs` says at each
    heartbeat which blobs the work relies on.
    """
    folder = f"leases/{stage}/{key}"
    owner, generation = _take(backend, folder)
    held = LeaseHandle(backend, f"{folder}/{generation:06d}", owner, needs)
    try:
        with repeated(held.renew, BEAT_S if beat is None else beat, "heartbeat failed", at_end=False):
            yield held
    finally:
        for number in _generations(backend, folder):
            if number <= generation:
                backend.delete(f"{folder}/{number:06d}")


def wait_until_released(backend: Backend, stage: str, key: str) -> None:
    """Wait until whoever holds a lease at this moment does no longer.

    Others may hold it by then: they began after this call did. A dead owner's lease is taken over, and released.
    """
    folder = f"leases/{stage}/{key}"
    watch = _Watch()
    first: set[str] | None = None  # the tokens seen at first, of a generation that is being given up too
    while generations := sorted(_generations(backend, folder)):
        texts = [backend.read(f"{folder}/{generation:06d}") for generation in generations]
        tokens = {owner.token for text in texts if text is not None and (owner := owner_of(text))}
        first = tokens if first is None else first & tokens
        if texts[-1] is not None and watch.says_dead(texts[-1]):
            with lease(backend, stage, key):
                return
        if tokens and not first:
            return
        time.sleep(POLL_S)


class _Watch:
    """Tells a dead owner from a living one, by looking at a lease again and again."""

    def __init__(self) -> None:
        self._seen: bytes | None = None
        self._since = time.monotonic()

    def says_dead(self, held: bytes) -> bool:
        if held != self._seen:
            self._seen, self._since = held, time.monotonic()
        owner = owner_of(held)
        return owner is None or owner.is_gone or time.monotonic() - self._since > DEAD_AFTER_S


def _take(backend: Backend, folder: str) -> tuple[Owner, int]:
    owner = Owner.this_process()
    watch = _Watch()
    told = False
    while True:
        generation = max(_generations(backend, folder), default=0)
        held = backend.read(f"{folder}/{generation:06d}") if generation else None
        if generation and held is None:
            time.sleep(0.05)
            continue  # released between the two reads
        if held is not None and not watch.says_dead(held):
            other = owner_of(held)
            if not told and other is not None:
                log.info(f"waiting for process {other.pid} on {other.machine.split('/')[0]}, which does this work")
                told = True
            time.sleep(POLL_S)
            continue
        mine = f"{folder}/{generation + 1:06d}"
        if backend.write_new(mine, owner.to_json()):
            # Another run may have taken over, finished and released what was seen above, and a third begun anew.
            newest = max(_generations(backend, folder), default=0)
            before = backend.read(f"{folder}/{generation:06d}") if generation else None
            if newest == generation + 1 and before == held:
                return owner, newest
            backend.delete(mine)
            time.sleep(random.uniform(0, POLL_S))


def _generations(backend: Backend, folder: str) -> list[int]:
    names = (key.rsplit("/", 1)[1] for key in backend.keys(folder))
    return [int(name) for name in names if name.isdigit()]


def owner_of(data: bytes) -> Owner | None:
    """Whose lease it is; None for what nobody of ours wrote, which counts as dead."""
    try:
        owner = Owner(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    words = [owner.machine, owner.token, *owner.needs] if isinstance(owner.needs, list) else [None]
    return owner if type(owner.pid) is int and all(isinstance(word, str) for word in words) else None


def _start_of(pid: int) -> float:
    """When a process started, in ticks since boot (proc(5), field 22), which no change of the clock moves."""
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time()
    stat = Path(f"/proc/{pid}/stat").read_text()
    return float(stat.rpartition(")")[2].split()[19])


def _machine() -> str:
    """Host name and process namespace: a pid means something only inside one of those."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"
