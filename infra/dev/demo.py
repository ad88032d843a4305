"""`make demo`: the whole pipeline with the Hub stand-in, and a store in build/demo."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from infra.dev.hub.launch import HubStandIn

ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "demo"
NEXT = """
The Hub of this demo has ended, so its address leads nowhere. The model and its card are in build/demo/checkpoint.
Next: `requant init MODEL-or-FOLDER` writes a recipe for a model of your own (docs/getting-started.md)."""
RECIPE = ROOT / "deployments" / "recipes" / "demo.yaml"


def main() -> int:
    """Seed the stand-in with the tiny base, run the recipe, and write build/demo/report.json."""
    BUILD.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(BUILD / "checkpoint", ignore_errors=True)
    with HubStandIn(BUILD / "hub") as hub:
        hub.seed("demo/tiny-qwen3_5-mtp", ROOT / "infra" / "dev" / "models" / "tiny-qwen3_5-mtp")
        environment = {**os.environ, **hub.env, "REQUANT_STORE": (BUILD / "store").as_uri()}
        arguments = ["--checkout", str(BUILD / "checkpoint"), "--report", str(BUILD / "report.json")]
        command = [sys.executable, "-m", "requant", "run", str(RECIPE), *arguments]
        status = subprocess.run(command, env=environment, check=False).returncode
    if status == 0:
        print(NEXT)
    return status


if __name__ == "__main__":
    sys.exit(main())
