"""Real servers for the integration tests: Hub stand-in, Prefect, Ceph; and `requant` as a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants

from flows.embedded import embedded_prefect
from infra.hub.launch import HubStandIn
from tests.pico import pico_base
from tests.releases import TARGET, Made, made

ROOT = Path(__file__).parent.parent.parent
LAYERS = 3


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path_factory.mktemp("hub") / "state", user="me") as server:
        yield server


@pytest.fixture(autouse=True)
def no_faults(hub: HubStandIn) -> Iterator[None]:
    yield
    hub.clear_faults()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One embedded server for all runs of the session: they use it through PREFECT_API_URL."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    with embedded_prefect():
        yield os.environ["PREFECT_API_URL"]


@pytest.fixture(scope="session")
def prefect_home(prefect_server: str) -> Path:
    """Where the server keeps its database and its log."""
    return Path(os.environ["PREFECT_HOME"])


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, hub: HubStandIn) -> Path:
    """A pico base, seeded as demo/pico."""
    folder = pico_base(tmp_path_factory.mktemp("base") / "pico", layers=LAYERS)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# pico\n")
    hub.seed("demo/pico", folder)
    return folder


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

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(self, *arguments: str) -> Outcome:
        return finish(self.start(*arguments))

    def run(self, *arguments: str, **changes: Any) -> Outcome:
        return self("run", str(self.write_recipe(**changes)), "--json", *arguments)

    def start_run(self, *arguments: str, **changes: Any) -> subprocess.Popen[str]:
        return self.start("run", str(self.write_recipe(**changes)), "--json", *arguments)

    def write_recipe(self, **changes: Any) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(merge(self.recipe, changes)))
        return path

    def forget(self, *stages: str) -> None:
        """Take stages' manifests out of the local store, so that the next run makes them again."""
        for stage in stages:
            shutil.rmtree(self.store / "artifacts" / stage, ignore_errors=True)


def merge(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(document)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def finish(process: subprocess.Popen[str], timeout: float = 300) -> Outcome:
    stdout, stderr = process.communicate(timeout=timeout)
    return Outcome(process.returncode, stdout, stderr)


def wait_for(condition: Callable[[], Any], seconds: float = 120, pause: float = 0.005) -> Any:
    """Poll until the condition holds; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(pause)
    raise AssertionError("waited in vain")


def recipe_for(repo_id: str, target: str | None) -> dict[str, Any]:
    """A recipe that runs in seconds; random weights pass no quality gate, so none is asked for."""
    small = {"iters": 1, "nsamples": 4, "seqlen": 64, "batch_size": 4, "group_size": 32}
    quality = ("max_perplexity_increase", "max_kl_divergence", "min_top1_agreement", "min_mtp_acceptance_ratio")
    recipe: dict[str, Any] = {
        "base": {"repo_id": repo_id},
        "quantize": {**small, "calibration": "builtin:python"},  # no chats: no process that renders them
        "validation": {"text": "builtin:python-evaluation"},
        "gates": dict.fromkeys(quality),
        "benchmark": {"engine": "none"},
    }
    return {**recipe, "publish": {"repo_id": target}} if target else recipe


@pytest.fixture(scope="session")
def environment(hub: HubStandIn, prefect_server: str) -> dict[str, str]:
    return {**os.environ, **hub.env, "PREFECT_API_URL": prefect_server, "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], base: Path
) -> tuple[Requant, Outcome]:
    """One undisturbed run, published to me/pico. Its store is copied by the tests that need a stage done."""
    folder = tmp_path_factory.mktemp("finished")
    store = {"REQUANT_STORE": (folder / "store").as_uri()}
    requant = Requant(folder, {**environment, **store}, recipe_for("demo/pico", "me/pico"))
    outcome = requant.run("--checkout", str(folder / "checkout"))
    assert outcome.status == 0, outcome.stderr
    return requant, outcome


@pytest.fixture
def requant(tmp_path: Path, finished: tuple[Requant, Outcome]) -> Requant:
    """`requant` with a copy of the finished run's store."""
    done, _ = finished
    shutil.copytree(done.store, tmp_path / "store", copy_function=os.link)
    store = {"REQUANT_STORE": (tmp_path / "store").as_uri()}
    return Requant(tmp_path, {**done.environment, **store}, done.recipe)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server; its variables, REQUANT_STORE among them."""
    folder = tmp_path_factory.mktemp("ceph") / "s3"
    script = str(ROOT / "infra" / "s3" / "ceph")
    subprocess.run([script, "up", str(folder)], check=True, capture_output=True, timeout=120)
    try:
        lines = (folder / "env").read_text().splitlines()
        pairs = (line.removeprefix("export ").split("=", 1) for line in lines if "=" in line)
        yield {**{name: value.strip("'\"") for name, value in pairs}, "CEPH_FOLDER": str(folder)}
    finally:
        subprocess.run([script, "down", str(folder)], check=True, capture_output=True, timeout=60)


@pytest.fixture
def hub_here(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is the Hub of this process too."""
    for name, value in hub.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def api(hub: HubStandIn) -> Iterator[HfApi]:
    """The real client; what a test released is gone behind it."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    yield api
    api.delete_repo(TARGET, missing_ok=True)


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """Three releases of one base, ready to be published."""
    return [made(tmp_path_factory.mktemp("made") / str(seed), seed) for seed in (1, 2, 3)]
