"""The PostgreSQL server of a stack, from Debian's packages. As it refuses to run as root, it runs as `postgres`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from infra.dev.stack.settings import Settings

USER = "postgres"


def install() -> None:
    """Install Debian's package postgresql if it is missing. Raises RuntimeError without root or apt-get."""
    if (_binaries() / "initdb").exists():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise RuntimeError("PostgreSQL is missing, and only root can install it: apt-get install postgresql")
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "postgresql"]
    # RUNLEVEL=1 keeps the package from starting a service.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
        subprocess.run(["apt-get", "update", "-q"], stdout=subprocess.DEVNULL, check=True)
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


def create(settings: Settings) -> None:
    """Create the database cluster, if there is none. A failure leaves no incomplete cluster."""
    data = settings.folder / "postgres"
    if data.exists():
        return
    draft = settings.folder / "postgres.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    with tempfile.NamedTemporaryFile("w", dir=settings.folder, prefix=".password") as password:
        password.write(settings.password)
        password.flush()
        if os.geteuid() == 0:
            shutil.chown(draft, USER, USER)
            shutil.chown(password.name, USER)
        subprocess.run(
            [
                *as_user(), str(_binaries() / "initdb"), "-D", str(draft), "-U", "requant", "--encoding=UTF8",
                "--locale=C.UTF-8", "--auth=scram-sha-256", f"--pwfile={password.name}",
            ],
            check=True,
            cwd="/",
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    draft.rename(data)


def command(settings: Settings) -> list[str]:
    """Return the command that runs the server in the foreground, on loopback only."""
    options = {"listen_addresses": "127.0.0.1", "port": settings.ports["postgres"], "unix_socket_directories": ""}
    flags = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    return [*as_user(), str(_binaries() / "postgres"), "-D", str(settings.folder / "postgres"), *flags]


def run_sql(settings: Settings, sql: str, database: str = "postgres") -> str:
    """Return the answer to a statement. Raises CalledProcessError while the server does not answer."""
    address = f"postgresql://requant@127.0.0.1:{settings.ports['postgres']}/{database}"
    done = subprocess.run(
        [str(_binaries() / "psql"), "-AtXq", "-d", address, "-c", sql],
        env={**os.environ, "PGPASSWORD": settings.password, "PGCONNECT_TIMEOUT": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def as_user() -> list[str]:
    """Return the beginning of a command that runs a program as USER, if this process is root.

    The capability lets the program pass through folders that only root may enter.
    """
    if os.geteuid() != 0:
        return []
    capability = "+dac_override"
    return [
        "setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups", f"--inh-caps={capability}",
        f"--ambient-caps={capability}", "--",
    ]  # fmt: skip


def _binaries() -> Path:
    """Return the folder of PostgreSQL's programs. Debian installs them by version, outside of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else Path()
