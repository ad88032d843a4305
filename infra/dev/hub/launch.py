"""Start the Hub stand-in as a process, and control it.

with HubStandIn(tmp_path / "hub") as hub:
    base = hub.seed("Qwen/tiny", folder)
    hub.fault("resolve/.*safetensors", method="GET", cut_after_bytes=1000, times=2)
    HfApi(endpoint=hub.url, token=hub.token).model_info("Qwen/tiny", revision=base)
"""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

_CHECKOUT = Path(__file__).resolve().parents[3]
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 10.0


class Exchange(TypedDict):
    """A request to the stand-in, with the sizes of both bodies. `status` is 0 if there was no answer."""

    method: str
    path: str
    query: str
    status: int
    bytes_in: int
    bytes_out: int


class FaultOptions(TypedDict, total=False):
    """The fields of `infra.dev.hub.faults.Fault` but `path_regex`."""

    method: str | None
    times: int | None
    skip: int
    status: int | None
    retry_after: int | None
    delay: float
    bytes_per_second: int | None
    cut_after_bytes: int | None
    cut_request_after_bytes: int | None
    corrupt: bool
    hold_request: bool
    hold_after_bytes: int | None


class HubStandIn:
    """A process of the stand-in with its state in a folder. It ends with its parent process.

    `user` is the owner of `token` and of the namespace of that name. `tokens` are further tokens and their users. See
    `infra.dev.hub.hub.Limits` for the sizes.
    """

    def __init__(
        self,
        state: Path | str,
        *,
        user: str = "me",
        token: str = "hf_standin",
        tokens: Mapping[str, str] | None = None,
        multipart_over: int | None = None,
        part_size: int | None = None,
        tree_page: int | None = None,
    ) -> None:
        self.state = Path(state)
        self.user, self.token = user, token
        self.url = ""
        self.log = self.state / "server.log"
        self._tokens = {token: user, **(tokens or {})}
        self._limits = {
            "--multipart-over": multipart_over,
            "--part-size": part_size,
            "--tree-page": tree_page,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def env(self) -> dict[str, str]:
        """The variables that let a process take this for the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token}

    def start(self) -> None:
        """Start the process, and wait until it answers. Raises RuntimeError."""
        self.state.mkdir(parents=True, exist_ok=True)
        url_file = self.state / "url"
        url_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "infra.dev.hub", "--exit-with-stdin"]
        command += ["--state", str(self.state.resolve()), "--url-file", str(url_file.resolve())]
        for token, user in self._tokens.items():
            command += ["--token", f"{token}={user}"]
        for option, value in self._limits.items():
            if value is not None:
                command += [option, str(value)]
        search_path = os.pathsep.join(filter(None, [str(_CHECKOUT), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": search_path},
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not url_file.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._kill()
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"The Hub stand-in did not start; its log ends with:\n{tail}")
            time.sleep(0.02)
        self.url = url_file.read_text()

    def stop(self) -> None:
        """Let the process finish its requests, and stop it."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
        self._process = None

    def _kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None

    def seed(
        self,
        repo_id: str,
        folder: Path | str,
        *,
        message: str = "Seed",
        revision: str = "main",
        repo_type: str = "model",
        delete_missing: bool = False,
        headers_only: bool = False,
    ) -> str:
        """Commit a folder to a branch, unless it holds those files, and return the id of the branch's commit.

        With `headers_only`, only the headers of safetensors files are stored. Zeros are served behind them, and only
        to requests with a Range. See `infra.dev.hub.seeding.Seed` for the rest.
        """
        body = {
            "repo_id": repo_id,
            "folder": str(Path(folder).resolve()),
            "message": message,
            "revision": revision,
            "repo_type": repo_type,
            "delete_missing": delete_missing,
            "headers_only": headers_only,
        }
        commit: str = self._call("POST", "seed", body)["commit"]
        return commit

    def set_repo(
        self,
        repo_id: str,
        *,
        gated: bool | None = None,
        private: bool | None = None,
        repo_type: str = "model",
    ) -> None:
        """Change who may see a repository and read its files."""
        self._call("PUT", f"repos/{repo_id}", {"gated": gated, "private": private, "repo_type": repo_type})

    def set_xet(self, *, enabled: bool = True, cas_url: str | None = None, token_lifetime_s: int = 3600) -> None:
        """Switch Xet on or off, send clients to another storage, or let its tokens expire sooner."""
        self._call("PUT", "xet", {"enabled": enabled, "cas_url": cas_url, "token_lifetime_s": token_lifetime_s})

    def add_token(self, token: str, user: str, *, orgs: Sequence[str] = (), role: str = "write") -> None:
        """Make a token valid. `role` is `write` or `read`."""
        self._call("POST", "tokens", {"token": token, "user": user, "orgs": list(orgs), "role": role})

    def fault(self, path_regex: str = "", **options: Unpack[FaultOptions]) -> None:
        """Make coming requests fail, as `infra.dev.hub.faults.Fault` describes."""
        self._call("POST", "faults", {"path_regex": path_regex, **options})

    def clear_faults(self) -> None:
        """Remove all faults, and let the requests go on that they hold."""
        self._call("DELETE", "faults")

    def traffic(self) -> list[Exchange]:
        """Return all requests since the start or the last `reset_traffic`, oldest first."""
        exchanges: list[Exchange] = self._call("GET", "traffic")
        return exchanges

    def reset_traffic(self) -> None:
        self._call("DELETE", "traffic")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}/_standin/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            message = error.read().decode(errors="replace")
            raise RuntimeError(f"The Hub stand-in refused {method} {path}: {message}") from error
