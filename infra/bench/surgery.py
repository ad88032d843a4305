"""Measure mtp-fix and inspect on a checkpoint of 27 B, and the reference card's script: `make bench`.

The checkpoint is sparse (`infra.bench.shapes`): 19 GB quantized and 56 GB of base, of which only the 1.1 GB of the
heads are on the disk. Each measurement is a process of its own, on a new copy whose untouched shards are hard links.
The card's script and mtp-fix run in turn, ROUNDS times, with an empty page cache (cold) and with what earlier runs left
in it (warm). Holes are read at the speed of memory: on a real checkpoint the card's script takes longer, and mtp-fix
does not. The script does not wait until its files are on the disk; mtp-fix does.

wall       seconds from start to end, with the start of Python
cpu        seconds of processor time, user and system, which depend less on other processes
peak       peak resident memory (VmHWM), with mapped pages of files
read       bytes of read calls (rchar), also for Python's modules, without mapped files
others     bytes of the shards, without the head's tensors, that the run loaded into the page cache by reading or
           mapping, according to mincore: headers, data and readahead (only for cold runs)
imports    which of torch, prefect, auto_round and transformers were imported

Inspect is measured on both folders (cold), and on both as repos of the Hub stand-in, which counts requests and bytes.
Their large files are linked into its state under names that are not hashes of their content, since hashing 74 GB would
take minutes, and inspect does not check them. Answers are cut after RESPONSE_LIMIT_BYTES, so that an inspect that
downloads weights fails.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from infra.bench.shapes import EXTRA, base_tensors, is_head, quantized_tensors, write_base, write_quantized
from infra.dev.hub.hub import Hub
from infra.dev.hub.launch import HubStandIn
from infra.dev.hub.tree import Entry, Put

ROOT = Path(__file__).parent.parent.parent
ROUNDS = 3
RESPONSE_LIMIT_BYTES = 8 << 20
TIMEOUT_S = 300.0
MB = 1_000_000

# Runs a module as `python -m` does, and writes what the kernel counted for the process to a file.
WRAPPER = """
import json, os, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    io = dict(line.split(": ") for line in open("/proc/self/io"))
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    heavy = [name for name in ("torch", "prefect", "auto_round", "transformers") if name in sys.modules]
    used = {"cpu": sum(os.times()[:2]), "peak": 1024 * int(status["VmHWM"].split()[0]), "read": int(io["rchar"])}
    with open(report, "w") as stream:
        json.dump({**used, "imports": heavy}, stream)
"""

CARD, FIX, LOSSY = "card's script", "mtp-fix --base", "mtp-fix without a base"

Run = dict[str, Any]


def main() -> None:
    """Print a table of medians, and write all figures to build/bench-surgery.json."""
    build = ROOT / "build"
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build, prefix="surgery-") as folder:
        scratch = Path(folder)
        say("making the checkpoints")
        base, quantized = write_base(scratch / "base"), write_quantized(scratch / "quantized")
        runs = surgery(scratch, base, quantized) + inspections(scratch, base, quantized)
    rows = medians(runs)
    verdicts = targets(rows)
    sys.stdout.write("\n".join([*map(line, rows), "", *verdicts]) + "\n")
    document = {"rounds": runs, "medians": rows, "targets": verdicts}
    (build / "bench-surgery.json").write_text(json.dumps(document, indent=1))


def surgery(scratch: Path, base: Path, quantized: Path) -> list[Run]:
    """Measure the card's script and mtp-fix in turn, cold and warm, and mtp-fix where there is nothing left to do."""
    runs: list[Run] = []
    bodies = bodies_of(base) | bodies_of(quantized)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in bodies}
    fix = ["requant", "mtp-fix", "--json"]
    commands = {CARD: ["infra.bench.card_script"], FIX: [*fix, "--base", str(base)], LOSSY: fix}
    for number in range(1, ROUNDS + 1):
        for state in ("cold", "warm"):
            for name, command in commands.items():
                if name == LOSSY and state == "warm":
                    continue  # it reads too little for the page cache to matter
                copy = fresh_copy(quantized, scratch / "copy")
                if state == "cold":
                    drop_from_cache([*base.iterdir(), *copy.iterdir()])
                # auto-round forgets a processor file. Without a base it stays missing, and mtp-fix exits with 1.
                run = measure([*command, str(copy)], scratch, statuses=(0, 1) if name == LOSSY else (0,))
                run |= {"name": f"{name}, {state}", "round": number}
                if state == "cold":
                    run["others"] = sum(resident(path, size) for path, size in bodies.items())
                runs.append(run)
                say(f"round {number}: {line(run)}")
                if name == FIX and state == "warm":
                    again = measure([*command, str(copy)], scratch) | {"name": f"{FIX}, nothing to do", "round": number}
                    runs.append(again)
                    say(f"round {number}: {line(again)}")
                shutil.rmtree(copy)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in bodies}
    if after != before:
        raise RuntimeError("a shard that must not change was written: the figures mean nothing")
    return runs


def inspections(scratch: Path, base: Path, quantized: Path) -> list[Run]:
    """Measure inspect on both folders and both repos."""
    runs: list[Run] = []
    folders = {"quantized": quantized, "base": base}
    for number in range(1, ROUNDS + 1):
        for kind, folder in folders.items():
            drop_from_cache(folder.iterdir())
            run = measure(["requant", "inspect", str(folder), "--json"], scratch, statuses={0, 1})
            run |= {"name": f"inspect, {kind}, local", "round": number}
            runs.append({**run, "others": sum(resident(path, size) for path, size in bodies_of(folder).items())})
            say(f"round {number}: {line(runs[-1])}")
    state = scratch / "hub"
    for kind, folder in folders.items():
        link_into_hub(state, f"me/{kind}", folder)
    with HubStandIn(state) as hub:
        hub.fault(r"\.safetensors", method="GET", times=None, cut_after_bytes=RESPONSE_LIMIT_BYTES)
        for number in range(1, ROUNDS + 1):
            for kind in folders:
                home = scratch / "home"
                environment = {**hub.env, "REQUANT_STORE": (home / "store").as_uri(), "HF_HOME": str(home / "hf")}
                hub.reset_traffic()
                run = measure(["requant", "inspect", f"me/{kind}", "--json"], scratch, environment, statuses={0, 1})
                traffic = hub.traffic()
                run |= {"name": f"inspect, {kind}, by Hub", "round": number}
                run |= {"requests": len(traffic), "sent": sum(exchange["bytes_out"] for exchange in traffic)}
                runs.append(run)
                say(f"round {number}: {line(run)}")
                shutil.rmtree(home, ignore_errors=True)
    return runs


def measure(
    command: list[str], scratch: Path, environment: Mapping[str, str] | None = None, *, statuses: Iterable[int] = (0,)
) -> Run:
    """Run a module of this project as a process. `error` is set if it did not end with one of `statuses`."""
    report = scratch / "report.json"
    report.unlink(missing_ok=True)
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, str(report), *command],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    run: Run = {"wall": time.perf_counter() - started}
    if report.exists():
        run |= json.loads(report.read_text())
    if process.returncode not in statuses or not output.startswith("{") or "error" in (document := json.loads(output)):
        return run | {"error": f"exit {process.returncode}: {(errors or output).strip()[-300:]}"}
    return run | {"said": {key: document[key] for key in ("changed", "tensors", "tensor_bytes") if key in document}}


def fresh_copy(quantized: Path, copy: Path) -> Path:
    """Copy the checkpoint, with hard links to the shards without a head, and sync the disk."""
    copy.mkdir()
    for path in quantized.iterdir():
        if path.suffix == ".safetensors" and path.name != EXTRA:
            os.link(path, copy / path.name)
        else:
            shutil.copyfile(path, copy / path.name)
    os.sync()
    return copy


def bodies_of(folder: Path) -> dict[Path, int]:
    """Return the shards, with the number of bytes before the first tensor of the head: in most, all bytes."""
    bodies: dict[Path, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        begins = [8 + length + entry["data_offsets"][0] for name, entry in header.items() if is_head(name)]
        bodies[path] = min(begins, default=path.stat().st_size)
    return {path: size for path, size in bodies.items() if path.name != EXTRA}


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Drop these files from the page cache. They must have been synced."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident(path: Path, size: int) -> int:
    """Count how many of the first `size` bytes of a file are in the page cache, with mincore(2)."""
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as view:
        start = ctypes.addressof(ctypes.c_char.from_buffer(view))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return int((np.frombuffer(bytes(pages), dtype=np.uint8) & 1).sum()) * mmap.PAGESIZE


def link_into_hub(state: Path, repo_id: str, folder: Path) -> None:
    """Make a folder a repo of the stand-in, which must not be running: weights are hard links with a made-up hash."""
    hub = Hub(state)
    repository = hub.create("models", repo_id)
    operations = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            entry = Entry.lfs(hashlib.sha256(f"{repo_id}/{path.name}".encode()).hexdigest(), path.stat().st_size)
            temporary = hub.temporary()
            os.link(path, temporary)
            repository.adopt_lfs(temporary, entry)
        else:
            entry = repository.put_blob(path.read_bytes())
        operations.append(Put(path.name, entry))
    repository.commit("refs/heads/main", operations, title="Seed", author=repo_id.partition("/")[0])


def medians(runs: list[Run]) -> list[Run]:
    """Make a row for each name: the medians of the runs that succeeded, and the last error of those that did not."""
    rows: list[Run] = []
    for name in dict.fromkeys(run["name"] for run in runs):
        named = [run for run in runs if run["name"] == name]
        row: Run = {"name": name, "imports": named[-1].get("imports", [])}
        for key in ("wall", "cpu", "peak", "read", "others", "requests", "sent"):
            values = [run[key] for run in named if key in run and "error" not in run]
            if values:
                row[key] = statistics.median(values)
        errors = [run["error"] for run in named if "error" in run]
        rows.append({**row, "error": errors[-1]} if errors else row)
    return rows


def targets(rows: list[Run]) -> list[str]:
    """Say in sentences which targets were set, and what was measured."""
    by_name = {row["name"]: row for row in rows}
    sentences: list[str] = []
    head_bytes = max(spec.nbytes for name, spec in base_tensors().items() if is_head(name))
    largest_bytes = max(spec.nbytes for spec in quantized_tensors().values())
    for name in (FIX, LOSSY):
        for state in ("cold", "warm"):
            card, fix = by_name[f"{CARD}, {state}"], by_name.get(f"{name}, {state}", {"error": "not run"})
            if "error" not in card and "error" not in fix:
                times = card["wall"] / fix["wall"]
                sentences.append(f"{name}, {state}: {times:.1f} times faster than {CARD} (asked for: 5)")
    fix = by_name[f"{FIX}, cold"]
    if "error" not in fix:
        limits = f"{(1.2 * head_bytes + 300 * MB) / MB:.0f} MB by the head's largest tensor"
        limits += f", {(1.2 * largest_bytes + 300 * MB) / MB:.0f} MB by the checkpoint's"
        sentences.append(f"{FIX}: peak {fix['peak'] / MB:.0f} MB (allowed: {limits})")
        sentences.append(
            f"{FIX}: {fix['others'] / MB:.1f} MB of data that is not the head's in memory (asked for: none)"
        )
    for name, row in by_name.items():
        if name.startswith("inspect") and "error" not in row:
            sent = f", {row['sent'] / 1000:.0f} kB in {row['requests']:.0f} requests" if "sent" in row else ""
            asked = ", a few hundred kB" if sent else ""
            sentences.append(f"{name}: {row['wall']:.2f} s{sent} (asked for: 2 s{asked})")
    sentences += [f"{row['name']} FAILED: {row['error']}" for row in rows if "error" in row]
    return sentences


def line(run: Run) -> str:
    """Write a run or a median in one line."""
    parts = [f"{run['name']:38}"]
    if "wall" in run:
        parts.append(f"{run['wall']:7.2f} s")
    if "cpu" in run:
        parts.append(f"cpu {run['cpu']:6.2f} s")
    for key, label in (("peak", "peak"), ("read", "read"), ("others", "others"), ("sent", "sent")):
        if key in run:
            parts.append(f"{label} {run[key] / MB:9.1f} MB")
    if "requests" in run:
        parts.append(f"{run['requests']:.0f} requests")
    if run.get("imports"):
        parts.append("imports " + ", ".join(run["imports"]))
    if "error" in run:
        parts.append("FAILED")
    return "  ".join(parts)


def say(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")


if __name__ == "__main__":
    main()
