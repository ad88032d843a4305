"""A server that speaks OpenAI's API as vLLM does, without a model: two tokens a piece, three of four drafts accepted.

Probes are answered as by a good model, whose tokens are characters: stand_in_probes.py.

`python stand_in_engine.py --model DIR --port N [--die-with WORDS] [--never-ready] [--slow]`. It has a worker in a
session of its own, as engines have. Both write their process ids into the folder that ENGINE_PIDS names, and the server
makes a file `asked` there when it was asked for tokens. With --never-ready or --slow it does not listen to SIGTERM.

ENGINE_ACCEPTS is a JSON object with the keys `base` and `quantized`: the share of drafts that is accepted of a
checkpoint without and with a quantization config, or words to die with. Which drafts are accepted follows from the
prompts. It drafts one token a piece then, or none for a share of null.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from stand_in_probes import ProbedModel  # of the folder of this script, which runs by itself

PROBED: ProbedModel | None = None
COUNTS = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}
COUNTING = threading.Lock()
ACCEPTS = 0.75
DRAFTS = 4  # tokens a piece
SLOW = 0.0


def count(chance: random.Random) -> None:
    with COUNTING:
        COUNTS["drafts"] += bool(DRAFTS)
        COUNTS["draft_tokens"] += DRAFTS
        COUNTS["accepted_tokens"] += int(ACCEPTS * DRAFTS) if DRAFTS == 4 else DRAFTS and chance.random() < ACCEPTS


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answers: dict[str, str] = {
            "/health": "",
            "/version": json.dumps({"version": os.environ.get("ENGINE_VERSION", "0.0.1")}),
            "/v1/models": json.dumps({"data": [{"id": "stand-in"}]}),
            "/metrics": "".join(f'vllm:spec_decode_num_{k}_total{{engine="0"}} {v}\n' for k, v in COUNTS.items())
            + f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {COUNTS["drafts"]}\n',
        }
        self._send(200 if self.path in answers else 404, answers.get(self.path, "").encode())

    def do_POST(self) -> None:
        Path(os.environ["ENGINE_PIDS"], "asked").touch()
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if PROBED is not None and (answer := PROBED.answer(self.path, asked)) is not None:
            self._send(200, json.dumps(answer).encode())
            return
        if not asked.get("stream"):
            for prompt in asked["prompt"]:
                chance = random.Random(prompt)
                for _ in range(2, asked["max_tokens"] + 1, 2):
                    count(chance)
            tokens = len(asked["prompt"]) * (asked["max_tokens"] // 2 * 2)
            return self._send(200, json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode())
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        chat = self.path.endswith("chat/completions")
        if chat:  # the first piece says who speaks
            self._event(
                {"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": {"completion_tokens": 0}}
            )
        chance = random.Random(json.dumps([asked.get("prompt"), asked.get("messages")]))
        for made in range(2, asked["max_tokens"] + 1, 2):
            time.sleep(0.001 + SLOW)
            count(chance)
            choice: dict[str, Any] = {"delta": {"content": "x "}} if chat else {"text": "x "}
            self._event({"choices": [choice], "usage": {"completion_tokens": made}})
        self._event({"choices": [], "usage": {"completion_tokens": asked["max_tokens"] // 2 * 2}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, document: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(document)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def main() -> None:
    global SLOW, ACCEPTS, DRAFTS, PROBED
    parser = argparse.ArgumentParser()
    for name in ("--model", "--served-model-name", "--host", "--dtype", "--speculative-config", "--die-with"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--slow", action="store_true")
    asked = parser.parse_args()
    if (shares := json.loads(os.environ.get("ENGINE_ACCEPTS", "{}"))) and asked.model:
        config = json.loads(Path(asked.model, "config.json").read_text())
        share = shares["quantized" if "quantization_config" in config else "base"]
        if isinstance(share, str):
            sys.exit(share)
        ACCEPTS, DRAFTS = share or 0.0, int(share is not None and asked.speculative_config is not None)
    if asked.die_with:
        sys.exit(asked.die_with)
    SLOW = 0.5 if asked.slow else 0.0
    if asked.never_ready or asked.slow:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    PROBED = ProbedModel(Path(asked.model)) if asked.model else None
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    folder = Path(os.environ["ENGINE_PIDS"])
    for pid in (os.getpid(), worker.pid):
        (folder / str(pid)).touch()
    if asked.never_ready:
        time.sleep(600)
    ThreadingHTTPServer.request_queue_size = 256  # as many connections may wait
    ThreadingHTTPServer(("127.0.0.1", asked.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
