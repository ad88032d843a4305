"""Inputs that are hostile only because they are large.

A separate process reads them, so that its peak memory can be measured.

One case of each kind on every change, all at night.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.checkpoint.header import read_header
from requant.tasks.checkpoint.untrusted import MAX_HEADER_BYTES, MAX_JSON_BYTES
from tests.factories.checkpoints import safetensors_bytes, with_header
from tests.factories.counting import calls
from tests.factories.paths import ROOT
from tests.factories.watching import is_one_sentence, snapshot

MILLION = 1_000_000
SHARD = "model-00001-of-00001.safetensors"
GIGABYTES_2 = 2 << 20  # in KiB, as wait4 counts


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def header_of(folder: Path, header: bytes) -> None:
    (folder / SHARD).write_bytes(with_header(header))


BIG: dict[str, Callable[[Path], object]] = {
    "an index of a million names": lambda f: write_index(f, {f"model.layers.{i}": SHARD for i in range(MILLION)}),
    "an index of a million shards": lambda f: write_index(f, {f"m{i}": f"{i}.safetensors" for i in range(MILLION)}),
    "an index of a million ways out": lambda f: write_index(f, {f"m{i}": f"../{i}" for i in range(99_000)}),
    "an index one byte too large": lambda f: sparse(f / INDEX, MAX_JSON_BYTES + 1),
    "an index of 64 MB of brackets": lambda f: (f / INDEX).write_bytes(b'{"weight_map":[' + b"[]," * (21 << 20)),
    "an index of 64 MB of open lists": lambda f: (f / INDEX).write_bytes(b"[" * MAX_JSON_BYTES),
    "a config of a 10 MB number": lambda f: (f / "config.json").write_bytes(b'{"a":' + b"9" * 10_000_000 + b"}"),
    "legal but large: a config of a 60 MB string": lambda f: (f / "config.json").write_bytes(
        b'{"model_type":"%s"}' % (b"\\n" * (30 << 20))
    ),
    "a header of 100 MB of objects": lambda f: header_of(f, b'{"a":[' + b"{}," * 33_000_000),
    "a header of 100 MB of open objects": lambda f: header_of(f, b'{"a":' * (MAX_HEADER_BYTES // 5)),
    "a header of 100 MB of one name": lambda f: header_of(f, b'{"%s":5}' % (b"n" * (MAX_HEADER_BYTES - 10))),
    "a header of 100 MB of zeroes": lambda f: header_of(f, b"\0" * MAX_HEADER_BYTES),
    "a header of 2^63 in a sparse terabyte": lambda f: (sparse(f / SHARD, 1 << 40), cut(f / SHARD)),
}


def cut(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write((1 << 63).to_bytes(8, "little"))


OFTEN = {
    "an index of 64 MB of brackets",
    "a config of a 10 MB number",
    "a header of 100 MB of objects",
    "a header of 2^63 in a sparse terabyte",
}
CASES = [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in BIG]


@pytest.mark.parametrize("name", CASES)
def test_what_is_too_big_is_told_about_in_two_gigabytes(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"num_hidden_layers": 2}')
    (folder / SHARD).write_bytes(safetensors_bytes({"a": ("U8", (4,), b"abcd")}))
    write_index(folder, {"a": SHARD})
    BIG[name](folder)
    before = {path: found[:3] for path, found in snapshot(tmp_path).items()}
    status, out, peak = run("inspect", str(folder), "--json")
    document = json.loads(out)
    problems = [document["error"]] if "error" in document else document["problems"]
    assert status == bool(problems) and peak < GIGABYTES_2
    assert len(problems) < 300 and all(map(is_one_sentence, problems))
    assert problems or name.startswith("legal ")
    assert {path: found[:3] for path, found in snapshot(tmp_path).items()} == before


def run(*arguments: str) -> tuple[int, str, int]:
    """Exit status, stdout and peak memory in KiB of `requant ARGUMENTS`; what does not end fails the test."""
    code = "import resource, sys; from requant.flows.cli.main import main\ntry: main()\nfinally: " + (
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, int(done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_a_header_of_a_million_tensors_is_read_in_two_gigabytes(tmp_path: Path) -> None:
    (tmp_path / SHARD).write_bytes(with_header(many(MILLION)))
    code = (
        "import resource, sys, pathlib; from requant.tasks.checkpoint.header import read_header\n"
        "print(len(read_header(pathlib.Path(sys.argv[1]))), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / SHARD)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    count, peak = done.stdout.split()
    assert int(count) == MILLION and int(peak) < GIGABYTES_2


def test_the_work_of_reading_a_header_grows_with_its_tensors_and_no_faster(tmp_path: Path) -> None:
    """A 27 B model has 1,500 in a shard."""
    few, twice = tmp_path / "few", tmp_path / "twice"
    few.write_bytes(with_header(many(1500)))
    twice.write_bytes(with_header(many(3000)))
    assert (len(read_header(few)), len(read_header(twice))) == (1500, 3000)
    work = calls(lambda: read_header(few))
    assert work < 1500 * 40 and calls(lambda: read_header(twice)) < work * 2.1


def many(count: int) -> bytes:
    entry = b'"model.layers.%d.weight":{"dtype":"BF16","shape":[0,5120],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % i for i in range(count)) + b"}"
