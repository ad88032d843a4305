"""What a killed run goes on from: finished blocks' files, and the values that the next block starts with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def clean_unfinished(out: Path) -> None:
    """Make what a killed process left fit to be resumed.

    auto-round finds its finished blocks again as `model-shard-*.safetensors`. Killed while it writes one, it leaves a
    cut file that it then fails to open; killed while it renames them at the very end, it no longer finds those that
    have their final name already.
    """
    from tasks.checkpoint.header import read_header
    from tasks.errors import CheckpointError

    renamed = {*out.glob("*/model-*-of-*.safetensors"), *out.glob("*/model.safetensors")}
    for shard in sorted({*out.glob("*/model-shard-*.safetensors"), *renamed}):
        try:
            read_header(shard)
        except CheckpointError:
            shard.unlink()
            continue
        if shard in renamed:
            taken = [int(path.stem.rsplit("-", 1)[1]) for path in shard.parent.glob("model-shard-*.safetensors")]
            shard.rename(shard.with_name(f"model-shard-{max(taken, default=0) + 1:05d}.safetensors"))
    for index in out.glob("*/*.index.json"):
        index.unlink()


def make_resume_atomic() -> None:
    """Give each block's chain values file names of their own, renamed into place before the manifest names them.

    auto-round overwrites one file for all blocks and then the manifest: killed in between, a resumed run would feed
    a block the inputs of the next one. (auto_round/utils/resume.py, 0.16.1.)
    """
    import torch
    from auto_round.utils import resume

    state = resume.ResumeState
    state.q_input_path = property(lambda s: s.dir / f"q_input_{len(s.completed_blocks)}.pt", lambda s, v: None)
    state.input_ids_path = property(lambda s: s.dir / f"input_ids_{len(s.completed_blocks)}.pt", lambda s, v: None)

    def mark_block_done(self: Any, block_name: str, q_input: Any, input_ids: Any) -> None:
        before = [self.q_input_path, self.input_ids_path]
        self.completed_blocks.append(block_name)
        for value, path in ((q_input, self.q_input_path), (input_ids, self.input_ids_path)):
            if value is not None:
                with open(f"{path}.part", "wb") as stream:
                    torch.save(resume._to_cpu_recursive(value), stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(f"{path}.part", path)
        manifest = {"signature": self.signature, "completed_blocks": self.completed_blocks}
        resume._atomic_write_json(self.manifest_path, manifest)
        for path in before:
            path.unlink(missing_ok=True)

    state.mark_block_done = mark_block_done
