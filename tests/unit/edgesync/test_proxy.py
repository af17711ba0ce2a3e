"""HTTP proxies: which applies, what is asked, what they may answer."""

import asyncio
import base64
import socket

import pytest

from device.config import AgentSettings
from edgesync import config
from edgesync.errors import ConfigError, PeerUnreachableError
from edgesync.io import proxy
from edgesync.io.proxy import (
    Proxy,
    connect,
    connect_request,
    is_through,
    open_tunnel,
    parse,
    settings,
)


def test_the_environment_and_its_exceptions() -> None:
    found = settings(
        "", {"HTTPS_PROXY": "http://proxy:8080", "NO_PROXY": "site.example,10.0.0.0/8"}
    )
    assert found.towards("gateway.example") == Proxy("proxy", 8080)
    assert found.towards("a.site.example") is None
    assert found.towards("10.1.2.3") is None
    assert found.towards("127.0.0.1") is None
    assert settings("none", {"HTTPS_PROXY": "http://proxy"}).towards("x.example") is None
    other = settings("http://other:1", {"HTTPS_PROXY": "http://proxy"})
    assert other.towards("x.example") == Proxy("other", 1)


@pytest.mark.parametrize(
    "url",
    [
        "https://proxy",
        "http://",
        "http://p:99999",
        "http://p/path",
        "http://u:p@pr oxy:3128",
        "http://pr%20 y",
        "http://p\x7f",
        "http://us\x9ber:p@p",
        "http://p:80/#\x1b[31m",
        "http://p:80/#more",
        "\x1bhttp://p",
        "http://p\u202e",
    ],
)
def test_no_proxy_url(url: str) -> None:
    with pytest.raises(ValueError, match="no proxy"):
        parse(url)


def test_the_password_is_never_written() -> None:
    found = parse("http://user:se%63ret@proxy:80")
    assert "secret" not in f"{found} {found!r} {settings('http://u:secret@p')!r}"
    token = base64.b64encode(b"user:secret")
    assert b"Proxy-Authorization: Basic " + token in connect_request(found, "::1", 7443)
    with pytest.raises(ValueError, match="character") as caught:
        parse("http://user:sec%0d%0aret@proxy")
    assert "ret" not in str(caught.value).replace("character", "")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:se@c:ret@host:80", "http://u:***@host:80"),
        ("u:secret@host", "u:***@host"),
        ("HTTP://u:secret@host", "HTTP:***@host"),
        ("http://u@host", "http://u@host"),
        ("http://host:80", "http://host:80"),
        ("none", "none"),
        ("", ""),
    ],
)
def test_config_show_masks_the_password(url: str, shown: str) -> None:
    assert proxy.masked(url) == shown
    rows = config.show(config.load(AgentSettings, None, environ={}, flags={"proxy": url or None}))
    assert {row["key"]: row["value"] for row in rows}["proxy"] == shown


@pytest.mark.parametrize("bad", ["\x1b[31m", "\n", "\x7f", "\x9b", "\u202e", "\u2028"])
def test_what_cannot_be_printed_is_refused_without_its_password(bad: str) -> None:
    for url in (f"http://us{bad}er:secret@host", f"http://user:secret@host/#{bad}"):
        with pytest.raises(ConfigError, match="EDGESYNC_PROXY: it is not one line") as caught:
            config.load(AgentSettings, None, environ={"EDGESYNC_PROXY": url})
        assert str(caught.value).isprintable()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "407 .*user and password"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "proxy p:1 answered 403 Forbidden"),
        (b"SSH-2.0\r\n\r\n", "did not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nearly", "before the tunnel"),
        (b"x" * 8192, "more than it may"),
    ],
)
def test_what_a_proxy_may_not_answer(answer: bytes, says: str) -> None:
    with pytest.raises(PeerUnreachableError, match=says):
        is_through(Proxy("p", 1), answer)


def test_a_whole_answer_and_a_part_of_one() -> None:
    assert not is_through(Proxy("p", 1), b"HTTP/1.1 200 OK\r\nVia")
    assert is_through(Proxy("p", 1), b"HTTP/1.0 200 Connection established\r\nVia: x\r\n\r\n")


async def test_a_tunnel_stands() -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.write(await reader.readexactly(4))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        sock, where = await connect(Proxy("127.0.0.1", port), "gateway.example", 7443, timeout_s=5)
        assert where == ("127.0.0.1", port)
        assert asked[0].startswith(b"CONNECT gateway.example:7443 HTTP/1.1\r\n")
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(sock, b"ping")
        assert await loop.sock_recv(sock, 4) == b"ping"
        sock.close()
    finally:
        server.close()


def test_a_trickling_proxy_meets_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    clock = [0.0]
    waits: list[float] = []

    class Trickle:
        """The socket's calls, a second and a byte each."""

        def settimeout(self, left: float) -> None:
            waits.append(left)

        def sendall(self, data: bytes) -> None:
            near.sendall(data)

        def recv(self, _room: int) -> bytes:
            clock[0] += 1.0
            far.sendall(b"H")
            return near.recv(1)

        def close(self) -> None:
            near.close()

    monkeypatch.setattr(proxy, "connect_in_short_segments", lambda *_a, **_k: Trickle())
    monkeypatch.setattr("edgesync.io.proxy.time.monotonic", lambda: clock[0])
    with far, pytest.raises(TimeoutError, match="in time"):
        open_tunnel(Proxy("p", 1), "gateway.example", 7443, timeout_s=5.0)
    assert waits == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert near.fileno() == -1


def test_default_port() -> None:
    assert parse("proxy").port == proxy.DEFAULT_PORT
