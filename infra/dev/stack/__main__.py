"""Start, stop or show a stack: `python -m infra.dev.stack up | down | status [--folder DIR] [--gpus N]`."""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from infra.dev.stack import postgres
from infra.dev.stack.services import ROOT, Supervisor, services
from infra.dev.stack.settings import Settings
from requant.tasks.environment import bypass_proxy_on_loopback

START_TIMEOUT_S = 180.0  # for one service
CEPH = ROOT / "infra" / "dev" / "s3" / "ceph"


def up(folder: Path, gpus: int = 1, say: Callable[[str], None] = print) -> Settings:
    """Start the services that are not running, in their order. Raises RuntimeError or CalledProcessError."""
    settings = Settings.of(folder)
    postgres.install()
    say("S3 server (Ceph)")
    subprocess.run([CEPH, "install"], check=True)
    subprocess.run([CEPH, "up", str(settings.folder / "s3")], check=True, stdout=subprocess.DEVNULL)
    postgres.create(settings)
    programs = services(settings, gpus)
    supervisor = Supervisor(settings)
    supervisor.start(programs)
    ready: dict[str, Callable[[], object]] = {
        "postgres": lambda: _create_database(settings),
        "hub": lambda: httpx.get(f"{settings.client()['HF_ENDPOINT']}/api/models/demo/none", timeout=5),
        "prefect-server": lambda: httpx.get(f"{settings.ui}/api/health", timeout=5).raise_for_status(),
    }
    for service in programs:
        if service.name.startswith("worker-cpu"):
            say("deployments")
            deploy(settings)
        say(service.name)
        supervisor.start_service(service.name)
        if service.name in ready:
            _wait(ready[service.name], functools.partial(supervisor.read_log_end, service.name))
    environment = settings.write_environment()
    say(f"Prefect: {settings.ui} (log in with {settings.login})\nfor a shell: . {environment}")
    return settings


def deploy(settings: Settings) -> None:
    subprocess.run(
        [sys.executable, "-m", "requant", "deploy", str(ROOT / "deployments")],
        env={**os.environ, **settings.client()},
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def down(folder: Path) -> None:
    """End the processes of this stack. Its data stays."""
    settings = Settings.of(folder)
    Supervisor(settings).stop()
    if (settings.folder / "s3").exists():
        subprocess.run([CEPH, "down", str(settings.folder / "s3")], check=True)


def _create_database(settings: Settings) -> None:
    if postgres.run_sql(settings, "select 1 from pg_database where datname = 'prefect'") != "1":
        postgres.run_sql(settings, "create database prefect")


def _wait(ready: Callable[[], object], read_log_end: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            ready()
            return
        except (httpx.HTTPError, subprocess.CalledProcessError) as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"it does not answer ({error}): {read_log_end()}") from error
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.dev.stack", description=__doc__)
    parser.add_argument("action", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "stack")
    parser.add_argument("--gpus", type=int, default=1, help="workers of the gpu pool: one for each GPU")
    arguments = parser.parse_args()
    bypass_proxy_on_loopback(os.environ)
    try:
        if arguments.action == "up":
            up(arguments.folder, arguments.gpus)
        elif arguments.action == "down":
            down(arguments.folder)
        else:
            print(Supervisor(Settings.of(arguments.folder)).status(), end="")
    except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
        print(f"stack: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
