"""Compare the throughput of a release with that of `huggingface_hub.upload_folder`: `make bench`.

Both upload SHARDS shards of random bytes to a new repo on the Hub stand-in, in turn, ROUNDS times. A release does more
than an upload: it makes a branch, compares what the Hub lists with every hash, moves main in one commit, and sets a
tag. Its files were hashed when they were made, while upload_folder hashes them. The client, the stand-in and the disk
share this machine: the figures show what a release costs over an upload, and not how fast a network is.
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
SIZE_BYTES, SHARDS, ROUNDS = 1 << 30, 4, 3
PIECE_BYTES = 16 << 20


def main() -> None:
    """Print MB/s of both, and write all seconds to build/bench-publish.json."""
    with tempfile.TemporaryDirectory() as scratch, HubStandIn(Path(scratch) / "hub") as hub:
        os.environ.update(hub.env)  # the client reads it when it is imported
        from huggingface_hub import HfApi

        from requant.tasks.hub.release import release
        from requant.tasks.hub.revision import Revision
        from requant.tasks.recipe.recipe import Publish

        folder = Path(scratch) / "model"
        names = [f"model-{number:05d}-of-{SHARDS:05d}.safetensors" for number in range(1, SHARDS + 1)]
        pieces = SIZE_BYTES // SHARDS // PIECE_BYTES
        manifest = Manifest.of(write_file(folder, n, (os.urandom(PIECE_BYTES) for _ in range(pieces))) for n in names)
        write_file(folder, "README.md", [b"---\nlicense: mit\n---\n# bench\n"])
        base, api = Revision("demo/base", "0" * 40, ()), HfApi()

        def upload(repo_id: str) -> None:
            api.create_repo(repo_id)
            api.upload_folder(repo_id=repo_id, folder_path=folder)

        def publish(repo_id: str) -> None:
            release(Publish(repo_id=repo_id), base, folder, manifest, ["README.md"], bits=4)

        seconds: dict[str, list[float]] = {"upload_folder": [], "requant": [], "requant, nothing new": []}
        for number in range(ROUNDS):
            seconds["upload_folder"].append(timed(upload, f"me/upload-{number}"))
            seconds["requant"].append(timed(publish, f"me/release-{number}"))
            seconds["requant, nothing new"].append(timed(publish, f"me/release-{number}"))
            for repo_id in (f"me/upload-{number}", f"me/release-{number}"):
                api.delete_repo(repo_id)  # to save disk space
    for name, taken in seconds.items():
        median_s = statistics.median(taken)
        speed = "" if "nothing" in name else f"  {manifest.size / median_s / 1e6:8.0f} MB/s"
        sys.stdout.write(f"{name:22} {median_s:7.2f} s{speed}\n")
    out = ROOT / "build" / "bench-publish.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"bytes": manifest.size, "seconds": seconds}, indent=1))


def timed(work: Callable[[str], None], repo_id: str) -> float:
    """Return the seconds that `work` takes with this repo."""
    started = time.perf_counter()
    work(repo_id)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
