"""The gateway's HTTP door: ``/livez``, ``/readyz`` and ``/metrics``, for supervisors and Prometheus.

A minimal HTTP/1.1 server: GET and HEAD, one request a connection, everything bounded. It knows no gateway: handlers are
given to it. It is bound to loopback unless told otherwise, since it asks nobody who they are.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from edgesync.errors import ConfigError

MAX_REQUEST_BYTES: Final = 8 * 1024
MAX_CONNECTIONS: Final = 32
REQUEST_TIMEOUT_S: Final = 5.0
_PHRASES: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Response:
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Handler = Callable[[], Response]
"""Answers at once, from memory: it runs on the event loop."""


def json_response(status: int, value: Mapping[str, object]) -> Response:
    return Response(status, json.dumps(value).encode() + b"\n", "application/json")


class HttpServer:
    def __init__(self, routes: Mapping[str, Handler]) -> None:
        self._routes = dict(routes)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self, host: str, port: int) -> None:
        """Raises ConfigError: the address cannot be bound."""
        try:
            self._server = await asyncio.start_server(
                self._serve, host or None, port, limit=MAX_REQUEST_BYTES
            )
        except OSError as exc:
            raise ConfigError(
                f"cannot listen for HTTP on {host}:{port}: {os.strerror(exc.errno) if exc.errno else exc}: "
                "stop what uses it, or choose another with --listen-http"
            ) from exc

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in list(self._open):
                writer.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._open.add(writer)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                response, head = await self._answer(reader)
                writer.write(_head(response) + (b"" if head else response.body))
                await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Response, bool]:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return Response(431, b"the request is too long\n"), False
        parts = request.split(b"\r\n", 1)[0].split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):
            return Response(400, b"this is not HTTP/1.1\n"), False
        method, target = parts[0], parts[1].split(b"?", 1)[0].decode("ascii", "replace")
        if method not in {b"GET", b"HEAD"}:
            return Response(405, b"only GET and HEAD\n"), False
        handler = self._routes.get(target)
        if handler is None:
            return Response(404, b"not found\n"), method == b"HEAD"
        return handler(), method == b"HEAD"


def _head(response: Response) -> bytes:
    return (
        f"HTTP/1.1 {response.status} {_PHRASES[response.status]}\r\n"
        f"Content-Type: {response.content_type}\r\n"
        f"Content-Length: {len(response.body)}\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    ).encode()


@dataclass(frozen=True)
class Metric:
    """One family of Prometheus' text format; ``samples`` are label sets with their values."""

    name: str
    kind: str
    help: str
    samples: tuple[tuple[Mapping[str, str], float], ...]


def metric(
    name: str, kind: str, text: str, value: float | Mapping[tuple[tuple[str, str], ...], float]
) -> Metric:
    """A family with one value, or one value for each tuple of (label, value) pairs."""
    if isinstance(value, Mapping):
        return Metric(
            name, kind, text, tuple((dict(labels), number) for labels, number in value.items())
        )
    return Metric(name, kind, text, (({}, value),))


def render_metrics(metrics: Iterable[Metric]) -> Response:
    lines: list[str] = []
    for family in metrics:
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        for labels, value in family.samples:
            inside = ",".join(f'{key}="{_escape(text)}"' for key, text in sorted(labels.items()))
            number = int(value) if float(value).is_integer() else value
            lines.append(
                f"{family.name}{{{inside}}} {number}" if inside else f"{family.name} {number}"
            )
    return Response(
        200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4; charset=utf-8"
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
