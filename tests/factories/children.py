"""Python modules run in forks of the test process, which has imported what they need.

A stand-in for the module `subprocess` where what a child does is tested, and not how it is started: its environment,
its folder, its output and its exit status are its own, and no second is spent on imports.
"""

from __future__ import annotations

import os
import runpy
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, CompletedProcess, TimeoutExpired
from typing import Any

__all__ = ["DEVNULL", "CompletedProcess", "TimeoutExpired", "run"]


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    timeout: float,
    stdin: int = DEVNULL,
    capture_output: bool = True,
    text: bool = False,
) -> CompletedProcess[Any]:
    """Run `python -m MODULE ARGUMENTS`, as subprocess.run does."""
    python, option, module, *arguments = command
    assert (python, option, stdin, capture_output) == (sys.executable, "-m", DEVNULL, True)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            _become(module, arguments, cwd, env, out.fileno(), err.fileno())
        descriptor = os.pidfd_open(child)
        try:
            ended = bool(select.select([descriptor], [], [], timeout)[0])
            if not ended:
                os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os.close(descriptor)
        if not ended:
            raise TimeoutExpired(command, timeout)
        outputs = []
        for stream in (out, err):
            stream.seek(0)
            outputs.append(stream.read())
    if text:
        return CompletedProcess(command, status, *(output.decode() for output in outputs))
    return CompletedProcess(command, status, *outputs)


def _become(module: str, arguments: list[str], cwd: Path, env: Mapping[str, str], out: int, err: int) -> None:
    """Do the work of the child and end: no line of the test is run in it."""
    status: object = 1
    try:
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as done:
        status = done.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)
