"""Publish throughput beside `huggingface_hub.upload_folder` alone, on the Hub stand-in: `make bench`.

Four shards of random bytes, SIZE in all, go to a new repo each time; the two take turns, ROUNDS times. A release is
more than an upload: a branch, what the Hub lists compared with every hash, one commit that moves main, a tag. Its files
have been hashed when they were made; upload_folder hashes them itself. Client, stand-in and disk share this machine, so
the figures say what a release costs over an upload, not how fast a network is.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infra.dev.hub.launch import HubStandIn
from requant.tasks.artifact import Manifest
from requant.tasks.checkpoint.writer import write_file

ROOT = Path(__file__).parent.parent.parent
SIZE, SHARDS, ROUNDS = 1 << 30, 4, 3  # bytes
PIECE = 16 << 20


def main() -> None:
    """Print MB/s of both, and all seconds as JSON in build/bench-publish.json."""
    with tempfile.TemporaryDirectory() as scratch, HubStandIn(Path(scratch) / "hub") as hub:
        os.environ.update(hub.env)  # read when the client is imported
        from huggingface_hub import HfApi

        from requant.tasks.hub.release import release
        from requant.tasks.hub.revision import Revision
        from requant.tasks.recipe.recipe import Publish

        folder = Path(scratch) / "model"
        names = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]
        pieces = SIZE // SHARDS // PIECE
        manifest = Manifest.of(write_file(folder, n, (os.urandom(PIECE) for _ in range(pieces))) for n in names)
        write_file(folder, "README.md", [b"---\nlicense: mit\n---\n# bench\n"])
        base, api = Revision("demo/base", "0" * 40, ()), HfApi()

        def upload(repo_id: str) -> None:
            api.create_repo(repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

        def publish(repo_id: str) -> None:
            release(Publish(repo_id=repo_id), base, folder, manifest, ["README.md"])

        seconds: dict[str, list[float]] = {"upload_folder": [], "requant": [], "requant, nothing new": []}
        for number in range(ROUNDS):
            seconds["upload_folder"].append(timed(upload, f"me/upload-{number}"))
            seconds["requant"].append(timed(publish, f"me/release-{number}"))
            seconds["requant, nothing new"].append(timed(publish, f"me/release-{number}"))
            for repo_id in (f"me/upload-{number}", f"me/release-{number}"):
                api.delete_repo(repo_id)  # the disk need not hold all of them
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        speed = "" if "nothing" in name else f"  {manifest.size / middle / 1e6:8.0f} MB/s"
        sys.stdout.write(f"{name:22} {middle:7.2f} s{speed}\n")
    out = ROOT / "build" / "bench-publish.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"bytes": manifest.size, "seconds": seconds}, indent=1))


def timed(work: Callable[[str], None], repo_id: str) -> float:
    started = time.perf_counter()
    work(repo_id)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
