"""Files from the Hub: a killed process's bytes are not fetched again, and no other host sees the token."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.dev.hub.launch import HubStandIn
from requant.tasks.download import download as fetch_all
from requant.tasks.hub.revision import resolve
from requant.tasks.store import open_store
from tests.factories.forked import forked
from tests.factories.forks import Fork
from tests.factories.paths import ROOT
from tests.factories.requant import wait_for

DOWNLOAD = """
import logging, sys
from requant.tasks.download import download
from requant.tasks.pipeline.log import set_up_logging
from requant.tasks.hub.revision import resolve
from requant.tasks.store import open_store
logging.getLogger("requant").addHandler(logging.StreamHandler(sys.stdout))
set_up_logging()
result = download(open_store(), resolve(sys.argv[1]))
print(result.provenance.document["bytes_moved"])
"""
SHARD = "model.safetensors"
SIZE = 6 << 20


@dataclass
class Download:
    """Downloads a repo of one large shard in a process of its own."""

    repo_id: str
    store: Path
    environment: dict[str, str]

    def start(self, before: str = "") -> Fork:
        return forked(["-c", before + DOWNLOAD, self.repo_id], self.variables)

    def start_new(self, **variables: str) -> subprocess.Popen[str]:
        """The same where a fork would not do: with variables that are read at import."""
        command = [sys.executable, "-c", DOWNLOAD, self.repo_id]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env={**self.variables, **variables}, **pipes)

    @property
    def variables(self) -> dict[str, str]:
        return {**self.environment, "REQUANT_STORE": self.store.as_uri()}

    def killed(self, hub: HubStandIn, before: str = "") -> int:
        """Kill a download of which half is sent and no more; the bytes that have arrived in the file."""
        hub.fault(f"/resolve/.*{SHARD}", method="GET", times=None, hold_after_bytes=SIZE // 2)
        process = self.start(before)
        wait_for(lambda: self.partial() >= SIZE // 3, process=process)
        process.kill()
        process.communicate()
        hub.clear_faults()
        return self.partial()

    def partial(self) -> int:
        return sum(path.stat().st_size for path in self.store.glob(f"work/download-*/{SHARD}"))


@pytest.fixture
def download(hub: HubStandIn, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> Download:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / SHARD).write_bytes(os.urandom(SIZE))
    repo_id = f"demo/{request.node.name[:40].replace('[', '-').strip(']')}"
    hub.seed(repo_id, folder)
    hub.reset_traffic()
    return Download(repo_id, tmp_path / "store", environment)


def sent(hub: HubStandIn) -> list[int]:
    return [e["bytes_out"] for e in hub.traffic() if SHARD in e["path"] and e["method"] == "GET"]


def assert_stored(download: Download, tmp_path: Path) -> None:
    sha256 = hashlib.sha256((tmp_path / "source" / SHARD).read_bytes()).hexdigest()
    blob = download.store / "blobs" / "sha256" / sha256[:2] / sha256
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == sha256


def test_a_killed_download_goes_on_in_the_middle_of_the_file(
    hub: HubStandIn, download: Download, tmp_path: Path
) -> None:
    left = download.killed(hub)
    hub.reset_traffic()
    output, errors = download.start().communicate(timeout=60)
    assert f"going on with {SHARD} after {left:,} of {SIZE:,} bytes" in output, errors
    assert sent(hub) == [SIZE - left]
    assert_stored(download, tmp_path)
    assert not list(download.store.glob("work/download-*"))  # nothing is left of it


def test_what_a_machine_without_power_left_is_thrown_away_when_it_is_wrong(
    hub: HubStandIn, download: Download, tmp_path: Path
) -> None:
    download.killed(hub)
    (path,) = download.store.glob(f"work/download-*/{SHARD}")
    path.write_bytes(bytes(path.stat().st_size))  # zeros, as a file system may leave
    process = download.start()
    assert "arrived altered" in process.communicate(timeout=60)[1] and process.returncode != 0
    assert not path.exists()
    download.start().communicate(timeout=60)
    assert_stored(download, tmp_path)


def test_what_arrives_can_be_written_by_no_other_user_whatever_the_umask(hub: HubStandIn, download: Download) -> None:
    download.killed(hub, before="import os; os.umask(0)\n")
    assert [path for path in download.store.rglob("*") if path.stat().st_mode & 0o002] == []


def test_a_link_planted_where_a_file_arrives_is_not_followed(
    hub: HubStandIn, download: Download, tmp_path: Path
) -> None:
    download.killed(hub)
    (arriving,) = download.store.glob(f"work/download-*/{SHARD}")
    (tmp_path / "mine").write_bytes(b"mine" * (SIZE // 2))
    arriving.unlink()
    arriving.symlink_to(tmp_path / "mine")
    process = download.start()
    assert f"{arriving} is a symbolic link" in process.communicate(timeout=60)[1] and process.returncode != 0
    assert (tmp_path / "mine").read_bytes() == b"mine" * (SIZE // 2)


@dataclass
class Redirecting:
    """A Hub that names another host for each file, as the real one does; both keep the headers that they were sent."""

    hub: HubStandIn
    seen: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"hub": [], "elsewhere": []})

    def serve(self, name: str, target: str) -> ThreadingHTTPServer:
        seen = self.seen[name]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append({name.lower(): value for name, value in self.headers.items()})
                self.send_response(302)
                self.send_header("Location", target + self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


@pytest.fixture
def redirecting(hub: HubStandIn) -> Iterator[tuple[Redirecting, str]]:
    both = Redirecting(hub)
    elsewhere = both.serve("elsewhere", hub.url)
    first = both.serve("hub", f"http://127.0.0.1:{elsewhere.server_address[1]}")
    try:
        yield both, f"http://127.0.0.1:{first.server_address[1]}"
    finally:
        for server in (first, elsewhere):
            server.shutdown()
            server.server_close()


def test_a_redirect_to_another_host_is_followed_without_the_token(
    hub: HubStandIn, download: Download, tmp_path: Path, redirecting: tuple[Redirecting, str]
) -> None:
    both, url = redirecting
    output, errors = download.start_new(HF_ENDPOINT=url).communicate(timeout=60)
    assert f"fetched {SHARD}" in output, errors
    assert all("hf_standin" in headers["authorization"] for headers in both.seen["hub"])
    assert both.seen["elsewhere"] and not any("authorization" in headers for headers in both.seen["elsewhere"])
    assert_stored(download, tmp_path)


def test_retry_after_is_waited_for(
    hub: HubStandIn, download: Download, tmp_path: Path, hub_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pauses are noted here instead of made."""
    pauses: list[float] = []
    monkeypatch.setattr("requant.tasks.hub.fetch.time", SimpleNamespace(sleep=pauses.append))
    hub.fault(f"/resolve/.*{SHARD}", method="GET", times=1, status=429, retry_after=30)
    fetch_all(open_store(download.store.as_uri()), resolve(download.repo_id))
    assert pauses == [30.0]
    assert_stored(download, tmp_path)
