"""Run a command with a Hub stand-in that has the bases of all recipes: `python -m infra.dev.plan COMMAND...`.

Of the base with 27 billion parameters it has only headers, which are made from the dimensions.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from infra.bench.shapes import TINY, write_base
from infra.dev.example_bases import EXAMPLE_BASES, write_example_base
from infra.dev.hub.launch import HubStandIn

TEXTS = Path(__file__).parent.parent.parent / "tasks" / "texts" / "builtin"


def seed_bases(hub: HubStandIn, folder: Path) -> None:
    """Seed the bases and texts that deployments/recipes and examples name."""
    hub.seed("demo/tiny-qwen3_5-mtp", TINY)
    hub.seed("Qwen/Qwen3.6-27B", write_base(folder / "27b", data=False), headers_only=True)
    for number, base in enumerate(EXAMPLE_BASES):
        hub.seed(base.repo_id, write_example_base(base, folder / f"example-{number}"), headers_only=True)
        if base.gated:
            hub.set_repo(base.repo_id, gated=True)
            hub.add_token(hub.token, hub.user, orgs=[base.repo_id.partition("/")[0]])  # has accepted its terms
    (folder / "texts").mkdir()
    (folder / "texts" / "train.txt").write_bytes((TEXTS / "python.txt").read_bytes()[:10_000])
    hub.seed("NeelNanda/pile-10k", folder / "texts", repo_type="dataset")


def main(command: list[str]) -> int:
    with TemporaryDirectory(prefix="requant-plan-") as temporary, HubStandIn(Path(temporary) / "hub") as hub:
        seed_bases(hub, Path(temporary))
        store = {"REQUANT_STORE": (Path(temporary) / "store").as_uri()}
        return subprocess.run(command, env={**os.environ, **hub.env, **store}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
