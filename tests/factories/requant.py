"""`requant` with a store, a recipe and an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from requant.tasks.artifact import Manifest
from requant.tasks.store.store import blob_key
from tests.factories.forked import forked, quantize_server
from tests.factories.forks import Fork
from tests.factories.paths import ROOT

LAYERS = 3
# Two windows of the 24 of a built-in text: a run measures its result and its base in 2 s and not in 6. It has 8
# characters for each token of a window, or the plan would count its tokens, in a process of its own.
SHORT_TEXT = str(ROOT / "tests" / "factories" / "evaluation.txt")
BUILTIN_TEXT = "builtin:python-evaluation"  # of the finished run, and of those that reuse what it measured
TIMEOUT_S = 300.0  # for a command


@dataclass(frozen=True)
class Outcome:
    """A finished `requant`."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stdout)
        return document

    @property
    def states(self) -> dict[str, str]:
        return {stage["name"]: stage["state"] for stage in self.document["stages"]}

    @property
    def digest(self) -> str:
        digest: str = self.document["artifact"]["digest"]
        return digest


@dataclass
class Requant:
    """Runs `requant` with a store, a recipe and an environment of its own."""

    folder: Path
    environment: dict[str, str]
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def variant(self, **environment: str) -> Requant:
        return Requant(self.folder, {**self.environment, **environment}, self.recipe)

    def copy(self, folder: Path) -> Requant:
        """The same with a store of its own in `folder`, which holds the same files."""
        shutil.copytree(self.store, folder / "store", copy_function=os.link)
        return Requant(folder, {**self.environment, **store_in(folder)}, self.recipe)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command in a new process, to be watched, disturbed or killed."""
        command = [sys.executable, "-m", "requant", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def fork(self, *arguments: str) -> Fork:
        """Start a command in a fork (see tests.factories.forks), to be watched, disturbed or killed as well."""
        return forked(["-m", "requant", *arguments], self.environment)

    def __call__(self, *arguments: str, new_process: bool = False) -> Outcome:
        """Run a command in a fork that has forks for quantize children, or in a new process."""
        if new_process:
            return finish(self.start(*arguments))
        with_children = ["-m", "tests.factories.forked", quantize_server(), "requant", *arguments]
        return finish(forked(with_children, self.environment))

    def run(self, *arguments: str, new_process: bool = False, **changes: Any) -> Outcome:
        return self("run", str(self.write_recipe(**changes)), "--json", *arguments, new_process=new_process)

    def start_run(self, *arguments: str, **changes: Any) -> subprocess.Popen[str]:
        return self.start("run", str(self.write_recipe(**changes)), "--json", *arguments)

    def fork_run(self, *arguments: str, **changes: Any) -> Fork:
        return self.fork("run", str(self.write_recipe(**changes)), "--json", *arguments)

    def write_recipe(self, **changes: Any) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(merge(self.recipe, changes)))
        return path

    def forget(self, *stages: str) -> None:
        """Take stages' manifests out of the local store, so that the next run makes them again."""
        for stage in stages:
            shutil.rmtree(self.store / "artifacts" / stage, ignore_errors=True)

    def forget_base(self) -> None:
        """Take the base out of the local store, so that the next run fetches it again; what was made of it stays."""
        for path in (self.store / "artifacts" / "download").iterdir():
            for file in Manifest.from_json(path.read_bytes()).files:
                if file.path.endswith(".safetensors"):
                    (self.store / blob_key(file.sha256)).unlink(missing_ok=True)
        self.forget("download")
        shutil.rmtree(self.store / "facts", ignore_errors=True)


def store_in(folder: Path) -> dict[str, str]:
    """The variable of a local store that lies in a folder."""
    return {"REQUANT_STORE": (folder / "store").as_uri()}


def merge(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(document)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def finish(process: subprocess.Popen[str] | Fork, timeout: float = TIMEOUT_S) -> Outcome:
    """Wait for the end of a command; one that takes longer is killed."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as late:
        process.kill()
        raise AssertionError(f"{late}: {late.stderr}") from late
    assert process.returncode is not None
    return Outcome(process.returncode, stdout, stderr)


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, and SIGKILL if it does not end by that."""
    process.terminate()
    try:
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def wait_for(
    condition: Callable[[], Any],
    seconds: float = 120,
    what: str = "it",
    *,
    pause: float = 0.005,
    process: subprocess.Popen[str] | Fork | None = None,
) -> Any:
    """Poll until the condition holds; its value. Fails at once if `process` ends before, with what it wrote.

    A condition that takes long to look at is looked at less often, so that what it waits for gets on.
    """
    started = time.monotonic()
    while True:
        ended = process is not None and process.poll() is not None  # before it is looked at for the last time
        asked = time.monotonic()
        if value := condition():
            return value
        now = time.monotonic()
        if process is not None and ended:
            said = finish(process)
            raise AssertionError(
                f"waited for {what}, and it ended with {said.status}: {said.stderr} {said.stdout[:500]}"
            )
        assert now < started + seconds, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(max(pause, 9 * (now - asked)))


def recipe_for(repo_id: str, target: str | None, text: str = SHORT_TEXT) -> dict[str, Any]:
    """A recipe that runs in seconds; random weights pass no quality gate, so none is asked for."""
    small = {"iters": 1, "nsamples": 4, "seqlen": 64, "batch_size": 4, "group_size": 32}
    quality = ("max_perplexity_increase", "max_kl_divergence", "min_top1_agreement", "min_mtp_acceptance_ratio")
    recipe: dict[str, Any] = {
        "base": {"repo_id": repo_id},
        "quantize": {**small, "calibration": "builtin:python"},  # no chats: no process that renders them
        "validation": {"text": text},
        "gates": dict.fromkeys(quality),
        "benchmark": {"engine": "none"},
    }
    return {**recipe, "publish": {"repo_id": target}} if target else recipe


def artifacts(api: str, key: str) -> list[dict[str, Any]]:
    body = {"artifacts": {"key": {"any_": [key]}}, "limit": 200}
    found: list[dict[str, Any]] = httpx.post(f"{api}/artifacts/filter", json=body).raise_for_status().json()
    return found
