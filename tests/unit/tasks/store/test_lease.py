"""Leases: one at a time, a dead owner's is taken over, a living one's never."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from requant.tasks.store import lease as leases
from requant.tasks.store.folder import FolderBackend
from requant.tasks.store.lease import Owner, lease
from tests.factories.requant import wait_for
from tests.factories.stores import Counted

KEY = "k" * 64
Told = Callable[[], list[str]]


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    monkeypatch.setattr(leases, "POLL_S", 0.01)
    return Counted(tmp_path / "store")


class Clock:
    """A clock that the test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of who watches a lease."""
    made = Clock()
    monkeypatch.setattr(leases, "time", made)
    return made


def held(backend: FolderBackend) -> list[str]:
    return [key.rsplit("/", 1)[1] for key in backend.keys(f"leases/quantize/{KEY}")]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Told:
    """What is logged of waiting for others."""
    caplog.set_level(logging.INFO, leases.log.name)
    return lambda: [message for message in caplog.messages if message.startswith("waiting for")]


def take(backend: FolderBackend) -> None:
    with lease(backend, "quantize", KEY, beat_s=10.0):
        pass


def owner_of(machine: str, pid: int = 1, started: float = 0.0) -> Owner:
    return Owner(machine, pid, started, "token")


def leave_lease(backend: FolderBackend, owner: Owner, generation: int = 1) -> str:
    """A lease object as another process has written it."""
    name = f"leases/quantize/{KEY}/{generation:06d}"
    backend.write(name, json.dumps(asdict(owner)).encode())
    return name


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_lease_is_there_while_it_is_held_and_gone_afterwards(backend: FolderBackend) -> None:
    with lease(backend, "quantize", KEY):
        assert held(backend) == ["000001"]
    assert held(backend) == []


def test_a_lease_is_released_when_the_work_fails(backend: FolderBackend) -> None:
    with pytest.raises(RuntimeError, match="no GPU"), lease(backend, "quantize", KEY):
        raise RuntimeError("no GPU")
    assert held(backend) == []
    take(backend)


def test_a_second_run_waits_until_the_first_is_done_and_says_once_for_whom(backend: FolderBackend, told: Told) -> None:
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with lease(backend, "quantize", KEY):
            inside.set()
            leave.wait()
            order.append("first")

    def second() -> None:
        with lease(backend, "quantize", KEY):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(5)
    threads[1].start()
    wait_for(told)
    assert order == [] and len(told()) == 1 and "which does this work" in told()[0]
    leave.set()
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second"] and held(backend) == []


def test_two_keys_do_not_wait_for_each_other(backend: FolderBackend) -> None:
    with lease(backend, "quantize", KEY), lease(backend, "quantize", "other"), lease(backend, "validate", KEY):
        assert len(held(backend)) == 1


def test_of_12_threads_only_one_is_inside_at_a_time(backend: FolderBackend) -> None:
    inside, most, runs = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, runs
        with lease(backend, "quantize", KEY):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.005)
            with guard:
                inside -= 1
                runs += 1

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (most, runs, inside) == (1, 12, 0)
    assert held(backend) == []


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(backend: FolderBackend, told: Told) -> None:
    mine = Owner.this_process()
    leave_lease(backend, replace(mine, pid=dead_pid()))
    with lease(backend, "quantize", KEY):
        assert "000002" in held(backend)
    assert told() == [], "nobody was waited for"
    assert held(backend) == []


def test_a_pid_used_again_by_another_process_is_not_the_owner(backend: FolderBackend, told: Told) -> None:
    mine = Owner.this_process()
    leave_lease(backend, replace(mine, started=mine.started - 3600))
    take(backend)
    assert told() == [], "nobody was waited for"


def test_a_living_process_of_this_machine_is_waited_for(backend: FolderBackend, told: Told) -> None:
    name = leave_lease(backend, Owner.this_process())
    thread = threading.Thread(target=take, args=(backend,))
    thread.start()
    wait_for(told)
    assert thread.is_alive() and len(told()) == 1
    backend.delete(name)
    thread.join(5)
    assert not thread.is_alive()


def test_a_silent_owner_on_another_machine_is_given_up_after_a_while(
    backend: Counted, clock: Clock, told: Told
) -> None:
    leave_lease(backend, owner_of("elsewhere/pid:[1]"))
    thread = threading.Thread(target=take, args=(backend,))
    thread.start()
    for _ in range(3):
        backend.wait_for_a_look()
        assert thread.is_alive()
        clock.now += leases.DEAD_AFTER_S / 3 + 0.1
    thread.join(10)
    assert not thread.is_alive()
    assert told() == ["waiting for process 1 on elsewhere, which does this work"]
    assert held(backend) == []


def test_an_owner_on_another_machine_that_beats_is_never_given_up(backend: Counted, clock: Clock) -> None:
    owner = owner_of("elsewhere")
    name = leave_lease(backend, owner)
    thread = threading.Thread(target=take, args=(backend,))
    thread.start()
    for beat in range(1, 11):
        backend.write(name, replace(owner, beats=beat).to_json())
        backend.wait_for_a_look()
        clock.now += leases.DEAD_AFTER_S * 0.9
    backend.wait_for_a_look()
    assert thread.is_alive()
    backend.delete(name)
    thread.join(5)
    assert not thread.is_alive()


def test_an_owner_beats_while_it_works(backend: FolderBackend) -> None:
    with lease(backend, "quantize", KEY, beat_s=0.01):
        first = beats(backend)
        wait_for(lambda: beats(backend) > first)
        second = beats(backend)
        wait_for(lambda: beats(backend) > second)


def beats(backend: FolderBackend) -> int:
    """How often the owner of the lease has beaten."""
    owner = leases.owner_of(backend.read(f"leases/quantize/{KEY}/000001") or b"")
    assert owner is not None
    return owner.beats


def test_a_heart_goes_on_after_a_beat_that_failed(tmp_path: Path) -> None:
    """A full disk for a minute must not make others believe that the owner is dead."""

    class Full(FolderBackend):
        failures = 2

        def write(self, key: str, data: bytes) -> None:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            super().write(key, data)

    backend = Full(tmp_path / "store")
    with lease(backend, "quantize", KEY, beat_s=0.01):
        wait_for(lambda: beats(backend) > 2)
    assert backend.failures == 0


SOUND = {"machine": "x", "pid": 1, "started": 1.0, "token": "t", "beats": 1, "needs": []}
FOREIGN = [
    {"machine": 5},
    {"pid": "1"},
    {"pid": None},
    {"token": []},
    {"needs": 5},
    {"needs": [["a"]]},
    {"needs": {"a": 1}},
]
DAMAGED = [b"", b"{", b"[]", b"null", b'{"pid": 1}', b"\xff", b'{"machine": "x", "more": 1}', b"[" * 100_000]
DAMAGED += [json.dumps({**SOUND, **other}).encode() for other in FOREIGN]


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda text: text[:60].decode(errors="replace"))
def test_a_damaged_lease_is_taken_over(backend: FolderBackend, damage: bytes) -> None:
    backend.write(f"leases/quantize/{KEY}/000003", damage)
    with lease(backend, "quantize", KEY):
        assert "000004" in held(backend)
    assert held(backend) == []


def test_a_lease_taken_over_meanwhile_is_left_to_its_new_owner(backend: FolderBackend) -> None:
    with lease(backend, "quantize", KEY):
        leave_lease(backend, owner_of("elsewhere"), generation=2)
    assert held(backend) == ["000002"]


def test_an_owner_knows_whether_its_process_is_gone() -> None:
    mine = Owner.this_process()
    assert not mine.is_gone
    assert replace(mine, pid=dead_pid()).is_gone
    assert replace(mine, started=mine.started - 100).is_gone
    assert not replace(mine, machine="elsewhere", pid=dead_pid()).is_gone
    assert Owner.this_process().token != mine.token
