"""Every file of tests/corpus, and what is too big to keep, through the reader and through the command line.

headers: whole shards; `legal-` are read as the reference reader reads them, `strict-` only Requant refuses, all others
both. indexes and configs: in place of those of a checkpoint made here. `odd-` ones can be read and say nonsense, or are
mended but for a file that is left over; `mends-` indexes contradict shards that are whole, which is mtp-fix's work.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from requant.tasks.checkpoint.checkpoint import INDEX
from requant.tasks.checkpoint.header import read_header
from requant.tasks.errors import CheckpointError
from tests.factories.paths import CORPUS
from tests.factories.pico import pico_base
from tests.factories.watching import Ran, is_one_sentence, requant, snapshot, watching

HEADERS, INDEXES, CONFIGS = (sorted((CORPUS / kind).iterdir()) for kind in ("headers", "indexes", "configs"))
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", HEADERS, ids=stem)
def test_a_kept_header_is_refused_in_a_sentence_or_read_as_the_reference_reader_reads_it(path: Path) -> None:
    theirs: Any
    try:
        theirs = {n: (t["dtype"], t["shape"], bytes(t["data"])) for n, t in deserialize(path.read_bytes())}
    except SafetensorError:
        theirs = None
    with watching() as watch:
        try:
            ours: Any = {n: (t.dtype, list(t.shape), t.read()) for n, t in read_header(path).items()}
        except CheckpointError as error:
            assert is_one_sentence(str(error)) and path.name in str(error)
            ours = None
    assert watch.changed == [] and {*watch.read} <= {str(path)}
    assert (theirs is None) == (not path.name.startswith(("legal-", "strict-")))
    assert ours == (None if path.name.startswith("strict-") else theirs)


class Bench:
    """A checkpoint whose head is gone, its base, the base once more, and a file outside, which lie there for all cases.

    What is hostile is put into the checkpoint and into the second base.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = pico_base(root / "base")
        self.suspects = (pico_base(root / "checkpoint", head=False), pico_base(root / "suspect"))
        shutil.copyfile(self.base / "config.json", root / "checkpoint" / "config.json")
        shutil.copyfile(self.base / ONE, root / "outside.safetensors")
        shutil.copytree(root, root.with_name("whole"))
        self.config = json.loads((self.base / "config.json").read_text())
        self.whole_index = (self.base / INDEX).read_bytes()
        self.whole = snapshot(root)

    def restore(self) -> None:
        """Put back what has changed."""
        now = snapshot(self.root)
        changed = [path for path in sorted({*now, *self.whole}) if now.get(path) != self.whole.get(path)]
        for path in map(Path, changed):
            original = self.root.with_name("whole") / path.relative_to(self.root)
            is_folder = os.path.lexists(path) and stat.S_ISDIR(path.lstat().st_mode)
            if original.is_dir() and is_folder:
                continue  # only its time has changed
            if is_folder:
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
            if original.is_dir():
                shutil.copytree(original, path)
            elif original.exists() and path.parent.is_dir():
                shutil.copy2(original, path)
        if changed:
            self.whole = snapshot(self.root)

    def put(self, name: str, data: bytes) -> None:
        for folder in self.suspects:
            (folder / name).write_bytes(data)

    def replace(self, name: str, make: Callable[[Path], object]) -> None:
        for folder in self.suspects:
            (folder / name).unlink()
            make(folder / name)

    def run(self, *arguments: str | Path) -> Ran:
        """`requant` with --json: sentences or a document, nothing opened but the checkpoints, and nothing changed
        unless it was repaired."""
        before = snapshot(self.root)
        ran = requant(*arguments, "--json")
        assert ran.status in {0, 1, 2}
        for problem in [ran.document["error"]] if "error" in ran.document else ran.document.get("problems", []):
            assert is_one_sentence(problem), problem
        inside = tuple(f"{folder}/" for folder in (*self.suspects, self.base))
        outside = [path for path in ran.watch.read if not f"{path}/".startswith((*inside, *self.stages))]
        assert outside == ([str(self.root)] if ran.document.get("changed") else [])  # the folder above is synced
        touched = [event for event in ran.watch.changed if not str(event[1]).startswith(self.stages)]
        if not ran.document.get("changed"):
            assert touched == [] and snapshot(self.root) == before
        return ran

    @property
    def stages(self) -> tuple[str, ...]:
        """Where mtp-fix works, and what it syncs: cleared at its start, gone at its end."""
        names = ("checkpoint", "suspect", "base")
        return (*(f"{self.root}/{stage}" for name in names for stage in (f".{name}.mtp-fix", f"{name}/.mtp-fix")),)

    def refuses(self) -> None:
        """`inspect` tells what is wrong; `mtp-fix` leaves it alone, as target and as base."""
        target, suspect = self.suspects
        assert self.run("inspect", target).status == 1
        assert self.run("inspect", suspect).status == 1
        assert self.run("mtp-fix", target, "--base", suspect).status == 1
        assert self.run("mtp-fix", target, "--base", self.base).status == 1
        assert self.run("mtp-fix", target).status == 1

    def mends(self) -> None:
        """`inspect` tells what is wrong; `mtp-fix` makes it good, once."""
        target = self.suspects[0]
        assert self.run("inspect", target).status == 1
        assert self.run("mtp-fix", target, "--base", self.base).document["changed"]
        assert self.run("inspect", target).document["problems"] == []
        assert not self.run("mtp-fix", target, "--base", self.base).document["changed"]
        assert snapshot(self.base).items() <= self.whole.items()

    def survives(self) -> None:
        """What can be read and says nonsense: a document or a sentence, and whoever repairs it does so once."""
        target, suspect = self.suspects
        self.run("inspect", target)
        self.run("mtp-fix", target)
        self.run("mtp-fix", target, "--base", suspect, "--dry-run")
        if self.run("mtp-fix", target, "--base", self.base, "--dry-run").document.get("writes"):
            assert not self.run("mtp-fix", suspect, "--base", self.base, "--dry-run").document.get("changed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("hostile") / "root")
    for arguments in (("inspect", bench.base), ("mtp-fix", bench.base, "--base", bench.base)):
        assert requant(*arguments, "--json").status == 0  # what is imported late is imported now
    return bench


@pytest.fixture
def bench(made: Bench) -> Iterator[Bench]:
    yield made
    made.restore()


@pytest.mark.parametrize("path", HEADERS, ids=stem)
def test_a_checkpoint_with_a_kept_header_is_told_about_and_left_alone(path: Path, bench: Bench) -> None:
    bench.put(TWO, path.read_bytes())
    bench.refuses()


@pytest.mark.parametrize("path", INDEXES, ids=stem)
def test_a_checkpoint_with_a_kept_index_is_told_about_and_left_alone_or_mended(path: Path, bench: Bench) -> None:
    bench.put(INDEX, path.read_bytes())
    if path.name.startswith("mends-"):
        bench.mends()
    elif path.name.startswith("odd-"):
        bench.survives()
    else:
        bench.refuses()


@pytest.mark.parametrize("path", CONFIGS, ids=stem)
def test_a_checkpoint_with_a_kept_config_is_told_about_and_left_alone(path: Path, bench: Bench) -> None:
    bench.put("config.json", path.read_bytes())
    if path.name.startswith("odd-"):
        bench.survives()
    else:
        bench.refuses()


NONSENSE: list[Any] = [None, True, -1, 1.5, 10**30, "x", [None], {"a": None}]
TEXT_KEYS = ("num_hidden_layers", "mtp_num_hidden_layers", "num_nextn_predict_layers", "hidden_size", "vocab_size")
TOP_KEYS = ("text_config", "vision_config", "quantization_config", "compression_config", "architectures", "model_type")
QUANTIZATION_KEYS = (
    "quant_method", "bits", "group_size", "sym", "packing_format", "block_name_to_quantize", "extra_config", "desc_act",
    "checkpoint_format", "modules_to_not_convert", "ignore", "config_groups", "dynamic", "weight_block_size", "format",
)  # fmt: skip
METHODS = ("auto-round", "gptq", "awq", "compressed-tensors", "fp8")


def nonsense(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Configs with one value of a wrong type each."""
    text = config["text_config"]
    for number, value in enumerate(NONSENSE):
        yield from ({**config, key: value} for key in TOP_KEYS)
        yield from ({**config, "text_config": {**text, key: value}} for key in TEXT_KEYS)
        method = METHODS[number % len(METHODS)]
        whole = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True}
        yield from ({**config, "quantization_config": {**whole, key: value}} for key in QUANTIZATION_KEYS)


def test_no_config_with_a_value_of_a_wrong_type_ends_in_a_traceback(bench: Bench) -> None:
    target = bench.suspects[0]
    for config in nonsense(bench.config):
        (target / "config.json").write_text(json.dumps(config))
        for command in (("inspect", target), ("mtp-fix", target, "--base", bench.base, "--dry-run")):
            ran = requant(*command, "--json")
            assert ran.status in {0, 1} and isinstance(ran.document, dict)
            assert [e for e in ran.watch.changed if not str(e[1]).startswith(bench.stages)] == []


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to the terminal": lambda path: path.symlink_to("/dev/stdin"),
    "a link to a file of the kernel that waits": lambda path: path.symlink_to("/proc/kmsg"),
    "a link to a file of the kernel without a size": lambda path: path.symlink_to("/proc/self/environ"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a name too long": lambda path: path.symlink_to("x" * 300),
    "a link below a file": lambda path: path.symlink_to(f"{ONE}/x"),
    "a sparse file of a terabyte": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("name", ["config.json", INDEX, TWO])
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_at_a_files_name_is_told_about_and_left_alone(
    make: Callable[[Path], object], name: str, bench: Bench
) -> None:
    bench.replace(name, make)
    bench.refuses()


def moving(text: str) -> list[str]:
    """The lines with characters that a terminal would obey."""
    return [line for line in text.split("\n") if not line.isprintable()]


@pytest.mark.parametrize("name", ["ansi", "c1", "nul", "newline", "right-to-left"])
def test_a_tensors_name_cannot_move_the_cursor_of_who_inspects_it(name: str, bench: Bench) -> None:
    header = (CORPUS / "headers" / f"legal-name-{name}.safetensors").read_bytes()
    weight_map = {json.loads(header[8 : 8 + header[0]].split(b"}")[0] + b"}}").popitem()[0]: TWO}
    for index in (bench.whole_index, json.dumps({"weight_map": weight_map}).encode()):
        bench.put(TWO, header)
        bench.put(INDEX, index)
        for ran in (requant("inspect", bench.suspects[0]), requant("mtp-fix", bench.suspects[0], "--base", bench.base)):
            assert moving(ran.out + ran.error) == []


def test_a_tensor_of_a_single_file_cannot_move_the_cursor_of_who_inspects_it(bench: Bench) -> None:
    target = bench.suspects[0]
    (target / INDEX).unlink()
    for path in HEADERS:
        if path.name.startswith("legal-"):
            shutil.copyfile(path, target / "model.safetensors")
            assert moving(requant("inspect", target).out) == [], path.name
            requant("mtp-fix", target, "--base", bench.base, "--dry-run")


def test_a_config_cannot_move_the_cursor_of_who_inspects_it(bench: Bench) -> None:
    bench.put("config.json", (CORPUS / "configs" / "odd-strings-with-escapes.json").read_bytes())
    assert moving(requant("inspect", bench.suspects[0]).out) == []


def stage(bench: Bench, removed: Callable[[Path], object]) -> None:
    """What looks like the work of an mtp-fix that was killed, and came with the checkpoint."""
    folder = bench.suspects[0] / ".mtp-fix"
    folder.mkdir()
    removed(folder / ".removed")


@pytest.mark.parametrize(
    "inside", ["tokenizer.json", "config.json", "below/victim.safetensors", "below/tokenizer.json"]
)
def test_a_list_of_files_to_remove_that_came_with_a_checkpoint_removes_nothing_of_others(
    inside: str, bench: Bench
) -> None:
    outside = bench.root / "outside"
    outside.mkdir()
    for name in ("victim.safetensors", "tokenizer.json"):
        (outside / name).write_bytes(b"mine")
    (bench.suspects[0] / "below").symlink_to(outside)
    stage(bench, lambda path: path.write_text(inside))
    requant("mtp-fix", bench.suspects[0], "--base", bench.base, "--json")
    assert (bench.suspects[0] / inside).exists()


@pytest.mark.parametrize(
    "removed", [os.mkfifo, Path.mkdir, lambda p: p.write_bytes(b"\xff\0"), lambda p: p.symlink_to(p)]
)
def test_no_list_of_files_to_remove_ends_in_a_traceback_or_is_waited_for(
    removed: Callable[[Path], object], bench: Bench
) -> None:
    stage(bench, removed)
    assert requant("mtp-fix", bench.suspects[0], "--base", bench.base, "--json").status in {0, 1}


def test_a_stage_that_leads_outside_is_not_emptied(bench: Bench) -> None:
    outside = bench.root / "outside"
    outside.mkdir()
    (outside / "mine").write_bytes(b"mine")
    for link in (bench.suspects[0] / ".mtp-fix", bench.root / ".checkpoint.mtp-fix"):
        link.symlink_to(outside)
        assert requant("mtp-fix", bench.suspects[0], "--base", bench.base, "--json").status in {0, 1}
        assert (outside / "mine").exists()
        bench.restore()
        outside.mkdir(exist_ok=True)
        (outside / "mine").write_bytes(b"mine")


def test_a_shard_behind_a_folder_that_leads_outside_is_neither_read_nor_removed(bench: Bench) -> None:
    outside = bench.root / "outside"
    outside.mkdir()
    for suspect in bench.suspects:
        index = json.loads((suspect / INDEX).read_text())
        (suspect / ONE).rename(outside / ONE)
        (suspect / "below").symlink_to(outside)
        index["weight_map"] = {n: f"below/{s}" if s == ONE else s for n, s in index["weight_map"].items()}
        (suspect / INDEX).write_text(json.dumps(index))
    bench.refuses()
