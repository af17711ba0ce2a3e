"""HTTP proxies that lead out of a site by CONNECT: which one applies, what is asked, what it may answer.

It speaks to the proxy in the clear (``http://``) and knows Basic authentication only; what goes through the tunnel is
TLS that the proxy cannot read. User and password never stand in an error or a log line. Loopback goes by no proxy.
Source: RFC 9110 sections 9.3.6 and 11; ``HTTPS_PROXY`` and ``NO_PROXY`` as curl reads them.
"""

import asyncio
import base64
import contextlib
import errno
import ipaddress
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from edgesync import limits
from edgesync.errors import PeerBusyError, PeerTimeoutError, PeerUnreachableError
from edgesync.io.tcp import connect_in_short_segments

NONE: Final = "none"
DEFAULT_PORT: Final = 3128
_HOST: Final = re.compile(r"[A-Za-z0-9._:%-]{1,253}\Z")
"""A name, an IPv4 address, or an IPv6 address without its brackets."""
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: ([ -~]{0,100}))?")


@dataclass(frozen=True)
class Proxy:
    host: str
    port: int
    credentials: str = field(default="", repr=False)
    """``user:password``."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ProxySettings:
    """``proxy`` for every target but those of ``exceptions``."""

    proxy: Proxy | None = None
    exceptions: tuple[str, ...] = ()

    def towards(self, host: str) -> Proxy | None:
        """The proxy for a connection to ``host``; None: go directly."""
        if self.proxy is None or _is_loopback(host):
            return None
        return None if any(_matches(host, entry) for entry in self.exceptions) else self.proxy


def parse(url: str) -> Proxy:
    """``http://[USER:PASSWORD@]HOST[:PORT]``. Raises ValueError, without the password in its text."""
    wrong = "is no proxy: write http://[USER:PASSWORD@]HOST[:PORT], or none"
    if not url.isprintable():
        raise ValueError(f"what is given {wrong}")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        raise ValueError(f"what is given {wrong}") from None
    if (
        parts.scheme != "http"
        or not parts.hostname
        or parts.path.strip("/")
        or parts[3:] != ("", "")
    ):
        raise ValueError(f"what is given {wrong}")
    if not _HOST.match(parts.hostname):
        raise ValueError(f"what is given {wrong}")
    if re.search(r"[\x00-\x20\x7f]", unquote(parts.username or "") + unquote(parts.password or "")):
        raise ValueError("the proxy's user or password has a character that HTTP cannot carry")
    credentials = ""
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return Proxy(parts.hostname, port or DEFAULT_PORT, credentials)


def masked(url: str) -> str:
    """A proxy URL as it may be shown: ``***`` stands for the password."""
    account, at, where = url.rpartition("@")
    scheme = "http://" if account.startswith("http://") else ""
    user, colon, _ = account.removeprefix(scheme).partition(":")
    return f"{scheme}{user}{colon and ':***'}{at}{where}"


def settings(configured: str, environment: Mapping[str, str] = os.environ) -> ProxySettings:
    """The configured proxy, else the environment's; ``none`` means neither. Raises ValueError: not a proxy URL."""
    exceptions = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    listed = tuple(entry.strip().lower() for entry in exceptions.split(",") if entry.strip())
    if configured == NONE:
        return ProxySettings()
    if configured:
        return ProxySettings(parse(configured), listed)
    url = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
    return ProxySettings(parse(url) if url else None, listed)


def connect_request(proxy: Proxy, host: str, port: int) -> bytes:
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not re.fullmatch(r"[A-Za-z0-9.:_%\[\]-]+", target):
        raise PeerUnreachableError("the address has characters that no proxy can be asked for")
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials:
        token = base64.b64encode(proxy.credentials.encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {token}")
    return "\r\n".join([*lines, "", ""]).encode()


def is_through(proxy: Proxy, answer: bytes) -> bool:
    """Whether the tunnel stands; False: the answer is not whole yet. Raises PeerUnreachableError: it said no."""
    head, end, rest = answer.partition(b"\r\n\r\n")
    first = head.partition(b"\r\n")[0]
    match = _STATUS.fullmatch(first)
    if not end:
        if len(answer) >= limits.MAX_PROXY_ANSWER_BYTES:
            raise PeerUnreachableError(f"the proxy {proxy} answered more than it may")
        return False
    if match is None:
        raise PeerUnreachableError(f"the proxy {proxy} did not answer in HTTP")
    if not match[1].startswith(b"2"):
        said = " ".join(part.decode() for part in match.groups() if part)
        hint = ": check user and password" if match[1] == b"407" else ""
        raise PeerUnreachableError(f"the proxy {proxy} answered {said}{hint}")
    if rest:
        raise PeerUnreachableError(f"the proxy {proxy} sent bytes before the tunnel was used")
    return True


def open_tunnel(proxy: Proxy, host: str, port: int, *, timeout_s: float) -> socket.socket:
    """Blocking: a socket that leads to ``host``, within ``timeout_s`` after the proxy was reached, however it trickles.

    Raises OSError (TimeoutError: the answer was not whole in time), PeerUnreachableError.
    """
    request = connect_request(proxy, host, port)
    sock = connect_in_short_segments(proxy.host, proxy.port, timeout_s=timeout_s)
    try:
        deadline = time.monotonic() + timeout_s
        sock.sendall(request)
        answer = b""
        while not is_through(proxy, answer):
            sock.settimeout(_left_s(proxy, deadline))
            answer += _more(proxy, sock.recv(limits.MAX_PROXY_ANSWER_BYTES - len(answer)))
        sock.settimeout(timeout_s)
    except BaseException:
        sock.close()
        raise
    return sock


def _left_s(proxy: Proxy, deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(errno.ETIMEDOUT, f"the proxy {proxy} did not answer in time")
    return left


def _more(proxy: Proxy, part: bytes) -> bytes:
    if not part:
        raise PeerUnreachableError(f"the proxy {proxy} closed without an answer")
    return part


async def connect(
    proxy: Proxy | None, host: str, port: int, *, timeout_s: float
) -> tuple[socket.socket, tuple[str, int]]:
    """A non-blocking socket that leads to ``host``, and the address it was connected to.

    Raises PeerUnreachableError, PeerTimeoutError; PeerBusyError: it was reset as soon as it stood.
    """
    where = (proxy.host, proxy.port) if proxy else (host, port)
    named = f"the proxy {proxy}" if proxy else f"{host}:{port} (TCP)"
    try:
        async with asyncio.timeout(timeout_s):
            sock, address = await _reach(where, named)
            try:
                if proxy is not None:
                    await _ask(sock, proxy, host, port)
            except BaseException:
                sock.close()
                raise
    except TimeoutError:
        raise PeerTimeoutError(f"{named} did not answer in time") from None
    except OSError as exc:
        raise PeerUnreachableError(f"{named} broke off: {exc.strerror or exc}") from exc
    return sock, address


async def _reach(where: tuple[str, int], named: str) -> tuple[socket.socket, tuple[str, int]]:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(*where, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        raise PeerUnreachableError(f"{where[0]} cannot be resolved") from exc
    why = "it has no address"
    for family, kind, number, _, address in found[:4]:
        sock = socket.socket(family, kind, number)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, address)
        except ConnectionResetError as exc:
            sock.close()
            raise PeerBusyError(f"{named} takes no more strangers now", retry_after_s=0.1) from exc
        except OSError as exc:
            why = exc.strerror or str(exc)
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock, (str(address[0]), int(address[1]))
    raise PeerUnreachableError(f"{named} cannot be reached: {why}")


async def _ask(sock: socket.socket, proxy: Proxy, host: str, port: int) -> None:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, connect_request(proxy, host, port))
    answer = b""
    while not is_through(proxy, answer):
        room = limits.MAX_PROXY_ANSWER_BYTES - len(answer)
        answer += _more(proxy, await loop.sock_recv(sock, room))


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _matches(host: str, entry: str) -> bool:
    host = host.lower()
    if entry == "*":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    entry = entry.lstrip("*").lstrip(".")
    return host == entry or host.endswith(f".{entry}")
