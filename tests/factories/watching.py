"""Runs `requant` inside the test process as a shell would, and watches what it opens, changes and prints."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from requant.flows.cli.main import main
from tests.factories.paths import ROOT

# Code, which Python reads when it is imported, and what its standard library looks at.
CODE = (
    str(ROOT / "tasks"),
    str(ROOT / "flows"),
    sys.prefix,
    sys.base_prefix,
    os.path.realpath(sys.prefix),
    "/dev/null",
)
CHANGES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chmod",
    "os.chown", "shutil.copyfile", "shutil.move", "shutil.rmtree",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SECONDS = 60


@dataclass
class Watch:
    """Files that were opened for reading, and everything that would change something."""

    read: list[str] = field(default_factory=list)
    changed: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass
class Ran:
    """What a command did: `error` is its sentence if it failed."""

    status: int
    out: str
    error: str
    watch: Watch

    @property
    def document(self) -> dict[str, Any]:
        """Its JSON document. Fails if stdout holds anything else, or what is no JSON: NaN."""
        found = json.loads(self.out, parse_constant=_refuse)
        assert isinstance(found, dict)
        return found


class TooLong(BaseException):
    """Not to be caught by the code under test."""


_active: list[Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _active:
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path = os.fsdecode(arguments[0])
        if isinstance(arguments[2], int) and arguments[2] & WRITES:
            _active[-1].changed.append(("open", path))
        elif not path.startswith(CODE):
            _active[-1].read.append(path)
    elif event in CHANGES:
        _active[-1].changed.append((event, *arguments))


sys.addaudithook(_hook)


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """What happens inside is recorded; what takes a minute is stopped."""

    def stop(*_: Any) -> None:
        raise TooLong

    watch = Watch()
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    _active.append(watch)
    try:
        yield watch
    finally:
        _active.pop()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def requant(*arguments: str | Path) -> Ran:
    """`requant ARGUMENTS`. Whatever is raised but its exit fails the test with its traceback.

    What it sets for its process is set back: environment, signals, handlers of the log and their filters.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    end, root = signal.getsignal(signal.SIGTERM), logging.getLogger()
    handlers = {handler: list(handler.filters) for handler in root.handlers}
    argv = ["requant", *map(str, arguments)]
    streams = (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err))
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ), streams[0], streams[1], watching() as watch:
        try:
            main()
        except SystemExit as done:
            status = done.code if isinstance(done.code, int) else int(done.code is not None)
        finally:
            signal.signal(signal.SIGTERM, end)
            root.handlers[:] = handlers
            for handler, filters in handlers.items():
                handler.filters[:] = filters
    return Ran(status, out.getvalue(), err.getvalue(), watch)


def snapshot(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind, mode, size, time of change, content."""
    found: dict[str, tuple[Any, ...]] = {}
    for where, folders, files in os.walk(folder):
        for path in (where, *(os.path.join(where, name) for name in (*folders, *files))):
            status = os.lstat(path)
            content = ""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashed(path, status)
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


_hashes: dict[tuple[int, ...], str] = {}
SETTLED_NS = 100_000_000  # beyond the grain of any file system's clock


def hashed(path: str, status: os.stat_result) -> str:
    """Hash each file once.

    A file changed less than 0.1 s ago is hashed every time, because its timestamps may not show another change.
    """
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _hashes:
        with open(path, "rb") as stream:
            found = hashlib.sha256(stream.read(16 << 20)).hexdigest()  # of a sparse terabyte, the beginning
        if time.time_ns() - status.st_ctime_ns < SETTLED_NS:
            return found
        _hashes[key] = found
    return _hashes[key]


def is_one_sentence(text: str) -> bool:
    """Nothing that moves a cursor or ends a line, and not endless."""
    return text.isprintable() and 10 < len(text) < 1500


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
