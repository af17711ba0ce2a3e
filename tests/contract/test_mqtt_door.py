"""MQTT through the gateway's TLS port to an external broker, while the broker's own port cannot be reached."""

import asyncio
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgesync import limits
from edgesync.config import HostPort
from edgesync.io.broker_url import parse_broker_url
from edgesync.io.mqtt import MqttLink
from edgesync.testing.transport import TestFleet
from edgesync.transport.endpoint import Endpoint, EndpointConfig
from edgesync.wire import topics
from gateway.mqtt_relay import MqttRelay
from tests.contract.brokers import FAST, GATEWAY, MOSQUITTO, BrokerProcess, Fleet


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[BrokerProcess]:
    if not Path(MOSQUITTO).exists():
        pytest.skip("mosquitto is not installed: nothing external to relay to")
    process = BrokerProcess("mosquitto", Fleet(), tmp_path)
    asyncio.run(process.start())
    yield process
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_device_reaches_an_external_broker_through_the_door(
    mosquitto: BrokerProcess, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = closed.getsockname()[1]
    transport = TestFleet()
    endpoint = await Endpoint.open(
        host=host,
        port=0,
        identity=mosquitto.fleet.gateway,
        judge=transport.judge,
        handler=(await transport.stranger("handler")).handler,
        config=EndpointConfig(role="gateway", tcp=True),
    )
    relay = MqttRelay(parse_broker_url(mosquitto.url))
    assert endpoint.tcp_door is not None
    endpoint.tcp_door.mqtt = relay.adopt
    device = mosquitto.fleet.device("behind")
    link = MqttLink(
        client_id=device.name,
        brokers=lambda: [f"mqtts://127.0.0.1:{nowhere}"],
        identity=device,
        allowed_keys=lambda: {mosquitto.fleet.gateway.key},
        subscriptions=lambda: topics.device_filters(device.name, GATEWAY),  # type: ignore[arg-type]
        config=FAST,
        rng=random.Random(1),
        doors=lambda: [HostPort(host, endpoint.port)],
    )
    task = asyncio.create_task(link.run())
    try:
        await asyncio.wait_for(link.wait_connected(), 20)
        assert f"port {endpoint.port}" in link.status().detour
        async with asyncio.timeout(limits.RELAY_UNPROVEN_TIMEOUT_S):
            while relay.unproven:  # noqa: ASYNC110 - the relay tells nobody
                await asyncio.sleep(0.01)
        assert link.status().connected
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await relay.close()
        await endpoint.close()
        await transport.__aexit__()
