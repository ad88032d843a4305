"""Checkpoints whose MTP head needs a repair."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from requant.tasks.checkpoint.checkpoint import SINGLE
from requant.tasks.checkpoint.repair import RepairSource, repair
from tests.factories.checkpoints import (
    all_tensors,
    from_bf16,
    raw_tensors,
    rounded,
    write_checkpoint,
    write_packed,
)
from tests.factories.paths import TINY


def elsewhere(base: Path, folder: Path, *, packed: tuple[str, ...] = (), single: bool = False) -> Path:
    """What auto-round alone writes: head tensors as F32, some of them packed, no word of them in the config."""
    write_packed(base, folder)
    tensors = raw_tensors(folder / SINGLE)
    for module in packed:
        _, shape, data = all_tensors(base)[f"{module}.weight"]
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{part}": raw for part, raw in rounded(from_bf16(data, shape))[0].items()}
    config = json.loads((folder / "config.json").read_text())
    (folder / SINGLE).unlink()
    if single:
        write_checkpoint(folder, {SINGLE: tensors}, config, index=False)
    else:
        names = list(tensors)
        half = {n: tensors[n] for n in names[: len(names) // 2]}
        rest = {n: tensors[n] for n in names[len(names) // 2 :]}
        write_checkpoint(
            folder, {"model-00001-of-00002.safetensors": half, "model-00002-of-00002.safetensors": rest}, config
        )
    for path in TINY.iterdir():
        if path.name != "config.json" and not path.name.startswith("model") and path.suffix != ".md":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def fixed(folder: Path, base: Path, **options: Any) -> dict[str, Any]:
    return repair(folder, RepairSource(base), **options)


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time, and the folder's own."""
    times = {".": (folder.stat().st_mtime_ns, b"")}
    return times | {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}


def killed_at(step: int, work: Callable[[], Any], cwd: Path) -> bool:
    """Fork, do the work, die by SIGKILL before the `step`-th file operation. Whether it came to that."""
    child = os.fork()
    if child == 0:
        left = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
            if writing or event in TOUCHING:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        os.chdir(cwd)
        sys.addaudithook(count)
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), "the repair failed by itself"
    return status != 0


# Audit events of calls that change a folder; ctypes.dlsym comes right before the exchange.
TOUCHING = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}
