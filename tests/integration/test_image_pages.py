"""The pages of the server's image: as its user, with its variables and folders, beside a package it cannot write to."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import prefect
import pytest

from requant.tasks.store import cache_folder
from tests.factories.paths import ROOT
from tests.factories.requant import stop, wait_for

DOCKERFILE = (ROOT / "infra" / "images" / "cpu.Dockerfile").read_text()
USER = int(re.findall(r"--uid (\d+)", DOCKERFILE)[0])
# Root's own home may be closed to the image's user, and the interpreter be in it: reading is allowed, writing is not.
AS_USER = [
    "setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
]  # fmt: skip


def variables(root: Path) -> dict[str, str]:
    """The variables that the image sets, with its folders below `root`."""
    pairs = [
        word.split("=", 1) for line in re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]
    return {name: f"{root}{value}" if value.startswith("/") else value for name, value in pairs}


def make_folders(root: Path) -> None:
    """Make the folders that the image makes for its user."""
    (command,) = re.findall(r"(install -d -o requant .*)$", DOCKERFILE, re.MULTILINE)
    for folder in shlex.split(command)[4:]:
        (root / folder.lstrip("/")).mkdir(parents=True)
        os.chown(root / folder.lstrip("/"), USER, USER)


@dataclass(frozen=True)
class Server:
    url: str
    log: Path

    def page(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"Accept": "text/html"}, follow_redirects=True, timeout=30)


@pytest.fixture(scope="module")
def running(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its database has the tables already, which take it seconds to make: those of the server of the other tests."""
    root = tmp_path_factory.mktemp("image")
    for folder in (root, *root.parents[:2]):
        folder.chmod(0o711)
    make_folders(root)
    home = Path(variables(root)["PREFECT_HOME"])
    (migrated,) = cache_folder().glob("prefect-*.db")
    home.mkdir()
    shutil.copyfile(migrated, home / "prefect.db")
    for path in (home, home / "prefect.db"):
        os.chown(path, USER, USER)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        "PATH": os.environ["PATH"],
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",  # where the pages in the browser ask
    }
    log = root / "server.log"
    unpacked = (prefect.__ui_static_subpath__, prefect.__ui_v2_static_subpath__)
    for folder in unpacked:
        folder.mkdir(exist_ok=True)
    # In the image no server has run as root before: what one has unpacked here is hidden from the server of the test.
    hide = "".join(f"mount -t tmpfs -o ro none {shlex.quote(str(folder))} && " for folder in unpacked)
    start = [*AS_USER, sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    command = ["unshare", "--mount", "sh", "-c", f"{hide} exec {shlex.join(start)}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, **variables(root)}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for(lambda: _answers(f"{url}/api/health"))
        yield Server(url, log)
    finally:
        stop(process)


@pytest.fixture
def server(as_root: None, request: pytest.FixtureRequest) -> Server:
    """The server, for root: only root may start a process as another user."""
    found: Server = request.getfixturevalue("running")
    return found


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_user_of_the_image_cannot_write_into_the_installed_package(as_root: None) -> None:
    package = Path(str(prefect.__file__)).parent / "server"
    assert subprocess.run([*AS_USER, "test", "-w", str(package)], check=False).returncode == 1


@pytest.mark.parametrize("path", ["/", "/dashboard", "/v2/dashboard"])
def test_both_interfaces_are_served(server: Server, path: str) -> None:
    page = server.page(path)
    assert page.status_code == 200, server.log.read_text()[-2000:]
    scripts = re.findall(r'<script[^>]* src="([^"]+)"', page.text)
    assert scripts and all(server.page(script).status_code == 200 for script in scripts)
    assert "will not be available" not in server.log.read_text()
