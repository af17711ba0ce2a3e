"""What `edgesync agent status` says to a person."""

from typing import Any

import pytest

from device import status


def _lines(proxy: str) -> list[str]:
    peer: dict[str, Any] = {"id": "gw-1", "address": "192.0.2.1:7443", "proxy": proxy}
    shown = status.build(
        device_id="cam-3",
        gateway={"id": "gw-1", "connected": True, "carrier": "TLS", "proxy": proxy},
        peers=[peer],
        executions=[],
        counters={},
        metadata={"root": 1, "timestamp": 1},
        problems=[],
        running=True,
    )
    return list(status.lines(shown))


@pytest.mark.parametrize(
    ("proxy", "gateway", "peer"),
    [
        ("", "gateway   gw-1 connected, data by TLS", "peer      gw-1 at 192.0.2.1:7443"),
        (
            "proxy.example:3128",
            "gateway   gw-1 connected, data by TLS by the proxy proxy.example:3128",
            "peer      gw-1 by the proxy proxy.example:3128",
        ),
    ],
)
def test_the_address_of_a_proxy_is_not_shown_as_the_gateways(
    proxy: str, gateway: str, peer: str
) -> None:
    lines = _lines(proxy)
    assert gateway in lines
    assert peer in lines
