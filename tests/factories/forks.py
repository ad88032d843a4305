"""Python programs in forks of a process that has already imported what they need, which saves the seconds of imports.

`python -m tests.factories.forks LISTENING MODULES...` is that process: it imports the modules, and forks for each
connection to the socket LISTENING, a descriptor that it inherits. `Server` starts it, and a `Fork` is to a test what a
`subprocess.Popen` of `python ARGUMENTS` would be.

As in a new process: pid, process group (or session), signals, exit status, exit functions, folder, environment,
standard input, output and error, threads and locks. A fork begins in an interpreter that has only imported modules, and
leaves it as every program does, by the end or an exception of its main module.

Not as in a new process:

- Variables that a module reads at import keep the values of the server, as do the interpreter's own (PYTHON*), and
  `sitecustomize` is not run. A test of these, or of what is imported, needs a new process.
- All modules of the server are there, and do what they do at exit.
- The server is the parent, and the command line among the processes is the server's.
- The entry point is not run: `-m MODULE` is the same code, while a console script or an installation is not proven.
- Forks share the seed of str hashes, and numpy's global generator begins alike in each; `random`, `uuid` and `tempfile`
  differ.
- A traceback has a few frames of this module on top.
- Its modules are not taken apart at its end, after its threads and exit functions (`leave`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import BinaryIO

from tests.factories.paths import ROOT

MOST_BYTES = 1 << 20  # of a message; the kernel allows less


class Server:
    """A process that forks. It ends when this one does, however that comes about, and kills its forks then."""

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self.environment: dict[str, str] = {}
        self.address = ""

    def start(self, environment: Mapping[str, str]) -> None:
        """Let it import its modules in this environment, unless it has done so already."""
        if self.address:
            return
        self.environment = dict(environment)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
            listening.bind("")  # Linux finds a name that is free, and no file has it
            listening.listen()  # forks that are asked for before the modules are imported wait here
            self.address = listening.getsockname()[1:].decode()  # behind its first byte, which is zero
            descriptor = listening.fileno()
            command = [sys.executable, "-m", "tests.factories.forks", str(descriptor), *self.modules]
            server = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, pass_fds=[descriptor], stdin=PIPE, stdout=DEVNULL
            )
        atexit.register(server.communicate)  # it ends when its standard input does

    def differing(self, environment: Mapping[str, str]) -> set[str]:
        """Name the variables that have another value here than where the modules were imported."""
        names = self.environment.keys() | environment.keys()
        return {name for name in names if self.environment.get(name) != environment.get(name)}


class Fork:
    """A program in a fork, with the part of Popen's interface that is used of it.

    PIPE as standard output or error means a file in memory: it can be read after a kill, is never full, and need not be
    closed by whoever has inherited it.
    """

    def __init__(
        self,
        address: str,
        arguments: Sequence[str],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str],
        stdin: int = DEVNULL,
        stdout: int | BinaryIO = PIPE,
        stderr: int | BinaryIO = PIPE,
        start_new_session: bool = False,
    ) -> None:
        self.args = list(arguments)
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server.connect(f"\0{address}")
        self._outputs = [io.FileIO(os.memfd_create("o"), "r+") if isinstance(o, int) else o for o in (stdout, stderr)]
        reading, writing = os.pipe()
        self.stdin = io.FileIO(writing, "w")
        if stdin == DEVNULL:  # a closed pipe reads as /dev/null does
            self.stdin.close()
        program = {"arguments": self.args, "cwd": str(cwd), "environment": dict(env), "session": start_new_session}
        descriptors = [reading, *(each.fileno() for each in self._outputs)]
        socket.send_fds(self._server, [json.dumps(program).encode()], descriptors)
        os.close(reading)
        self.pid = self._describe_schedule("pid")

    def poll(self) -> int | None:
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        if (status := self._status(timeout)) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return status

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote to stdout and to stderr."""
        if self._status(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0, *self._written())
        return self._written()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # its end may be on the way here
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], timeout)[0]:
            self.returncode = self._describe_schedule("status")
            self._server.close()
        return self.returncode

    def _describe_schedule(self, what: str) -> int:
        message = json.loads(self._server.recv(MOST_BYTES) or b"{}")
        assert what in message, f"waited for its {what}: {message or 'the server of forks has ended'}"
        return int(message[what])

    def _written(self) -> tuple[str, str]:
        """Read the files, without moving the offset that they share with the fork."""
        out, err = (os.pread(each.fileno(), os.fstat(each.fileno()).st_size, 0).decode() for each in self._outputs)
        return out, err


def main(listening: int, *modules: str) -> None:
    """Be the server; in a fork, the program."""
    ends: list[int] = []
    atexit.register(leave, ends)  # before the modules register theirs, so that it is called after them
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the tests and the forks
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy all that was imported
    sys.stdout.flush()  # what is left in the buffer would be written by each fork
    connection = serve(listening)
    if connection is not None:
        signal.signal(signal.SIGINT, on_interrupt)
        arguments = become(connection)
        try:
            run(arguments)
            ends.append(0)
        except SystemExit as end:
            ends.append(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise
        except Exception:
            ends.append(1)
            raise


def leave(ends: list[int]) -> None:
    """End a fork whose exit status is known, after its threads and exit functions have ended.

    Otherwise the interpreter takes all modules apart, which copies what the fork shares with its server: 0.3 s of CPU.
    """
    if ends:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ends[0] & 0xFF)


def serve(listening: int) -> socket.socket | None:
    """Fork for each connection until standard input ends. Return its connection in each fork, and None in the end."""
    forks: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor that can be read when the fork has ended
    with socket.socket(fileno=listening) as listener:
        while 0 not in (ready := select.select([0, listening, *forks], [], [])[0]):
            for descriptor in forks.keys() & set(ready):
                pid, connection = forks.pop(descriptor)
                os.close(descriptor)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with connection, contextlib.suppress(OSError):  # who asked for it may have ended before
                    connection.send(json.dumps({"status": status}).encode())
            if listening in ready:
                connection, _ = listener.accept()
                pid = os.fork()
                if pid == 0:
                    for descriptor, (_, others) in forks.items():
                        os.close(descriptor)
                        others.close()
                    return connection
                forks[os.pidfd_open(pid)] = pid, connection
    for pid, _ in forks.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def become(connection: socket.socket) -> list[str]:
    """Make this process what was asked for; return the arguments of its program."""
    with connection:
        message, descriptors, _, _ = socket.recv_fds(connection, MOST_BYTES, 3)
        program = json.loads(message)
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        if program["session"]:
            os.setsid()
        os.environ.clear()
        os.environ.update(program["environment"])
        os.chdir(program["cwd"])
        connection.send(json.dumps({"pid": os.getpid()}).encode())
    return list(program["arguments"])


def run(arguments: Sequence[str]) -> None:
    """Run the program as the main module: `-m MODULE ARGUMENTS...` or `-c CODE ARGUMENTS...`."""
    kind, what, *rest = arguments
    assert kind in {"-m", "-c"}
    if kind == "-m":
        sys.argv = [what, *rest]
        sys.modules.pop(what, None)  # a new process would not have it either, and runpy would warn
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec", dont_inherit=True), module.__dict__)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
