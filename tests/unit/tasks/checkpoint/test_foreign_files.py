"""Files that are not what their names say, and checkpoints with such a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from requant.tasks.checkpoint.checkpoint import INDEX, Checkpoint
from requant.tasks.checkpoint.foreign_files import POINTER_BYTES, POINTERS
from requant.tasks.checkpoint.inspect import inspect_checkpoint
from requant.tasks.errors import CheckpointError
from tests.factories.foreign import IN_PLACE, POINTER
from tests.factories.pico import pico_base
from tests.factories.watching import is_one_sentence

# What may lie in place of a shard besides.
SHARDS = {
    **IN_PLACE,
    "gguf": (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file, not safetensors: put the safetensors file in its place"),
    "zip": (b"PK\3\4" + bytes(100), "is a zip archive, as PyTorch pickles weights, not safetensors"),
    "pickle": (b"\x80\x02}q\x00" + bytes(100), "is a Python pickle, not safetensors"),
    "words": (b"Entry not found", "is text, not safetensors ('Entry not found'): download it again"),
    "JSON": (b'{"error":"no"}', """is text, not safetensors ('{"error":"no"}'): download it again"""),
    "zeros": (bytes(1000), "begins with zeros, as a download that has not ended: download it again"),
    "cut": ((400).to_bytes(8, "little") + b'{"a":', "is not a whole safetensors file"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pico_base(tmp_path / "base")


@pytest.mark.parametrize("case", SHARDS)
def test_a_shard_that_is_something_else_is_named_with_a_remedy_and_nothing_is_concluded_from_it(
    case: str, base: Path
) -> None:
    content, said = SHARDS[case]
    shard = Checkpoint.open(base).tensors["mtp.fc.weight"].path
    shard.write_bytes(content)
    document = inspect_checkpoint(base)
    (problem,) = document.problems
    assert problem.startswith(f"{shard.name} {said}") and is_one_sentence(problem)
    assert document.engines["vllm"].loads is False


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("case", IN_PLACE)
def test_a_config_or_index_that_is_something_else_is_named_with_a_remedy(case: str, name: str, base: Path) -> None:
    content, said = IN_PLACE[case]
    (base / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(base)
    assert f"{name} {said}" in str(caught.value) and is_one_sentence(str(caught.value))


def test_pointers_have_the_sizes_by_which_they_are_looked_for() -> None:
    for first in POINTERS:
        for size in (0, 10**14):
            pointer = first + b"v1\noid sha256:" + b"a" * 64 + b"\nsize %d\n" % size
            assert len(pointer) in POINTER_BYTES
    assert len(POINTER) in POINTER_BYTES
