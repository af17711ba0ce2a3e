"""Guards that hold for every test: root tests skip visibly elsewhere, nothing reaches past loopback by accident."""

import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

IN_NAMESPACE = "EDGESYNC_TEST_NAMESPACE"
"""Set by tests that made a network namespace of their own: there private addresses are theirs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons = sorted({str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped})
        terminalreporter.write_line(
            f"{len(skipped)} tests were skipped: {'; '.join(reasons)}", yellow=True
        )


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test whose own process connects or sends past loopback (multicast stays on the interface it names)."""
    if os.environ.get(IN_NAMESPACE):
        yield
        return
    connect, sendto = socket.socket.connect, socket.socket.sendto

    def check(address: Any) -> None:
        if not isinstance(address, tuple) or not isinstance(address[0], str):
            return
        try:
            ip = ipaddress.ip_address(address[0].split("%")[0])
        except ValueError:
            return
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if not (ip.is_loopback or ip.is_multicast or ip.is_unspecified):
            pytest.fail(f"a test tried to reach {address}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_sendto(self: socket.socket, data: Any, *rest: Any) -> int:
        check(rest[-1])
        return sendto(self, data, *rest)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "sendto", guarded_sendto)
    yield
