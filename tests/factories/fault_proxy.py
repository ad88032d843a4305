"""An HTTP proxy between a client and one server that spoils requests on demand, at the level of the connection.

with FaultProxy("http://127.0.0.1:7480") as proxy:
    proxy.fault("reset", "PUT", "/bucket/key", after=1000)
    ... a client that takes proxy.url for the server ...

A fault is for the next `times` requests whose method and address match, and counts in `proxy.struck`. Bodies are held
in memory: it is for tests.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

KINDS = ("refuse", "reset", "stall", "500", "503", "403", "truncate", "flip", "twice", "lost")
CODES = {"500": "InternalError", "503": "SlowDown", "403": "ExpiredToken"}


@dataclass
class Fault:
    """What happens to a request.

    refuse: no answer, and no new connection for `seconds`.
    reset: RST after `after` bytes of the body, the request's if it has one, else the answer's.
    stall: nothing more for `seconds` after those.
    truncate: closed after those, with the right length announced.
    500, 503 SlowDown, 403 ExpiredToken: answered instead of the server.
    flip: one bit of the body is another.
    twice: the server gets the request twice, the client the second answer.
    lost: the server carries the request out, and the client gets RST for an answer.
    """

    kind: str
    method: str
    address: str
    times: int
    after: int
    seconds: float


class FaultProxy:
    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.struck: list[Fault] = []
        self._lock = threading.Lock()
        self._server = self._listen(0)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"proxy": self})
        server = _Server(("127.0.0.1", port), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault(
        self, kind: str, method: str, address: str, *, times: int = 1, after: int = 0, seconds: float = 1.0
    ) -> Fault:
        """Spoil the next `times` requests of `method` whose path and query `address` (a pattern) is found in."""
        assert kind in KINDS, kind
        fault = Fault(kind, method, address, times, after, seconds)
        with self._lock:
            self.faults.append(fault)
        return fault

    def take(self, method: str, address: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.address, unquote(address)):
                    fault.times -= 1
                    self.struck.append(fault)
                    return fault
        return None

    def away(self, seconds: float) -> None:
        """Refuse connections for a while."""
        with self._lock:
            self._server.shutdown()
            self._server.server_close()
            time.sleep(seconds)
            self._server = self._listen(self.port)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # connections end here in every way there is


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def _serve(self) -> None:
        fault = self.proxy.take(self.command, self.path)
        kind = fault.kind if fault else ""
        length = int(self.headers.get("Content-Length") or 0)
        has_body = length > 0 or "chunked" in self.headers.get("Transfer-Encoding", "")
        if fault and kind == "refuse":
            self._reset()
            threading.Thread(target=self.proxy.away, args=(fault.seconds,), daemon=True).start()
            return
        if fault and has_body and kind in {"reset", "stall", "truncate"}:
            self.rfile.read(min(fault.after, length))
            if kind == "truncate":
                self._forward(b"", cut=True)
            self._end(fault)
            return
        body = self._body(length)
        if kind in CODES:
            self._refuse(int(kind))
            return
        if kind == "flip" and has_body:
            body, kind = _flipped(body), ""
        if kind == "twice":
            self._forward(body)
        status, headers, answer = self._forward(body)
        if kind == "lost":
            self._reset()
            return
        if kind == "flip":
            answer = _flipped(answer)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if fault and kind in {"reset", "stall", "truncate"}:
            self.wfile.write(answer[: fault.after])
            self.wfile.flush()
            self._end(fault)
            return
        self.wfile.write(answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _body(self, length: int) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _forward(self, body: bytes, cut: bool = False) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            chunked = "Transfer-Encoding" in self.headers
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect", "transfer-encoding"}:
                    upstream.putheader(name, value)
            if chunked:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body)
            if cut:
                return 0, [], b""
            answer = upstream.getresponse()
            data = answer.read()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in {"connection", "transfer-encoding"}]
            if "chunked" in answer.getheader("Transfer-Encoding", ""):
                headers.append(("Content-Length", str(len(data))))
            return answer.status, headers, data
        finally:
            upstream.close()

    def _refuse(self, status: int) -> None:
        code = CODES[str(status)]
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>a fault</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _end(self, fault: Fault) -> None:
        if fault.kind == "stall":
            time.sleep(fault.seconds)
        if fault.kind != "truncate":
            self._reset()
        self.close_connection = True

    def _reset(self) -> None:
        """Close with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
