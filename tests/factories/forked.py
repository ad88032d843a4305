"""`requant` in forks of one process that has imported everything: processes of their own, without seconds of imports.

The standard library's fork server does the forking. A fork can stand in for a new process only where its environment
differs from the server's in variables that are read when they are used; `runs_here` says whether it does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
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
    "HF_TOKEN", "PYTEST_CURRENT_TEST", "REQUANT_STORE", "XDG_CACHE_HOME",
}  # fmt: skip

_started_with: dict[str, str] = {}


def start_server(environment: Mapping[str, str]) -> None:
    """Start the process that forks, and the one that forks its quantize children. They end with this one."""
    if _started_with:
        return
    warm_child.address()
    _started_with.update(environment)
    multiprocessing.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, {**environment, "PYTHONPATH": str(ROOT)}, clear=True):
        forkserver.ensure_running()


def runs_here(environment: Mapping[str, str]) -> bool:
    """Whether a fork behaves as a new process with this environment would."""
    names = _started_with.keys() | environment.keys()
    different = {name for name in names if _started_with.get(name) != environment.get(name)}
    return bool(_started_with) and different <= READ_LATE


def run_forked(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, timeout_s: float
) -> tuple[int, str, str]:
    """Run `requant ARGUMENTS` in a fork, its output in files of `folder`: exit status, stdout, stderr."""
    out, err = folder / "stdout", folder / "stderr"
    process = multiprocessing.get_context("forkserver").Process(
        target=_main, args=(list(arguments), dict(environment), str(out), str(err), warm_child.address())
    )
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"requant {' '.join(arguments)} took longer than {timeout_s:.0f} s: {err.read_text()}")
    assert process.exitcode is not None
    return process.exitcode, out.read_text(), err.read_text()


def _main(arguments: list[str], environment: dict[str, str], out: str, err: str, children: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = ["requant", *arguments]
    from flows.cli import main

    try:
        with warm_child.forked_children(children):
            main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out until Python 3.13
