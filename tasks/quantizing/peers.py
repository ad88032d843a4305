"""The processes of a run on several GPUs. The first one quantizes and writes, and its peers tune each block with it.

All run the same code on the same samples, and exchange what `loop/ranks.py` says. A peer sees one GPU, and writes
nothing but its events. If a peer ends early, the first process would wait for it forever, so it ends in the same way:
with the peer's error, so that the settings of the next attempt take less memory, or by the signal that killed the peer.
The peers end with the first process, as it holds the other end of their standard inputs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from requant.tasks.quantizing.events import EventSink, Failed, JobRefused, read_events
from requant.tasks.quantizing.failures import OUT_OF_MEMORY
from requant.tasks.recipe.quantize_section import Quantize

if TYPE_CHECKING:  # torch takes seconds to import
    import torch

    from requant.tasks.quantizing.loop.ranks import Ranks

POLL_INTERVAL_S = 0.2
SETTLE_S = 1.0  # in which other peers fail because one has failed
WATCH_S = 5.0
# The first process assembles nothing while blocks are tuned, and a peer waits for it at most for a slow block.
EXCHANGE_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Team:
    """This process among `count`, and the file by which they find each other."""

    rank: int = 0
    count: int = 1
    rendezvous: str = ""

    @property
    def is_peer(self) -> bool:
        return self.rank > 0

    def folder(self, work: Path) -> Path:
        """Return the folder for the files that belong to this process alone."""
        return work / f"peer-{self.rank}" if self.is_peer else work

    def wait_for_watch(self) -> None:
        """Wait until the watch has ended this process, if a peer that has ended is the cause of an error here."""
        if self.count > 1 and not self.is_peer:
            time.sleep(WATCH_S)

    def join(self, device: torch.device) -> Ranks:
        """Wait for the other processes, and return what they exchange things by."""
        import torch

        from requant.tasks.quantizing.loop.ranks import ALONE, Ranks

        if self.count == 1:
            return ALONE
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{self.rendezvous}",
            rank=self.rank,
            world_size=self.count,
            timeout=EXCHANGE_TIMEOUT,
        )
        return Ranks(self.rank, self.count, str(device))


def count_gpus(settings: Quantize, device: str) -> int:
    """Return on how many GPUs a job is done. On a CPU, it is the number of processes, and 1 unless asked for.

    Raises JobRefused if there are fewer GPUs.
    """
    if settings.fast is False or not settings.iters:  # There is nothing that our loop could share.
        return 1
    if device != "cuda":
        return 1 if settings.gpus == "auto" else settings.gpus
    import torch

    there = torch.cuda.device_count()
    if settings.gpus == "auto":
        return there
    if settings.gpus > there:
        raise JobRefused(f"quantize.gpus is {settings.gpus}, and this machine has {there}: lower it, or write auto")
    return settings.gpus


def start_peers(job: Path, work: Path, count: int, report: EventSink) -> Team:
    """Start the peers of this process, and watch them. Return this process's place among them."""
    team = Team(0, count, str(work / f"rendezvous-{uuid.uuid4().hex}"))
    peers = {rank: _start(job, work, Team(rank, count, team.rendezvous)) for rank in range(1, count)}
    threading.Thread(target=_watch, args=(peers, work, report), daemon=True).start()
    return team


def _start(job: Path, work: Path, team: Team) -> subprocess.Popen[bytes]:
    team.folder(work).mkdir(exist_ok=True)
    (team.folder(work) / "events.jsonl").unlink(missing_ok=True)
    words = [str(job), str(work), str(team.rank), str(team.count), team.rendezvous]
    command = [sys.executable, "-m", "requant.tasks.quantizing.child", *words]
    return subprocess.Popen(command, cwd=work, env=_environment(team.rank, os.environ), stdin=subprocess.PIPE)


def _environment(rank: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a peer, which sees one of the GPUs that this process sees."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else []
    return {**environment, "CUDA_VISIBLE_DEVICES": gpus[rank] if rank < len(gpus) else str(rank)}


def _watch(peers: Mapping[int, subprocess.Popen[bytes]], work: Path, report: EventSink) -> None:
    """Wait until all peers have ended. If one fails, end this process as it has ended."""
    codes: dict[int, int | None] = {}
    while not any(codes.values()):
        if codes and None not in codes.values():
            return
        time.sleep(POLL_INTERVAL_S)
        codes = {rank: peer.poll() for rank, peer in peers.items()}
    time.sleep(SETTLE_S)
    signals = [-code for peer in peers.values() if (code := peer.poll()) is not None and code < 0]
    if signals:
        os.kill(os.getpid(), signals[0])
    failures = []
    for rank in peers:
        _, events = read_events(Team(rank).folder(work) / "events.jsonl")
        failures += [event for event in events[-1:] if isinstance(event, Failed)]
    # Peers that have lost another one fail too. Which one ran out of memory decides what the next attempt changes.
    failures.sort(key=lambda failed: failed.kind not in OUT_OF_MEMORY)
    if failures:
        report(failures[0])
    os._exit(1)
