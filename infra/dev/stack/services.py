"""The services of a stack. supervisord (supervisord.org) restarts those that end."""

from __future__ import annotations

import configparser
import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.dev.stack import postgres
from infra.dev.stack.settings import Settings
from requant.tasks.checkpoint.writer import write_file
from requant.tasks.environment import bypass_proxy_on_loopback, with_package

ROOT = Path(__file__).resolve().parents[3]
STOP_TIMEOUT_S = 180.0
DEMO = ("demo/tiny-qwen3_5-mtp", ROOT / "infra" / "dev" / "models" / "tiny-qwen3_5-mtp")


@dataclass(frozen=True)
class Service:
    """One process. It is killed if it has not ended `stop_timeout_s` seconds after the signal."""

    name: str
    command: list[str]
    stop_timeout_s: int = 30
    signal: str = "TERM"


def services(settings: Settings, gpus: int = 1) -> list[Service]:
    """Return all services, in the order of their start. A worker of the gpu pool has one GPU, and one run at a time."""
    python, ports = sys.executable, settings.ports
    hub = [
        python, "-m", "infra.dev.hub", "--state", str(settings.folder / "hub"), "--port", str(ports["hub"]),
        "--token", f"{settings.hub_token}=me", "--seed", f"{DEMO[0]}={DEMO[1]}",
    ]  # fmt: skip
    server = [python, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(ports["prefect"])]
    return [
        Service("postgres", postgres.command(settings), signal="INT"),  # PostgreSQL's fast shutdown
        Service("hub", hub),
        Service("prefect-server", server),
        Service("worker-cpu", worker("cpu", "cpu", limit=4)),
        *(
            Service(f"worker-gpu-{index}", ["env", f"CUDA_VISIBLE_DEVICES={index}", *worker("gpu", f"gpu-{index}", 1)])
            for index in range(gpus)
        ),
    ]


def worker(pool: str, name: str, limit: int) -> list[str]:
    python = sys.executable
    return [python, "-m", "requant", "worker", "--pool", pool, "--name", name, "--limit", str(limit)]


class Supervisor:
    """The supervisord of one stack. Services inherit secrets from its environment. Its files have none."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.path = settings.folder / "supervisord.conf"

    def start(self, programs: list[Service]) -> None:
        """Start supervisord without services. If it is running already, its services go on."""
        write_file(self.settings.folder, self.path.name, [configuration(self.settings, programs).encode()])
        (self.settings.folder / "log").mkdir(exist_ok=True)
        if self.running():
            return
        environment = with_package({**os.environ, **self.settings.client(), **self.settings.server()})
        bypass_proxy_on_loopback(environment)
        subprocess.run([_bin("supervisord"), "-c", str(self.path)], env=environment, check=True, cwd=ROOT)

    def running(self) -> bool:
        return self.ask("pid").returncode == 0

    def start_service(self, name: str) -> None:
        done = self.ask("start", name)
        if done.returncode and "already started" not in done.stdout:
            raise RuntimeError(f"{name} did not start: {self.read_log_end(name)}")

    def status(self) -> str:
        return self.ask("status").stdout

    def pid(self, name: str) -> int:
        return int(self.ask("pid", name).stdout)

    def stop(self) -> None:
        """End every service, last started first, then supervisord, and wait for it. Raises psutil.TimeoutExpired."""
        if self.running():
            process = psutil.Process(int(self.ask("pid").stdout))
            self.ask("shutdown")
            process.wait(STOP_TIMEOUT_S)

    def read_log_end(self, name: str) -> str:
        """Return the last 60 words of the log of a service."""
        log = self.settings.folder / "log" / f"{name}.log"
        return " ".join(log.read_text(errors="replace").split()[-60:]) if log.exists() else "it wrote no log"

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of supervisorctl, such as `pid NAME`."""
        command = [_bin("supervisorctl"), "-c", str(self.path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def configuration(settings: Settings, programs: list[Service]) -> str:
    """Return the content of supervisord.conf, where each percent sign must be doubled."""
    parser = configparser.RawConfigParser()
    log = settings.folder / "log"
    address = str(settings.socket)
    sections: dict[str, dict[str, str]] = {
        "unix_http_server": {"file": address, "chmod": "0700"},
        "supervisord": {
            "logfile": str(settings.folder / "supervisord.log"),
            "pidfile": str(settings.folder / "supervisord.pid"),
            "childlogdir": str(settings.folder),
        },
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
        "supervisorctl": {"serverurl": f"unix://{address}"},
    }
    for priority, service in enumerate(programs):
        sections[f"program:{service.name}"] = {
            "command": shlex.join(service.command),
            "directory": str(ROOT),
            "priority": str(priority),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": "1",
            "startretries": "100",
            "stopsignal": service.signal,
            "stopwaitsecs": str(service.stop_timeout_s),
            "stopasgroup": "false",
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": str(log / f"{service.name}.log"),
            "stdout_logfile_maxbytes": "10MB",
            "stdout_logfile_backups": "2",
        }
    for name, values in sections.items():
        parser[name] = {key: value.replace("%", "%%") for key, value in values.items()}
    text = io.StringIO()
    parser.write(text)
    return text.getvalue()


def _bin(name: str) -> str:
    return str(Path(sys.executable).parent / name)
