"""Measure a pass of `requant watch` over 1,000 bases on a Hub with a latency of 50 ms: `make bench`.

`requant watch --once` runs against the Hub stand-in: with nothing new, with some requests refused (429), and with every
base new, which starts runs on a Prefect server with PostgreSQL. Seconds and requests are printed, and written to
build/bench-watch.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from infra.dev.hub.hub import Hub
from infra.dev.hub.launch import HubStandIn
from infra.dev.hub.seeding import Seed, seed
from infra.dev.stack.__main__ import down, up
from infra.dev.stack.settings import Settings

ROOT = Path(__file__).parent.parent.parent
BASES, LATENCY_S = 1000, 0.05
REFUSALS, RETRY_AFTER_S = 20, 3


def main() -> None:
    """Measure all cases, and print and write the figures."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sys.stderr.write(f"seeding {BASES} repos\n")
        make_bases(root)
        with HubStandIn(root / "hub") as hub:
            os.environ.update(hub.env)
            known, empty = (root / "known").as_uri(), (root / "empty").as_uri()
            os.environ["REQUANT_STORE"] = known
            mark_all_done(root / "recipes")
            hub.fault(delay=LATENCY_S, times=None)
            figures["nothing new"] = one_pass(hub, root, {"REQUANT_STORE": known})
            hub.clear_faults()
            hub.fault("/api/models/", status=429, retry_after=RETRY_AFTER_S, times=REFUSALS, skip=300)
            hub.fault(delay=LATENCY_S, times=None)
            figures[f"{REFUSALS} refused, for {RETRY_AFTER_S} s"] = one_pass(hub, root, {"REQUANT_STORE": known})
            settings = up(root / "stack", say=lambda text: None)
            try:
                hold_workers(settings)
                served = {n: v for n, v in settings.client().items() if n.startswith("PREFECT_")}
                for name in ("all new", "all asked for already"):
                    figures[name] = one_pass(hub, root, {**served, "REQUANT_STORE": empty})
            finally:
                down(root / "stack")
    for name, row in figures.items():
        answers = ", ".join(f"{count} x {status}" for status, count in row["answers"].items())
        sys.stdout.write(f"{name:24} {row['seconds']:6.1f} s  {row['started']:5} started  Hub: {answers}\n")
    out = ROOT / "build" / "bench-watch.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(figures, indent=1))


def make_bases(root: Path) -> None:
    """Write BASES small repos into the state of the stand-in, and a recipe for each."""
    hub = Hub(root / "hub")
    (root / "recipes").mkdir()

    def make(number: int) -> None:
        content = root / "content" / str(number)
        content.mkdir(parents=True)
        for name in ("README.md", "config.json", "tokenizer.json", "model.safetensors"):
            (content / name).write_text(f"{name} of {number}")
        seed(hub, Seed(repo_id=f"bases/model-{number}", folder=content))
        (root / "recipes" / f"{number:04}.yaml").write_text(f"base: {{repo_id: bases/model-{number}}}\n")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make, range(BASES)))


def mark_all_done(recipes: Path) -> None:
    """Record in the store a finished run of every recipe."""
    from requant.flows.last_run import remember_run
    from requant.flows.watching import find_due, load_tracked  # imports the Hub client, which reads HF_ENDPOINT then
    from requant.tasks.hub.rate_limit import Pace
    from requant.tasks.store import open_store

    store = open_store()
    with Pace() as pace:
        due, problems, _ = find_due(store, load_tracked(recipes)[0], pace)
    assert len(due) == BASES, problems[:3]
    for tracked in due:
        remember_run(store, tracked.recipe, tracked.base, "published")


def one_pass(hub: HubStandIn, root: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run `requant watch --once`; return its wall-clock seconds, how many runs it started, and the Hub's answers."""
    hub.reset_traffic()
    command = [sys.executable, "-m", "requant", "watch", "--once", "--json", "--recipes", str(root / "recipes")]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, check=True, text=True, stdout=subprocess.PIPE
    )
    seconds = time.perf_counter() - began
    document = json.loads(done.stdout)
    assert document["checked"] == BASES and not document["problems"], document["problems"][:3]
    # Once a day huggingface_hub also asks for other things, such as the names of coding agents for its User-Agent.
    answers = Counter(str(request["status"]) for request in hub.traffic() if request["path"].startswith("/api/models/"))
    return {"seconds": round(seconds, 2), "started": len(document["started"]), "answers": dict(answers)}


def hold_workers(settings: Settings) -> None:
    """Pause the work pools, so that runs are created and no worker takes them."""
    for pool in ("cpu", "gpu"):
        url = f"{settings.ui}/api/work_pools/{pool}"
        httpx.patch(url, json={"is_paused": True}, auth=("requant", settings.password)).raise_for_status()


if __name__ == "__main__":
    main()
