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
from typing import Any

import httpx
import psutil

from requant.tasks import hardware
from requant.tasks.environment import bypass_proxy_on_loopback
from requant.tasks.errors import EngineFailed, RecipeError
from requant.tasks.http import http_client
from requant.tasks.recipe.engine_flags import MODEL, arguments
from requant.tasks.serving.client import Server, api_key_header
from requant.tasks.serving.process import Engine, free_port, running
from requant.tasks.settings import read_settings

log = logging.getLogger(__name__)

VARIABLE = "REQUANT_VLLM"
START_TIMEOUT_S = 3600.0  # seconds: reading 100s of GB and compiling take their time; a start that failed ends before
LINGER_S = 20.0  # seconds that vLLM may take to end after it has said that it failed
SAID_IT_FAILED = b"Engine core initialization failed"
SERVED_MODEL_NAME = "benchmarked"  # what the model is called while it is measured


@dataclass
class Running:
    """A vLLM that answers. `command` is what was run, with MODEL for the checkpoint and without host and port."""

    server: Server
    version: str
    command: list[str]
    _engine: Engine
    _before: int | None
    peak_gpu_bytes: int | None = field(default=None)

    def look_at_memory(self) -> None:
        """Note the GPU memory of its processes. vLLM gives none back while it runs."""
        if self._before is not None:
            guard = psutil.Process(self._engine.guard.pid)
            held = hardware.held_bytes({p.pid for p in guard.children(recursive=True)}, self._before)
            self.peak_gpu_bytes = max(self.peak_gpu_bytes or 0, held or 0)


def find() -> list[str] | None:
    """The words that start vLLM here, None where there is no vLLM."""
    named = read_settings().vllm
    if named is None or not named.strip():
        found = shutil.which("vllm")
        return [found, "serve"] if found else None
    try:
        words = shlex.split(named)
    except ValueError as error:
        raise RecipeError(f"{VARIABLE}={named!r} is no command ({error}): write it as in a shell") from error
    if shutil.which(words[0]) is None:
        raise RecipeError(
            f"{VARIABLE} names the command {words[0]!r}, which does not exist or may not be run: correct or unset it"
        )
    return words


@contextlib.contextmanager
def vllm(
    folder: Path,
    flags: Mapping[str, Any],
    log_path: Path,
    *,
    chat: bool,
    remote_code: bool = False,
) -> Iterator[Running]:
    """Serve `folder` on a free port of loopback; at the end of the block it has ended, with all its processes. What it
    writes goes into `log_path`.

    Raises RecipeError where there is no vLLM, EngineFailed with the telling lines of its log if it does not start.
    """
    words = find()
    if words is None:
        raise RecipeError(f"there is no vllm on the PATH: install vLLM, or name its command in {VARIABLE}")
    port, before = free_port(), hardware.used_bytes()
    model = [str(folder)] if words[-1] == "serve" else ["--model", str(folder)]
    asked = [*(["--trust-remote-code"] if remote_code else []), *arguments(flags)]
    ours = ["--served-model-name", SERVED_MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    # What is measured lies on this disk: nothing is looked up.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    bypass_proxy_on_loopback(environment)  # its processes talk to each other
    log.info(f"starting vLLM {' '.join(shlex.quote(word) for word in asked)}".rstrip())
    with running([*words, *model, *asked, *ours], log_path, environment) as engine:
        version = _wait(engine, f"http://127.0.0.1:{port}")
        server = Server(f"http://127.0.0.1:{port}", SERVED_MODEL_NAME, chat, engine.failure)
        yield Running(server, version, ["vllm", "serve", MODEL, *asked], engine, before)


def _wait(engine: Engine, url: str) -> str:
    """Wait until the server is healthy; its version. Raises EngineFailed as soon as it cannot become so."""
    began = told = time.monotonic()
    failed: float | None = None
    with httpx.Client(base_url=url, timeout=5, trust_env=False) as client:
        while True:
            now = time.monotonic()
            if engine.status is not None:
                raise engine.failure("vLLM did not start")
            if failed is None and SAID_IT_FAILED in _end_of(engine.log):
                failed = now
            if failed is not None and now > failed + LINGER_S:
                raise engine.failure("vLLM said that it failed, and did not end")
            if now > began + START_TIMEOUT_S:
                raise engine.failure(f"vLLM was not ready after {START_TIMEOUT_S / 60:.0f} minutes")
            with contextlib.suppress(httpx.HTTPError):
                if client.get("/health").status_code == 200:
                    log.info(f"vLLM is ready after {now - began:.0f} s")
                    return _version(client)
            if now > told + 30:
                told = now
                log.info(f"waiting for vLLM for {now - began:.0f} s (its log: {engine.log})")
            time.sleep(0.25)


def _version(client: httpx.Client) -> str:
    with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
        version = client.get("/version").json().get("version")
        if isinstance(version, str) and version.isprintable():
            return version[:40]
    return "unknown"


def _end_of(log: Path) -> bytes:
    with contextlib.suppress(OSError), log.open("rb") as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - (64 << 10)))
        return stream.read()
    return b""


def server_at(url: str, *, chat: bool) -> Server:
    """A server that runs already; its model is the first that it names. Raises EngineFailed."""
    base = url.rstrip("/").removesuffix("/v1")
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
