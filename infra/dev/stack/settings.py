"""The ports and secrets of a stack, which are chosen once and stored in its folder."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from requant.tasks.artifact import digest_of
from requant.tasks.checkpoint.writer import write_file

PORTS = {"prefect": 4200, "hub": 4281, "postgres": 4232}  # other ports are chosen where these are taken


@dataclass(frozen=True)
class Settings:
    """The settings of the stack whose data is in `folder`."""

    folder: Path
    ports: dict[str, int]
    password: str
    hub_token: str

    @classmethod
    def of(cls, folder: Path) -> Settings:
        """Read the settings of the stack in this folder, or choose new ones if it has none."""
        folder = folder.resolve()
        path = folder / "stack.json"
        if not path.exists():
            made = cls(folder, {name: _port(port) for name, port in PORTS.items()}, secrets.token_hex(12), _token())
            folder.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o711)
            document = {**asdict(made), "folder": None}
            write_file(folder, path.name, [json.dumps(document, indent=1).encode()])
            path.chmod(0o600)
        return cls(**{**json.loads(path.read_text()), "folder": folder})

    @property
    def login(self) -> str:
        return f"requant:{self.password}"

    @property
    def ui(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}"

    @property
    def socket(self) -> Path:
        """The path of supervisord's socket. It is not below `folder`, as it may have only 108 characters."""
        return Path(tempfile.gettempdir()) / f"requant-{digest_of(str(self.folder))[:16]}.sock"

    def client(self) -> dict[str, str]:
        """Return the environment of the clients of this stack: workers, `requant`, `prefect`."""
        return {
            **self._s3(),
            "PREFECT_API_URL": f"{self.ui}/api",
            "PREFECT_API_AUTH_STRING": self.login,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            "PREFECT_CLIENT_MAX_RETRIES": "10",  # outlasts a restart of the server
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "DO_NOT_TRACK": "1",
            "HF_ENDPOINT": f"http://127.0.0.1:{self.ports['hub']}",
            "HF_TOKEN": self.hub_token,
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }

    def server(self) -> dict[str, str]:
        """Return the environment that the Prefect server needs in addition to that of the clients."""
        database = f"postgresql+asyncpg://requant:{self.password}@127.0.0.1:{self.ports['postgres']}/prefect"
        return {
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_API_AUTH_STRING": self.login,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "true",
        }

    def write_environment(self) -> Path:
        """Write FOLDER/env. After `. FOLDER/env`, the commands `requant` and `prefect` of a shell use this stack."""
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.client().items()]
        write_file(self.folder, "env", ["".join(lines).encode()])
        (self.folder / "env").chmod(0o600)
        return self.folder / "env"

    def _s3(self) -> dict[str, str]:
        """Return the variables of the S3 server, or none before its first start."""
        path = self.folder / "s3" / "env"
        if not path.exists():
            return {}
        pairs = (line.removeprefix("export ").split("=", 1) for line in path.read_text().splitlines() if "=" in line)
        return {name: "".join(shlex.split(value)) for name, value in pairs}


def _token() -> str:
    return f"hf_{secrets.token_hex(12)}"


def _port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port")
