import random

import pytest

from device.config import AgentSettings
from edgesync import config
from edgesync.transport.congestion import create_controller
from edgesync.transport.controller_names import SETTINGS
from edgesync.transport.quic import BoundedQuicConnection, client_configuration
from gateway.config import GatewaySettings


@pytest.mark.parametrize("name", SETTINGS)
def test_what_settings_name_exists(name):
    made = create_controller(name, max_datagram_size=1200, rng=random.Random(1))
    assert made.status().name in SETTINGS
    for settings in (AgentSettings, GatewaySettings):
        found = config.load(settings, None, environ={"EDGESYNC_CONGESTION": name}).values
        assert found.congestion == name


@pytest.mark.parametrize("name", ["bbr", "background", "cubic"])
def test_a_connection_uses_the_one_it_was_told(name):
    quic = BoundedQuicConnection(
        configuration=client_configuration(alpn="x", idle_timeout_s=1),
        peer_streams=0,
        congestion=name,
    )
    assert quic.controller.status().name == name
