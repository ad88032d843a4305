"""Real servers for the integration tests: Hub stand-in, Prefect, Ceph; and `requant` as a process."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from infra.dev.hub.launch import HubStandIn
from requant.flows import embedded
from tests.factories.forked import COMMANDS, forked_children, quantize_server
from tests.factories.paths import ROOT
from tests.factories.pico import pico_base
from tests.factories.releases import TARGET, Made, made
from tests.factories.requant import BUILTIN_TEXT, LAYERS, Outcome, Requant, recipe_for, store_in


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path_factory.mktemp("hub") / "state", user="me") as server:
        yield server


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One embedded server for all runs of the session: they use it through PREFECT_API_URL."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as server:
            # Tests ask for events, which a server of one run does not keep.
            server.delitem(embedded.SETTINGS, "PREFECT__SERVER_WEBSERVER_ONLY")
            server.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED", "false")
            server.setenv("PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED", "false")
            # The server otherwise keeps events for 5 s before it writes them down.
            server.setenv("PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL", "0.1")
            running.enter_context(embedded.embedded_prefect())
        yield os.environ["PREFECT_API_URL"]


@pytest.fixture(autouse=True)
def no_faults(hub: HubStandIn) -> Iterator[None]:
    yield
    hub.clear_faults()


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


@pytest.fixture(scope="session")
def environment(hub: HubStandIn, prefect_server: str) -> dict[str, str]:
    """The variables of every `requant`; what a command changes of them, it changes for itself."""
    variables = {**os.environ, **hub.env, "PREFECT_API_URL": prefect_server}
    COMMANDS.start(variables)
    return variables


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], base: Path
) -> tuple[Requant, Outcome]:
    """One undisturbed run, published to me/pico. Its store is copied by the tests that need a stage done."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = recipe_for("demo/pico", "me/pico", BUILTIN_TEXT)  # its published recipe holds for whoever has no file
    requant = Requant(folder, {**environment, **store_in(folder)}, recipe)
    outcome = requant.run("--checkout", str(folder / "checkout"))
    assert outcome.status == 0, outcome.stderr
    return requant, outcome


@pytest.fixture
def requant(tmp_path: Path, finished: tuple[Requant, Outcome]) -> Requant:
    """`requant` with a copy of the finished run's store."""
    return finished[0].copy(tmp_path)


@pytest.fixture(scope="session")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server; its variables, REQUANT_STORE among them. Without Ceph, the tests that need it are skipped."""
    if missing := [tool for tool in ("ceph-mon", "ceph-osd", "radosgw") if shutil.which(tool) is None]:
        pytest.skip(f"no {missing[0]}: install Ceph as root with infra/dev/s3/ceph install")
    folder = tmp_path_factory.mktemp("ceph") / "s3"
    script = str(ROOT / "infra" / "dev" / "s3" / "ceph")
    subprocess.run([script, "up", str(folder)], check=True, capture_output=True, timeout=120)
    try:
        lines = (folder / "env").read_text().splitlines()
        pairs = (line.removeprefix("export ").split("=", 1) for line in lines if "=" in line)
        yield {**{name: value.strip("'\"") for name, value in pairs}, "CEPH_FOLDER": str(folder)}
    finally:
        subprocess.run([script, "down", str(folder)], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")  # unit tests in the same process start children of their own
def quantize_forks() -> Iterator[None]:
    """Where a test calls the quantize stage itself, its child is a fork of a process that has imported auto-round."""
    with forked_children(quantize_server()):
        yield


@pytest.fixture
def hub_here(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is the Hub of this process too."""
    for name, value in hub.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def api(hub: HubStandIn) -> Iterator[HfApi]:
    """The real client. Deletes the released repository after the test."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    yield api
    api.delete_repo(TARGET, missing_ok=True)


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """Three releases of one base, ready to be published."""
    return [made(tmp_path_factory.mktemp("made") / str(seed), seed) for seed in (1, 2, 3)]
