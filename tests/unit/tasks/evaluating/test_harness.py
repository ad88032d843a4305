"""What lm-eval is told of an engine, and whose fault an error is. Integration has the real lm-eval, engines vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from requant.tasks.errors import EngineFailed, EvaluationFailed, HubUnavailable
from requant.tasks.evaluating.harness import Harness, harness_of_server
from requant.tasks.recipe.recipe import Eval
from requant.tasks.serving.client import Server
from tests.factories.pico import pico_base

ASKED = Eval(tasks=["gsm8k"], batch_size=16)


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (aiohttp.ServerDisconnectedError("gone"), EngineFailed, "^the engine failed$"),
        (TimeoutError(), EngineFailed, "^the engine failed$"),
        (ConnectionResetError("no Hub"), HubUnavailable, r"^lm-eval failed on gsm8k \(ConnectionResetError: no Hub\)$"),
        (KeyError("question"), EvaluationFailed, r"^lm-eval failed on gsm8k \(KeyError: 'question'\)$"),
    ],
)
def test_an_error_is_the_engines_the_hubs_or_the_tasks(
    raised: Exception, expected: type[Exception], words: str
) -> None:
    def engine_failure(error: Exception) -> EngineFailed | None:
        is_engines = isinstance(error, aiohttp.ClientError | TimeoutError)
        return EngineFailed("the engine failed") if is_engines else None

    with pytest.raises(expected, match=words), Harness(ASKED, None, "x 1", engine_failure)._errors():
        raise raised


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that says which models it has, and how long a request may be."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": self.server.models}).encode())  # type: ignore[attr-defined]

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.models = [{"id": "m", "max_model_len": 512}]  # type: ignore[attr-defined]
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{http.server_port}", "m", chat=False)
        http.shutdown()


def test_lm_eval_asks_as_many_at_once_as_the_recipe_says_and_gets_no_key_of_the_user(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'requant[eval]'")
    pytest.importorskip("tenacity", reason="lm-eval's client is not installed: pip install 'requant[eval]'")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    lm = harness_of_server(server, pico_base(tmp_path / "base"), ASKED, "vLLM 1", remote_code=False).lm
    assert (lm.model, lm._concurrent, lm.max_length) == ("m", 16, 511)  # one token is for the answer
    assert "secret" not in str(lm.header)


def test_a_server_that_does_not_say_how_long_a_request_may_be_is_refused(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'requant[eval]'")
    other = Server(server.url, "another", chat=False)
    with pytest.raises(EngineFailed, match="/v1/models does not say how long a request may be"):
        harness_of_server(other, tmp_path, ASKED, "vLLM 1", remote_code=False)
