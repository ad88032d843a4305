"""An embedded Prefect server for this process alone, on loopback, with a temporary database.

Prefect's own ephemeral server survives a SIGKILL of its parent, gives up after 20 s on a busy machine, and two of them
fight over one SQLite file. This server ends when its standard input is closed, and shares nothing with others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from requant.startup import collect_garbage_rarely, turn_off_telemetry
from requant.tasks.environment import bypass_proxy_on_loopback, with_package
from requant.tasks.errors import RequantError
from requant.tasks.http import CLIENT_ERRORS, http_client, no_client
from requant.tasks.store import cache_folder
from requant.tasks.versions import installed_version

START_TIMEOUT_S = 180.0
SETTINGS = {
    "PREFECT_LOGGING_SERVER_LEVEL": "ERROR",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_UI_ENABLED": "false",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",  # Every client would ask for a token that the server has not.
    # Nothing is scheduled here, nobody reads events, and no block of Prefect's is used.
    "PREFECT__SERVER_WEBSERVER_ONLY": "true",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_MEMOIZE_BLOCK_AUTO_REGISTRATION": "false",
    "PREFECT_CLI_COLORS": "false",
}


def check_server(url: str) -> None:
    """Raise RequantError if no Prefect server answers at this address. Prefect's client would retry for minutes."""
    try:
        with http_client(url, 10) as client:
            answer = client.get(f"{url.rstrip('/')}/health")
        healthy = answer.text == "true"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequantError(f"PREFECT_API_URL {url} does not answer ({error}): start that server or unset it") from error
    if not healthy:
        raise RequantError(
            f"PREFECT_API_URL {url} answers {answer.status_code}, not as the API of a healthy Prefect server: "
            "name one, as in http://127.0.0.1:4200/api"
        )


@contextlib.contextmanager
def embedded_prefect() -> Iterator[None]:
    """Run an embedded server for the flows of this process, unless PREFECT_API_URL names a server.

    Enter it before Prefect is imported, which reads its settings at import.
    """
    bypass_proxy_on_loopback(os.environ)
    turn_off_telemetry(os.environ)
    if url := os.environ.get("PREFECT_API_URL"):
        check_server(url)
        yield
        return
    try:
        httpx.Client().close()  # Prefect makes one too, and would fail with a traceback of hundreds of lines.
    except CLIENT_ERRORS as error:
        raise RequantError(no_client(error, "the embedded Prefect server")) from error
    home = Path(tempfile.mkdtemp(prefix="requant-prefect-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    database, migrated = home / "prefect.db", cache_folder() / f"prefect-{installed_version('prefect')}.db"
    if migrated.exists():  # Creating the tables takes 8 s.
        shutil.copyfile(migrated, database)
    environment = {**os.environ, **SETTINGS, "PREFECT_HOME": str(home)}
    with (home / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "requant.flows.embedded", str(port)],
            cwd=home,  # The working folder may have modules that hide others.
            env={
                **with_package(environment),
                "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database}",
            },
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        os.environ.update(SETTINGS, PREFECT_HOME=str(home), PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO")
        from prefect import settings  # This import takes as long as the start of the server.

        _wait(server, port, home)
        if not migrated.exists():
            with contextlib.suppress(OSError, sqlite3.Error):  # The copy only saves time.
                _save_migrated(database, migrated)
        # Nobody waits for heartbeats, and a run would wait up to a second for the end of the thread that sends them.
        with settings.temporary_settings({settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        server.kill()
        server.wait()
        shutil.rmtree(home, ignore_errors=True)


def _save_migrated(database: Path, migrated: Path) -> None:
    """Save a copy of the new database for the next start."""
    migrated.parent.mkdir(parents=True, exist_ok=True)
    temporary = migrated.with_name(f"{migrated.name}.{os.getpid()}")
    try:
        with (
            contextlib.closing(sqlite3.connect(database)) as source,
            contextlib.closing(sqlite3.connect(temporary)) as copy,
        ):
            source.backup(copy)
        os.replace(temporary, migrated)
    finally:
        temporary.unlink(missing_ok=True)


def _wait(server: subprocess.Popen[bytes], port: int, home: Path) -> None:
    """Wait until the server answers. Raises RequantError if it does not start."""
    deadline = time.monotonic() + START_TIMEOUT_S
    url = f"http://127.0.0.1:{port}/api/health"
    with http_client(url, 5) as client:
        while time.monotonic() < deadline and server.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(url).status_code == 200:
                    return
            time.sleep(0.1)
    last = (home / "server.log").read_text(errors="replace").strip().splitlines()[-1:]
    why = " ".join(last) or f"it did not answer within {START_TIMEOUT_S:.0f} s, and its log is empty"
    raise RequantError(f"the embedded Prefect server did not start ({why}): set PREFECT_API_URL to a server")


def _serve(port: int) -> None:
    """Run the server, in its own process, until standard input is closed."""
    threading.Thread(target=_end_with_parent, args=(os.environ["PREFECT_HOME"],), daemon=True).start()
    collect_garbage_rarely()
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(), host="127.0.0.1", port=port, log_level="error")


def _end_with_parent(home: str) -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    shutil.rmtree(home, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
