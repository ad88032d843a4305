"""Forks quantize children from a process that has already imported auto-round, which saves 5 s each.

`python -m tests.factories.warm_child SOCKET` is that process. Each connection to it is one child: it sends what a new
process would be started with, and gets the child's process id and, when it has ended, its exit status. To
`tasks.quantizing.run` such a child is as one that it started: it is watched, killed and ended in the same ways.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest import mock

from tests.factories.paths import ROOT

PRELOADED = ["auto_round", "tasks.quantize_child", "tasks.quantizing.delta", "tasks.quantizing.profile"]
PRELOADED += ["tasks.quantizing.tune", "transformers"]
READ_AT_IMPORT = {  # as tasks.quantizing.run sets them
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "AR_LOG_LEVEL": "INFO",
}  # fmt: skip
START_S = 120.0

_started: list[Path] = []


def address() -> Path:
    """Where the process that forks listens. It is started by the first call and ends with this process."""
    if not _started:
        folder = tempfile.mkdtemp(prefix="warm-child-")
        path = Path(folder) / "socket"
        command = [sys.executable, "-m", "tests.factories.warm_child", str(path)]
        environment = {**os.environ, **READ_AT_IMPORT, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(shutil.rmtree, folder)
        atexit.register(server.communicate)  # it ends when its standard input does
        _started.append(path)
    return _started[0]


@contextmanager
def forked_children(listening: Path) -> Iterator[None]:
    """Let the quantize stage of this process have forks for children."""
    from tasks.quantizing import run

    def start(command: list[str], **how: Any) -> Child:
        return Child(listening, command, **how)

    with mock.patch.object(run, "subprocess", SimpleNamespace(Popen=start, PIPE=subprocess.PIPE)):
        yield


class Child:
    """What the stage uses of a `subprocess.Popen`."""

    def __init__(
        self, listening: Path, command: list[str], *, cwd: Path, env: Mapping[str, str], stdout: BinaryIO, **_: Any
    ) -> None:
        assert command[1:3] == ["-m", "tasks.quantize_child"] and env.items() >= READ_AT_IMPORT.items()
        self.stdin = _connect(listening)
        self.stdin.send((command[3:], str(cwd), dict(env), stdout.name))
        self.pid: int = self.stdin.recv()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.stdin.poll():
            self.returncode = self.stdin.recv()
        return self.returncode

    def wait(self) -> int:
        """Wait until the killed child is gone."""
        while self.returncode is None:
            try:
                os.kill(self.pid, 0)
                time.sleep(0.01)
            except ProcessLookupError:
                self.returncode = -signal.SIGKILL
        return self.returncode


def _connect(listening: Path) -> Connection:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return Client(str(listening))
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def serve(path: str) -> None:
    """Fork a child for each connection until standard input ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    children: dict[int, tuple[int, Connection]] = {}
    with Listener(path) as listener:
        accepting: Any = listener._listener
        while 0 not in (ready := wait([accepting._socket, 0, *children])):
            for ended in children.keys() & set(ready):
                pid, connection = children.pop(ended)
                os.close(ended)
                _, how = os.waitpid(pid, 0)
                status = os.waitstatus_to_exitcode(how)
                with suppress(OSError):
                    connection.send(status)
                connection.close()
            if accepting._socket in ready:
                connection = listener.accept()
                pid = os.fork()
                if pid == 0:
                    _be_child(connection)
                children[os.pidfd_open(pid)] = (pid, connection)


def _be_child(connection: Connection) -> None:
    status = 1
    try:
        os.setsid()
        words, cwd, environment, log = connection.recv()
        connection.send(os.getpid())
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        out = os.open(log, os.O_WRONLY | os.O_APPEND)
        for descriptor, source in ((0, connection.fileno()), (1, out), (2, out)):
            os.dup2(source, descriptor)
        from tasks.quantize_child import main

        status = main(*words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])
