"""vLLM: started on a checkpoint, waited for, and ended. Its command is `vllm serve`, or what REQUANT_VLLM says."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from pydantic import JsonValue

from requant.tasks import hardware
from requant.tasks.environment import bypass_proxy_on_loopback
from requant.tasks.errors import EngineFailed, RecipeError
from requant.tasks.http import http_client
from requant.tasks.recipe.engine_flags import MODEL, arguments, server_address
from requant.tasks.serving.client import Server, api_key_header
from requant.tasks.serving.process import EngineProcess, free_port, run_engine
from requant.tasks.settings import read_settings

log = logging.getLogger(__name__)

VLLM_VARIABLE = "REQUANT_VLLM"
START_TIMEOUT_S = 3600.0  # vLLM may read 100s of GB and compile kernels; a start that fails ends sooner
EXIT_TIMEOUT_S = 20.0  # for vLLM to end after it has said that it failed
LOG_INTERVAL_S = 30.0
POLL_INTERVAL_S = 0.25
FAILURE_MESSAGE = b"Engine core initialization failed"
SERVED_MODEL_NAME = "benchmarked"


@dataclass
class RunningVllm:
    """A vLLM that is ready. `command` has MODEL in place of the checkpoint, and neither host nor port."""

    server: Server
    version: str
    command: list[str]
    _engine: EngineProcess
    _gpu_bytes_before: int | None  # in use when vLLM was started; None without a GPU
    peak_gpu_bytes: int | None = field(default=None)

    @property
    def hardware(self) -> str:
        """The GPUs by name, or the CPU."""
        return ", ".join(hardware.gpu_names()) or f"CPU, {hardware.machine().cpus} cores"

    def measure_memory(self) -> None:
        """Update the peak of GPU memory. Measuring at the end is enough: vLLM frees no memory while it runs."""
        if self._gpu_bytes_before is not None:
            guard = psutil.Process(self._engine.guard.pid)
            pids = {process.pid for process in guard.children(recursive=True)}
            held_bytes = hardware.held_bytes(pids, self._gpu_bytes_before)
            self.peak_gpu_bytes = max(self.peak_gpu_bytes or 0, held_bytes or 0)


def find_vllm() -> list[str] | None:
    """Return the words of the command that starts vLLM; None if there is no vLLM.

    Raises RecipeError if REQUANT_VLLM is not a command that can be run.
    """
    command = read_settings().vllm
    if command is None or not command.strip():
        path = shutil.which("vllm")
        return [path, "serve"] if path else None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise RecipeError(f"{VLLM_VARIABLE}={command!r} is no command ({error}): write it as in a shell") from error
    if shutil.which(words[0]) is None:
        raise RecipeError(
            f"{VLLM_VARIABLE} names the command {words[0]!r}, which does not exist or may not be run: "
            "correct or unset it"
        )
    return words


@contextlib.contextmanager
def serve_vllm(
    folder: Path, flags: Mapping[str, JsonValue], log_path: Path, *, chat: bool, remote_code: bool = False
) -> Iterator[RunningVllm]:
    """Serve the checkpoint in `folder` on a free port of the loopback interface, with the output in `log_path`.

    At the end of the block, vLLM and all its processes have ended. Raises RecipeError if there is no vLLM, EngineFailed
    with lines of its log if it does not start.
    """
    words = find_vllm()
    if words is None:
        raise RecipeError(f"there is no vllm on the PATH: install vLLM, or name its command in {VLLM_VARIABLE}")
    port, gpu_bytes_before = free_port(), hardware.used_bytes()
    model = [str(folder)] if words[-1] == "serve" else ["--model", str(folder)]
    asked = [*(["--trust-remote-code"] if remote_code else []), *arguments(flags)]
    ours = ["--served-model-name", SERVED_MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    # The checkpoint is on this disk: vLLM need not look anything up on the Hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    bypass_proxy_on_loopback(environment)  # the processes of vLLM talk to each other over the loopback interface
    log.info(f"starting vLLM {' '.join(shlex.quote(word) for word in asked)}".rstrip())
    with run_engine([*words, *model, *asked, *ours], log_path, environment) as engine:
        version = _wait_until_ready(engine, f"http://127.0.0.1:{port}")
        server = Server(f"http://127.0.0.1:{port}", SERVED_MODEL_NAME, chat, engine.failure)
        yield RunningVllm(server, version, ["vllm", "serve", MODEL, *asked], engine, gpu_bytes_before)


def _wait_until_ready(engine: EngineProcess, url: str) -> str:
    """Wait until the server is healthy, and return its version. Raises EngineFailed as soon as the start has failed."""
    began_s = logged_s = time.monotonic()
    failed_s: float | None = None
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as client:
        while True:
            now_s = time.monotonic()
            if engine.status is not None:
                raise engine.failure("vLLM did not start")
            if failed_s is None and FAILURE_MESSAGE in _read_end(engine.log):
                failed_s = now_s
            if failed_s is not None and now_s > failed_s + EXIT_TIMEOUT_S:
                raise engine.failure("vLLM said that it failed, and did not end")
            if now_s > began_s + START_TIMEOUT_S:
                raise engine.failure(f"vLLM was not ready after {START_TIMEOUT_S / 60:.0f} minutes")
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health").status_code == 200:
                    log.info(f"vLLM is ready after {now_s - began_s:.0f} s")
                    return _read_version(client)
            if now_s > logged_s + LOG_INTERVAL_S:
                logged_s = now_s
                log.info(f"waiting for vLLM for {now_s - began_s:.0f} s (its log: {engine.log})")
            time.sleep(POLL_INTERVAL_S)


def _read_version(client: httpx.Client) -> str:
    with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
        version = client.get("/version").json().get("version")
        if isinstance(version, str) and version.isprintable():
            return version[:40]
    return "unknown"


def _read_end(log: Path) -> bytes:
    """Read the last 64 KiB of a log; nothing if it cannot be read."""
    with contextlib.suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - (64 << 10)))
        return stream.read()
    return b""


def find_server(url: str, *, chat: bool) -> Server:
    """Find a server that is running already; of its models, the first is measured. Raises EngineFailed."""
    base = server_address(url)
    remedy = "name the address of a running server that speaks OpenAI's API, as in url:http://127.0.0.1:8000"
    try:
        with http_client(base, 10) as client:
            response = client.get(f"{base}/v1/models", headers=api_key_header())
        models = response.json()["data"] if response.status_code == 200 else []
        name = str(models[0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineFailed(f"{base} does not answer ({error or type(error).__name__}): {remedy}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise EngineFailed(f"{base}/v1/models names no model: {remedy}") from error
    return Server(base, name, chat)
