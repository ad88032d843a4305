"""Leases: of several runs that need the same stage key, on any number of machines, one does the work.

A lease is an object `leases/<stage>/<key>/<generation>` with its owner and a count of heartbeats. To take a lease, a
process writes the object of the next generation, on the condition that it does not exist. To renew the lease, the
owner rewrites that object with a higher count. A lease is dead if its count no longer changes, or if its owner is a
process of this machine that has ended. Then the next generation may be taken. Clocks of different machines are never
compared: an observer measures with its own clock for how long the count has not changed.

A lease also names the blobs that the owner's work relies on. gc does not delete those (gc.py).
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

from requant.tasks.background import repeated
from requant.tasks.errors import StoreError
from requant.tasks.store.backend import Backend

log = logging.getLogger(__name__)

BEAT_S = 10.0
DEAD_AFTER_S = 60.0  # without a heartbeat, by the observer's clock
POLL_S = 1.0


@dataclass(frozen=True)
class Owner:
    """The content of a lease: the process that holds it, a random token, a count of heartbeats, and the blobs it needs.

    `started` is when the process started (`_start_of`). `needs` has the sha256 of each blob.
    """

    machine: str
    pid: int
    started: float
    token: str
    beats: int = 0
    needs: Sequence[str] = ()

    @classmethod
    def this_process(cls) -> Owner:
        return cls(_machine(), os.getpid(), _start_of(os.getpid()), os.urandom(8).hex())

    @property
    def is_gone(self) -> bool:
        """Whether the process ran on this machine and has ended. False for a process of another machine."""
        if self.machine != _machine():
            return False
        try:
            return _start_of(self.pid) != self.started
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return True

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class LeaseHandle:
    """A lease that this process holds. `needs` returns the sha256 of the blobs that its work relies on."""

    def __init__(self, backend: Backend, name: str, owner: Owner, needs: Callable[[], Iterable[str]]) -> None:
        self._backend, self._name, self._owner, self._needs = backend, name, owner, needs
        self._writing = threading.Lock()
        self._renewed = time.monotonic()

    def renew(self) -> None:
        """Write a heartbeat now, with the blobs that are needed now."""
        with self._writing:
            began = time.monotonic()
            self._owner = replace(self._owner, beats=self._owner.beats + 1, needs=sorted(self._needs()))
            self._backend.write(self._name, self._owner.to_json())
            self._renewed = began

    def assert_held(self) -> None:
        """Raise StoreError if other processes may soon take this one for dead, for example because it was suspended."""
        if time.monotonic() - self._renewed > DEAD_AFTER_S / 2:
            raise StoreError(f"the lease {self._name} was not renewed in time: run again")


@contextlib.contextmanager
def lease(
    backend: Backend,
    stage: str,
    key: str,
    beat_s: float | None = None,
    needs: Callable[[], Iterable[str]] = tuple,
) -> Iterator[LeaseHandle]:
    """Hold the lease of a stage key. Wait while another run holds it, and log once which process that is.

    Callers must look for the artifact again when they hold the lease: the previous owner may have made it. `needs` is
    called at each heartbeat, and returns the sha256 of the blobs that the work relies on.
    """
    folder = f"leases/{stage}/{key}"
    owner, generation = _acquire(backend, folder)
    held = LeaseHandle(backend, f"{folder}/{generation:06d}", owner, needs)
    try:
        with repeated(held.renew, BEAT_S if beat_s is None else beat_s, "heartbeat failed", at_end=False):
            yield held
    finally:
        for number in _generations(backend, folder):
            if number <= generation:
                backend.delete(f"{folder}/{number:06d}")


def wait_until_released(backend: Backend, stage: str, key: str) -> None:
    """Wait until those who hold a lease when this is called have released it.

    Others may hold it afterwards: they took it after the call began. The lease of a dead owner is taken and released.
    """
    folder = f"leases/{stage}/{key}"
    observer = _Observer()
    # Tokens of the owners at the time of the call that still hold a lease. There may be two of them: an owner that is
    # just releasing its generation, and the one that has taken the next generation.
    remaining: set[str] | None = None
    while generations := sorted(_generations(backend, folder)):
        texts = [backend.read(f"{folder}/{generation:06d}") for generation in generations]
        tokens = {owner.token for text in texts if text is not None and (owner := owner_of(text))}
        remaining = tokens if remaining is None else remaining & tokens
        if texts[-1] is not None and observer.is_dead(texts[-1]):
            with lease(backend, stage, key):
                return
        if tokens and not remaining:
            return
        time.sleep(POLL_S)


class _Observer:
    """Decides whether the owner of a lease is dead, from repeated looks at the lease."""

    def __init__(self) -> None:
        self._last: bytes | None = None
        self._since = time.monotonic()

    def is_dead(self, text: bytes) -> bool:
        if text != self._last:
            self._last, self._since = text, time.monotonic()
        owner = owner_of(text)
        return owner is None or owner.is_gone or time.monotonic() - self._since > DEAD_AFTER_S


def _acquire(backend: Backend, folder: str) -> tuple[Owner, int]:
    """Wait until nobody holds a lease, and take its next generation. Return its owner, this process, and its number."""
    owner = Owner.this_process()
    observer = _Observer()
    logged = False
    while True:
        generation = max(_generations(backend, folder), default=0)
        text = backend.read(f"{folder}/{generation:06d}") if generation else None
        if generation and text is None:
            time.sleep(0.05)
            continue  # the lease was released between the listing and the read
        if text is not None and not observer.is_dead(text):
            other = owner_of(text)
            if not logged and other is not None:
                log.info(f"waiting for process {other.pid} on {other.machine.split('/')[0]}, which does this work")
                logged = True
            time.sleep(POLL_S)
            continue
        key = f"{folder}/{generation + 1:06d}"
        if backend.write_new(key, owner.to_json()):
            # Since the listing, a second run may have taken over, finished and released the lease, and a third run may
            # have begun with generation 1. Then both this process and the third run have created an object.
            newest = max(_generations(backend, folder), default=0)
            previous = backend.read(f"{folder}/{generation:06d}") if generation else None
            if newest == generation + 1 and previous == text:
                return owner, newest
            backend.delete(key)
            time.sleep(random.uniform(0, POLL_S))


def _generations(backend: Backend, folder: str) -> list[int]:
    names = (key.rsplit("/", 1)[1] for key in backend.keys(folder))
    return [int(name) for name in names if name.isdigit()]


def owner_of(data: bytes) -> Owner | None:
    """Parse the content of a lease. Return None for one that Requant did not write, which counts as dead."""
    try:
        owner = Owner(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    texts = [owner.machine, owner.token, *owner.needs] if isinstance(owner.needs, list) else [None]
    return owner if type(owner.pid) is int and all(isinstance(text, str) for text in texts) else None


def _start_of(pid: int) -> float:
    """Return when a process started, in ticks since boot (proc(5), field 22): a changed clock does not change it."""
    if not Path("/proc/self/stat").exists():
        return psutil.Process(pid).create_time()
    stat = Path(f"/proc/{pid}/stat").read_text()
    return float(stat.rpartition(")")[2].split()[19])


def _machine() -> str:
    """Return host name and pid namespace: a pid identifies a process only within both."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return f"{socket.gethostname()}/{namespace}"
