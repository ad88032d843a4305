"""Make a base of Qwen3.6-27B's shapes with random weights: `python -m infra.bench.whole.base HUB LAYERS`.

The shards are written into the stand-in's own folder, so that a base of 55 GB lies on the disk once. A process that was
killed goes on with the shards that are missing. The spread of the weights keeps activations finite.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from infra.bench.shapes import INDEX, TINY, Dimensions, Spec, Specs, Vision, base_config, base_tensors, index_of, split
from infra.dev.hub.hub import Hub
from infra.dev.hub.repository import Repository
from infra.dev.hub.seeding import Seed, seed
from infra.dev.hub.tree import Entry, Put

REPO_ID = "Qwen/Qwen3.6-27B"
MAX_SHARD_BYTES = 4_500_000_000
ELEMENTS_AT_A_TIME = 1 << 27
PARALLEL_SHARDS = 8
SMALL = Dimensions(
    layers=4, hidden=128, intermediate=384, heads=2, kv_heads=2, head_dim=64, linear_key_heads=2,
    linear_value_heads=2, linear_head_dim=64, vocab=2048,
    vision=Vision(depth=2, width=64, intermediate=128, heads=2, positions=64),
)  # fmt: skip


def dimensions(layers: int) -> Dimensions:
    """Return the dimensions of a base with so many layers; with 0, those of a model for tests."""
    return Dimensions(layers=layers) if layers else SMALL


def make_base(state: Path, dims: Dimensions) -> int:
    """Commit the base to the repo REPO_ID of a stand-in that does not run. Return the bytes of its tensors."""
    hub = Hub(state)
    repository = hub.find("models", REPO_ID) or hub.create("models", REPO_ID)
    tensors = base_tensors(dims)
    shards = split(tensors, MAX_SHARD_BYTES)
    one_copy = threading.Semaphore(6)  # Copies from the GPU take host memory.

    def make_shard(name: str) -> Put:
        note = state / "shards" / f"{name}.json"
        if not note.exists():
            temporary = hub.temporary()
            sha256, size = _write_shard(temporary, shards[name], one_copy)
            repository.adopt_lfs(temporary, Entry.lfs(sha256, size))
            note.write_text(json.dumps([sha256, size]))
            print(f"made {name}, {size:,} bytes", flush=True)
        sha256, size = json.loads(note.read_text())
        return Put(name, Entry.lfs(sha256, size))

    (state / "shards").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(PARALLEL_SHARDS) as pool:
        _commit(repository, list(pool.map(make_shard, shards)))
    total = sum(spec.nbytes for spec in tensors.values())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in TINY.iterdir():
            if path.suffix != ".safetensors" and path.name not in {"config.json", INDEX, "README.md"}:
                (folder / path.name).write_bytes(path.read_bytes())
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Random weights\n")
        (folder / "config.json").write_text(json.dumps(base_config(dims)))
        (folder / INDEX).write_text(json.dumps(index_of(shards, {"total_size": total})))
        seed(hub, Seed(repo_id=REPO_ID, folder=folder, message="Configs"))
    return total


def _commit(repository: Repository, shards: list[Put]) -> None:
    repository.commit("refs/heads/main", shards, title="Weights", author="Qwen")


def _write_shard(path: Path, specs: Specs, one_copy: threading.Semaphore) -> tuple[str, int]:
    """Write a shard, and hash it on the way. Return its sha256 and its size in bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    first = len(raw).to_bytes(8, "little") + raw
    digest = hashlib.sha256(first)
    with path.open("wb") as stream:
        stream.write(first)
        for name, spec in specs.items():
            for piece in _random_pieces(name, spec):
                with one_copy:
                    data = piece.cpu().view(torch.uint8).numpy().tobytes()
                digest.update(data)
                stream.write(data)
    return digest.hexdigest(), len(first) + end


def _random_pieces(name: str, spec: Spec) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor in BF16, at most ELEMENTS_AT_A_TIME at a time. They depend on the name alone."""
    device = f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]))
    count = math.prod(spec.shape)
    for begin in range(0, count, ELEMENTS_AT_A_TIME):
        empty = torch.empty(min(ELEMENTS_AT_A_TIME, count - begin), device=device, dtype=torch.float32)
        yield _fill(name, empty, generator).bfloat16()


def _fill(name: str, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Fill a piece of a tensor with values of the usual spread for a tensor of this name."""
    module, _, last = name.rpartition(".")
    if name.endswith("A_log"):
        return values.uniform_(0.01, 16, generator=generator).log_()
    if name.endswith(("dt_bias", "linear_attn.norm.weight")):
        return values.fill_(1)
    if name.startswith("model.visual.") and "norm" in name:
        return values.fill_(1 if last == "weight" else 0)
    if last == "bias" or "norm" in module.rpartition(".")[2]:  # The norms of Qwen3.5 multiply by 1 + weight.
        return values.zero_()
    return values.normal_(0, 0.25 if "conv1d" in name else 0.02, generator=generator)


if __name__ == "__main__":
    print(f"{make_base(Path(sys.argv[1]), dimensions(int(sys.argv[2]))):,} bytes of tensors", flush=True)
