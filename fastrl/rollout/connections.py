"""JSON requests to one HTTP server from several threads, with a limit on time and on attempts."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from fastrl.errors import InputError

AGAIN = (408, 429)
"""Client errors that may be gone at the next attempt; server errors always may."""
LONGEST_PAUSE_SECONDS = 30.0
CONNECT_SECONDS = 10.0
CHUNK_BYTES = 1 << 16


class Connections:
    """Sends requests until it is closed, which ends those on their way in other threads."""

    def __init__(self, url: str, *, timeout_s: float, num_retries: int) -> None:
        """timeout_s: of one attempt, from connecting to the last byte."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"rollout.engine_args.url must be like http://localhost:8000, got {url!r}"
            )
        try:
            self._address = (parts.hostname, parts.port)
        except ValueError as error:
            raise InputError(f"rollout.engine_args.url has no valid port: {url!r}") from error
        self.url = url
        self._kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._timeout_s = timeout_s
        self._num_retries = num_retries
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON value that the server answers to a body sent to `path`, like /v1/completions."""
        payload = json.dumps(body).encode()
        problem = ""
        for attempt in range(self._num_retries + 1):
            if attempt > 0:
                self._closed.wait(min(2.0 ** (attempt - 1), LONGEST_PAUSE_SECONDS))
            if self._closed.is_set():
                break
            try:
                status, answer = self._once(self._prefix + path, payload)
            except TimeoutError:
                problem = f"it took longer than timeout_s = {self._timeout_s:g}"
                continue
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return self._parsed(answer)
            problem = f"status {status}: {' '.join(answer.decode(errors='replace').split())[:500]}"
            if status < 500 and status not in AGAIN:
                raise InputError(f"the server at {self.url} refuses a request with {problem}")
        raise InputError(
            f"no answer from the server at {self.url} in {self._num_retries + 1} attempts, "
            f"{problem}"
        )

    def close(self) -> None:
        """End all requests; those under way raise in their threads."""
        self._closed.set()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):  # it may have ended just now
                    sock.shutdown(socket.SHUT_RDWR)

    def _once(self, path: str, payload: bytes) -> tuple[int, bytes]:
        deadline = time.monotonic() + self._timeout_s
        connection = self._kind(*self._address, timeout=min(self._timeout_s, CONNECT_SECONDS))
        with contextlib.closing(connection):
            connection.connect()
            sock = connection.sock  # the connection itself forgets it once an answer has begun
            with self._lock:
                self._open.add(sock)
            try:
                sock.settimeout(self._timeout_s)
                connection.request("POST", path, payload, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = b""
                while chunk := response.read1(CHUNK_BYTES):
                    answer += chunk
                    if (remaining := deadline - time.monotonic()) <= 0:
                        raise TimeoutError
                    sock.settimeout(remaining)
                return response.status, answer
            finally:
                with self._lock:
                    self._open.discard(sock)

    def _parsed(self, answer: bytes) -> Any:
        try:
            return json.loads(answer)
        except ValueError as error:
            raise InputError(
                f"the server at {self.url} answers with something other than JSON: {answer[:100]!r}"
            ) from error
