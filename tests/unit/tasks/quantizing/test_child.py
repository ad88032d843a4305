"""The process that quantizes: its samples, what it leaves after a kill, what it makes of auto-round's log."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from requant.tasks.quantizing.child import _check_layer_names
from requant.tasks.quantizing.events import BlockStarted, EventWriter, JobRefused
from requant.tasks.quantizing.reporting import LogReader
from requant.tasks.quantizing.resume import clean_unfinished
from requant.tasks.quantizing.samples import SampleSource, calibration_samples, shares
from requant.tasks.texts.text import find_text
from tests.factories.checkpoints import raw_tensors, safetensors_bytes


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert add_special_tokens is False
        return {"input_ids": [ord(c) for c in text]}


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def samples_of(paths: Any, nsamples: int, seqlen: int, *, mixed: bool = False, seed: int = 0) -> list[Any]:
    """The samples of one source."""
    limit = None if mixed else 4 * nsamples * seqlen
    source = SampleSource(name="the calibration text", paths=paths, mixed=mixed, max_tokens=limit)
    return calibration_samples(Letters(), [source], nsamples, seqlen, seed)[0]


def numbered(count: int) -> str:
    """A text whose n-th token is n."""
    return "".join(chr(n) for n in range(1000, 1000 + count))


def test_samples_are_as_many_and_as_long_as_asked_and_whole_numbers(tmp_path: Path) -> None:
    samples = samples_of([write(tmp_path, "a.txt", numbered(1000))], 7, 50)
    assert [tuple(s.shape) for s in samples] == [(1, 50)] * 7
    assert {s.dtype for s in samples} == {torch.int64}


@pytest.mark.parametrize(
    ("count", "nsamples", "seqlen"), [(1000, 7, 50), (350, 7, 50), (351, 7, 50), (60, 1, 50), (50, 1, 50)]
)
def test_samples_are_spread_over_the_text_and_never_overlap(
    count: int, nsamples: int, seqlen: int, tmp_path: Path
) -> None:
    samples = samples_of([write(tmp_path, "a.txt", numbered(count))], nsamples, seqlen)
    tokens = [int(t) for s in samples for t in s[0]]
    assert len(set(tokens)) == nsamples * seqlen and tokens == sorted(tokens)
    for sample in samples:
        first = int(sample[0, 0])
        assert sample[0].tolist() == list(range(first, first + seqlen))
    if nsamples > 1:
        assert tokens[-1] > 1000 + count - seqlen - count // nsamples


def test_a_text_too_short_is_an_error_that_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(
        JobRefused, match=r"has 349 tokens, and 7 samples of 50 need 350; there is room for 6 of this length: "
    ):
        samples_of([write(tmp_path, "a.txt", numbered(349))], 7, 50)


def test_several_texts_are_read_one_after_another(tmp_path: Path) -> None:
    paths = [write(tmp_path, "a.txt", "ab"), write(tmp_path, "b.txt", "cd")]
    (sample,) = samples_of(paths, 1, 4)
    assert sample[0].tolist() == [ord(c) for c in "abcd"]


def test_a_long_text_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(10))
    path = write(tmp_path, "a.jsonl", rows + "this line is never read\n")
    assert len(samples_of([path], 2, 50)) == 2


def test_the_same_text_gives_the_same_samples(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", numbered(5000))
    one, two = (samples_of([path], 5, 100) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_row_without_a_text_is_passed_over(tmp_path: Path) -> None:
    """Rows of published data sets have nulls."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ["aa", None, "bb"]}), tmp_path / "a.parquet")
    (sample,) = samples_of([str(tmp_path / "a.parquet")], 1, 4)
    assert sample[0].tolist() == [ord(c) for c in "aabb"]


def digest_of_samples(samples: list[Any]) -> str:
    return hashlib.sha256(json.dumps([sample.tolist() for sample in samples]).encode()).hexdigest()


@pytest.mark.parametrize(("name", "digest"), [
    ("builtin:python", "40d74c952822cb09609e7054d01af2449fbd659134fbefb1419a87161c44a5d7"),
    ("rows", "7e0b61cac05b37e2c0ba36aaf30768c257495332218bf44b43cf16b47b310a24"),
])  # fmt: skip
def test_the_samples_of_texts_that_are_not_mixed_are_what_they_were(name: str, digest: str, tmp_path: Path) -> None:
    """Recorded before mixed texts came: finished results are found by the name of the text, not by its samples."""
    rows = "".join(json.dumps({"text": f"row {n} " * (n % 7), "domain": "ab"[n % 2]}) + "\n" for n in range(200))
    text = find_text(name).path if name.startswith("builtin:") else write(tmp_path, "a.jsonl", rows)
    assert digest_of_samples(samples_of([str(text)], 9, 40, seed=3)) == digest


def mixed(folder: Path, **domains: int) -> str:
    """A text of rows of 30 characters: so many of each domain, one domain after another."""
    rows = [{"text": domain[0] * 30, "domain": domain} for domain, count in domains.items() for _ in range(count)]
    return write(folder, "mixed.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def letters(samples: list[Any]) -> Counter[str]:
    return Counter(chr(int(token)) for sample in samples for token in sample[0])


@pytest.mark.parametrize("nsamples", [3, 4, 7, 30])
def test_every_domain_of_a_mixed_text_gives_as_many_samples(nsamples: int, tmp_path: Path) -> None:
    path = mixed(tmp_path, prose=1000, code=900, chat=100)
    found = letters(samples_of([path], nsamples, 50, mixed=True, seed=42))
    assert found.keys() == {"p", "c"} and found.total() == nsamples * 50  # code and chat begin with one letter
    assert abs(found["p"] - nsamples * 50 / 3) <= 50


def test_a_domain_that_is_short_gives_what_it_has_and_the_others_the_rest() -> None:
    assert shares({"prose": 1000, "code": 1000, "chat": 120}, 10, 50) == {"prose": 4, "code": 4, "chat": 2}
    assert shares({"prose": 50, "code": 50, "chat": 50}, 3, 50) == {"prose": 1, "code": 1, "chat": 1}
    assert shares({"prose": 100, "code": 100, "chat": 100}, 1, 50, seed=1) == {"code": 1, "chat": 0, "prose": 0}


def test_a_mixed_text_too_short_is_an_error_that_says_what_each_domain_has(tmp_path: Path) -> None:
    path = mixed(tmp_path, prose=10, chat=2)
    with pytest.raises(JobRefused, match=r"has 360 tokens \(prose 300; chat 60\), and 8 samples of 50 need 400"):
        samples_of([path], 8, 50, mixed=True)
    with pytest.raises(JobRefused, match=r"has 120 tokens \(prose 60; chat 60\), and 3 samples of 40 need 120"):
        samples_of([mixed(tmp_path, prose=2, chat=2)], 3, 40, mixed=True)  # none over two domains


def test_the_samples_of_a_mixed_text_lie_all_over_it_never_overlap_and_are_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [{"text": numbered(5000), "domain": "prose"}, {"text": numbered(9000)[5000:], "domain": "code"}]
    path = write(tmp_path, "mixed.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    one, again, other = (
        [s[0].tolist() for s in samples_of([path], 20, 100, mixed=True, seed=seed)] for seed in (1, 1, 2)
    )
    assert one == again != other
    tokens = [token for sample in one for token in sample]
    assert len(set(tokens)) == len(tokens) == 2000
    assert min(tokens) < 1500 and max(tokens) > 9500
    turns = [sample[0] < 6000 for sample in one]
    assert turns == [False, True] * 10  # the domains by turns, and the seed says which comes first


# What a killed process left.


def shard(folder: Path, name: str, *tensors: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(safetensors_bytes({t: ("U8", (1,), t[:1].encode()) for t in tensors}))
    return folder / name


def left(folder: Path) -> dict[str, list[str]]:
    return {p.name: sorted(raw_tensors(p)) for p in sorted(folder.glob("*.safetensors"))}


def test_finished_blocks_stay_as_they_are(tmp_path: Path) -> None:
    out = tmp_path / "model-w4g128"
    shard(out, "model-shard-00001.safetensors", "a")
    shard(out, "model-shard-00002.safetensors", "b")
    clean_unfinished(tmp_path)
    assert left(out) == {"model-shard-00001.safetensors": ["a"], "model-shard-00002.safetensors": ["b"]}


def test_a_block_that_was_being_written_is_thrown_away(tmp_path: Path) -> None:
    out = tmp_path / "model-w4g128"
    shard(out, "model-shard-00001.safetensors", "a")
    cut = shard(out, "model-shard-00002.safetensors", "b", "c")
    cut.write_bytes(cut.read_bytes()[:-1])
    (out / "model-shard-00003.safetensors").write_bytes(b"")
    clean_unfinished(tmp_path)
    assert left(out) == {"model-shard-00001.safetensors": ["a"]}


def test_blocks_that_had_their_final_names_are_found_again(tmp_path: Path) -> None:
    out = tmp_path / "model-w4g128"
    for number, name in enumerate("abc", 1):
        shard(out, f"model-0000{number}-of-00003.safetensors", name)
    (out / "model.safetensors.index.json").write_text("{}")
    clean_unfinished(tmp_path)
    assert left(out) == {f"model-shard-0000{n}.safetensors": [name] for n, name in enumerate("abc", 1)}
    assert not (out / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("renamed", [1, 2, 3])
def test_no_block_is_lost_when_the_kill_came_while_they_were_renamed(renamed: int, tmp_path: Path) -> None:
    """auto-round renames one after another at the very end: the first ones have their final names already."""
    out = tmp_path / "model-w4g128"
    for number, name in enumerate("abcd", 1):
        final = number <= renamed
        shard(
            out, f"model-0000{number}-of-00004.safetensors" if final else f"model-shard-0000{number}.safetensors", name
        )
    clean_unfinished(tmp_path)
    found = left(out)
    assert sorted(t for tensors in found.values() for t in tensors) == ["a", "b", "c", "d"]
    assert all(name.startswith("model-shard-") for name in found)


def test_a_single_block_that_had_its_final_name_is_found_again(tmp_path: Path) -> None:
    """Of one shard auto-round makes `model.safetensors`."""
    out = tmp_path / "model-w4g128"
    shard(out, "model.safetensors", "a")
    clean_unfinished(tmp_path)
    assert left(out) == {"model-shard-00001.safetensors": ["a"]}


def test_nothing_to_clean_is_no_error(tmp_path: Path) -> None:
    clean_unfinished(tmp_path / "out")


# The log.


def logged(folder: Path, *records: tuple[int, str]) -> list[dict[str, Any]]:
    """The events that auto-round's log lines become."""
    handler = LogReader(EventWriter(folder / "events.jsonl").write)
    for level, text in records:
        handler.emit(logging.LogRecord("autoround", level, "x.py", 1, text, (), None))
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_the_loss_of_a_block_is_read_from_auto_rounds_log(tmp_path: Path) -> None:
    text = "quantized 6/8 layers in the block, loss iter 0: 0.001234 -> iter 187: 5.6e-05,'peak_ram': 1.2GB"
    (event,) = logged(tmp_path, (logging.INFO, text))
    assert (event["event"], event["before"], event["after"], event["iteration"]) == ("loss", 0.001234, 5.6e-05, 187)
    assert event["seconds"] >= 0


def test_a_loss_that_is_not_a_number_is_still_one_line_of_the_log(tmp_path: Path) -> None:
    (event,) = logged(tmp_path, (logging.INFO, "loss iter 0: nan -> iter 3: inf"))
    assert event["before"] != event["before"] and event["after"] == float("inf")


def test_warnings_become_events_and_chatter_does_not(tmp_path: Path) -> None:
    records = [(logging.INFO, "chatter"), (logging.WARNING, "w" * 900), (logging.ERROR, "broken")]
    assert [(e["event"], e["text"]) for e in logged(tmp_path, *records)] == [
        ("warning", "w" * 500),
        ("warning", "broken"),
    ]


def test_a_second_attempt_appends_to_the_events_of_the_first(tmp_path: Path) -> None:
    for number in range(2):
        EventWriter(tmp_path / "events.jsonl").write(BlockStarted(name=f"layers.{number}"))
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [e["name"] for e in lines] == ["layers.0", "layers.1"]


def test_a_layer_name_that_matches_nothing_is_an_error_that_names_it() -> None:
    _check_layer_names({"1.0": {}, r"1\..*": {}}, ["0", "1", "1.0"])
    with pytest.raises(JobRefused, match="'q_proj', which is in no layer"):
        _check_layer_names({"1.0": {}, "q_proj": {}}, ["0", "1", "1.0"])


def test_a_layer_name_that_is_no_regex_is_an_error_that_names_it() -> None:
    with pytest.raises(JobRefused, match=r"\*\.q_proj"):
        _check_layer_names({"*.q_proj": {}}, ["0"])
