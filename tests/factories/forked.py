"""Python in forks of one process that has imported everything: processes of their own, without seconds of imports.

The standard library's fork server does the forking. A fork has its own pid, signals, exit status, working directory,
environment, output, threads and locks, so it can be watched, interrupted and killed like any process. Limits:

- Variables that modules read at import keep the server's values, so only variables in READ_LATE may differ;
  an environment that differs in others is refused.
  A test of what is imported, or of the interpreter's own start (`sitecustomize`, PYTHON* variables), needs a process.
- The entry point is not run: `-m MODULE` is the same code, while a console script or an installation is not proven.
- Nothing but imports happens in the server, so that all forks begin alike. They share the seed of str hashes, and
  numpy's global generator begins alike in each; `random`, `uuid` and `tempfile` differ as in new processes.
- An exception that nobody catches ends a fork with its traceback and status 1, as everywhere; the traceback has a few
  frames of this module on top. KeyboardInterrupt too, where the interpreter itself would die by SIGINT.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from tests.factories import warm_child
from tests.factories.paths import ROOT

PRELOADED = [
    "pytest",  # the main module of the process that asks, which each fork would import
    "boto3",
    "flows.cli",
    "flows.embedded",
    "flows.requantize",
    "flows.terminal",
    "flows.watch",
    "tasks.evaluate",
    "tasks.pictures.draw",
    "tasks.plan",
    "tests.factories.forked",
    "tests.factories.warm_child",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3_5.modeling_qwen3_5",
]
READ_LATE = {
    "AWS_ACCESS_KEY_ID", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_S3", "AWS_SECRET_ACCESS_KEY", "CEPH_FOLDER",
    "ENGINE_PIDS", "HF_TOKEN", "PYTEST_CURRENT_TEST", "REQUANT_STORE", "REQUANT_VLLM", "XDG_CACHE_HOME",
}  # fmt: skip

_started_with: dict[str, str] = {}
_living: weakref.WeakSet[Forked] = weakref.WeakSet()


def start_server(environment: Mapping[str, str]) -> None:
    """Start the process that forks. It ends with this one."""
    if _started_with:
        return
    _started_with.update(environment)
    multiprocessing.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {**environment, "PYTHONPATH": str(ROOT)}, clear=True):
        forkserver.ensure_running()
    atexit.register(_kill_what_is_left)  # a failed test may leave one behind, and multiprocessing would wait for it


def check(environment: Mapping[str, str]) -> None:
    """Fail unless a fork behaves as a new process with this environment would."""
    assert _started_with, "the fixture `environment` starts the server"
    names = _started_with.keys() | environment.keys()
    different = {name for name in names if _started_with.get(name) != environment.get(name)} - READ_LATE
    assert not different, f"{', '.join(sorted(different))} may be read at import: a fork is too late, use a new process"


class Forked:
    """Runs `python ARGUMENTS` (-m MODULE or -c CODE) in a fork, with the part of Popen's interface that tests use.

    With `warm_children`, quantize children are forks too (tests.factories.warm_child). A test that looks for a child
    among the processes, or kills it, does without.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], *, warm_children: bool = False
    ) -> None:
        check(environment)
        self.args = list(arguments)
        self._folder = tempfile.TemporaryDirectory(prefix="requant-fork-")
        self._out, self._err = Path(self._folder.name, "stdout"), Path(self._folder.name, "stderr")
        self._out.touch()
        self._err.touch()
        self._said: tuple[str, str] | None = None
        self._process = multiprocessing.get_context("forkserver").Process(
            target=_main,
            args=(
                self.args,
                dict(environment),
                str(self._out),
                str(self._err),
                warm_child.address() if warm_children else None,
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        _living.add(self)

    @property
    def returncode(self) -> int | None:
        """The exit status, less than zero if a signal ended it; None while it lives."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout, self._out.read_text(), self._err.read_text())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and to stderr."""
        self.wait(timeout)
        if self._said is None:
            self._said = self._out.read_text(), self._err.read_text()
            self._folder.cleanup()
        return self._said

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _kill_what_is_left() -> None:
    for fork in list(_living):
        fork.kill()


def _main(arguments: list[str], environment: dict[str, str], out: str, err: str, warm_children: Path | None) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=False)  # whatever the server's was
    kind, what, *rest = arguments
    try:
        with warm_child.forked_children(warm_children) if warm_children else contextlib.nullcontext():
            if kind == "-m":
                sys.argv = [what, *rest]
                sys.modules.pop(what, None)  # a new process would not have it either, and runpy would warn
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            else:
                sys.argv = ["-c", *rest]
                exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:  # as the interpreter ends: threads, exit functions, what is left to be written
        with contextlib.suppress(AttributeError):
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()  # multiprocessing leaves them out until Python 3.13
