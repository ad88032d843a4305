"""What the pipeline makes with the real vLLM as its engine: made from tests/engines/pipeline.yaml."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.dev.hub.launch import HubStandIn
from tests.factories.paths import ROOT, TINY
from tests.factories.requant import merge

RECIPE = Path(__file__).parent / "pipeline.yaml"
BASE, TARGET = "demo/tiny-qwen3_5-mtp", "me/tiny-qwen3_5-mtp-int4-AutoRound"


@dataclass(frozen=True)
class Made:
    """A finished run: its result as a folder, its document, what it said, and the environment that reaches its Hub."""

    folder: Path
    document: dict[str, Any]
    stderr: str
    environment: dict[str, str]

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text()

    def snippets(self, language: str) -> list[str]:
        """The code of the card's section on serving, as printed."""
        section = self.card.split("## Serving\n")[1].split("\n## ")[0]
        return re.findall(rf"```{language}\n(.*?)\n```", section, re.DOTALL)


def engine_environment(vllm_python: str) -> dict[str, str]:
    """REQUANT_VLLM for the CPU build, and no settings of the user's own."""
    venv = Path(vllm_python).parent.parent
    return {
        **os.environ,
        "REQUANT_VLLM": f"{ROOT / 'infra' / 'dev' / 'engines' / 'serve'} {venv}",
        "OMP_NUM_THREADS": "1",
    }


def run_pipeline(folder: Path, hub: HubStandIn, vllm_python: str, **changes: Any) -> Made:
    """`requant run` against a Hub stand-in, published there; `changes` to the recipe."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merge(yaml.safe_load(RECIPE.read_text()), changes)))
    hub.seed(BASE, TINY)
    environment = {**engine_environment(vllm_python), **hub.env, "XDG_CACHE_HOME": str(folder / "cache")}
    environment["REQUANT_STORE"] = (folder / "store").as_uri()
    out = folder / "checkout"
    command = [sys.executable, "-m", "requant", "run", str(recipe), "--json", "--checkout", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return Made(out, json.loads(done.stdout), done.stderr, environment)
