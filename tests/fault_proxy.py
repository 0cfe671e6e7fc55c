"""A proxy in front of an S3 server that spoils a known share of its answers, and counts them.

500         an internal error instead of the server's answer
503         SlowDown instead of it
reset       the connection is reset before the request reaches the server
lost        the server does what it is asked, and the connection is reset instead of its answer
half        the connection ends after half of the body
stall       half of the body, then silence until the client has lost its patience
flip        one bit of the body is another; its length is right

What has no body is neither halved nor flipped.
"""

import http.client
import random
import socket
import struct
from collections import Counter
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any

KINDS = ("500", "503", "reset", "lost", "half", "stall", "flip")
_CODES = {"500": "InternalError", "503": "SlowDown"}
_HOP_BY_HOP = ("connection", "expect", "transfer-encoding", "keep-alive")


class FaultProxy(ThreadingHTTPServer):
    """`with FaultProxy(endpoint, {"500": 0.1}) as proxy:` listens at `proxy.endpoint`.

    `rates`: share of the requests to spoil, by kind; may be changed while it runs. The first
    `num_spared` are left alone. `injected` counts what was spoiled, `num_requests` everything;
    `reads` has the path and range of each GET. One object is written at a time, since moto looks at
    a condition and then writes, without a lock for the two.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, upstream: str, rates: dict[str, float], num_spared: int = 0, seed: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream.removeprefix("http://")
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.rates, self.num_spared = rates, num_spared
        self.injected: Counter[str] = Counter()
        self.num_requests = 0
        self.reads: Counter[tuple[str, str]] = Counter()
        self.is_ending = Event()
        self._random = random.Random(seed)
        self._lock = Lock()
        self.writing = Lock()

    def draw(self) -> tuple[str, float]:
        """What to do to the next request ("" for nothing), and where: a number in [0, 1)."""
        with self._lock:
            self.num_requests += 1
            if self.num_requests <= self.num_spared:
                return "", 0.0
            weights = [*self.rates.values(), max(0.0, 1 - sum(self.rates.values()))]
            return self._random.choices([*self.rates, ""], weights)[0], self._random.random()

    def note(self, method: str, path: str, wanted: str) -> None:
        with self._lock:
            self.reads[path.rpartition("/")[2], wanted] += method == "GET"

    def count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # at once: an orderly shutdown would come before a reset

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that went away are what this is for

    def __enter__(self) -> "FaultProxy":
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_ending.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.note(self.command, self.path, self.headers.get("Range", ""))
        kind, where = self.server.draw()
        if kind in _CODES:
            self.server.count(kind)
            self._answer(int(kind), {}, f"<Error><Code>{_CODES[kind]}</Code></Error>".encode())
        elif kind in ("reset", "lost"):
            self.server.count(kind)
            if kind == "lost":
                self._forward(body)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            self._spoil(kind, where, *self._forward(body))

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        with self.server.writing if self.command == "PUT" else nullcontext():
            return self._answer_to(body)

    def _answer_to(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP}
        content = answer.read()
        connection.close()
        return answer.status, headers, content

    def _spoil(
        self, kind: str, where: float, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        if not kind or (not body and kind != "stall"):
            self._answer(status, headers, body)
            return
        self.server.count(kind)
        if kind == "flip":
            at = int(where * len(body))
            self._answer(status, headers, body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :])
            return
        self._answer(status, headers, body, num_sent=len(body) // 2)
        if kind == "stall":
            self.server.is_ending.wait(60)
        self.close_connection = True

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, num_sent: int | None = None
    ) -> None:
        self.send_response_only(status)
        lengths = {} if self.command == "HEAD" else {"Content-Length": str(len(body))}
        kept = {k: v for k, v in headers.items() if k.lower() != "content-length" or not lengths}
        for name, value in (kept | lengths).items():
            self.send_header(name, value)
        if num_sent is not None and not body:
            return  # nothing to stall in but the headers, which are not flushed
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[:num_sent])
        self.wfile.flush()
