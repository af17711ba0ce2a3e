import ipaddress
import random

import pytest

from edgesync.testing.link_model import Flow, LinkConfig, LinkModel, megabits
from edgesync.transport.congestion import PathController, create_controller, is_near

SIZE = 1400


def controller(setting: str, near: bool | None = None) -> PathController:
    return create_controller(setting, max_datagram_size=SIZE, rng=random.Random(1), near=near)


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("::ffff:192.168.7.9", True),
        ("192.168.7.9", True),
        ("192.168.8.9", False),
        ("2001:db8::1", False),
        ("gateway.example", False),
    ],
)
def test_near_is_this_machine_and_attached_networks(address: str, near: bool) -> None:
    networks = [ipaddress.ip_network("192.168.7.0/24"), ipaddress.ip_network("2001:db9::/64")]
    assert is_near(address, networks) is near


@pytest.mark.parametrize("name", ["bbr", "lan", "background", "cubic", "reno"])
def test_an_explicit_class_stays(name: str) -> None:
    path = controller(name)
    model = LinkModel(LinkConfig(megabits(20), 0.0003, 60_000, loss=0.02), seed=1)
    flow = Flow(model, path, size_bytes=3_000_000)
    model.run(30)
    assert path.status().name == name
    assert flow.finished_at is not None


def test_a_short_clean_path_becomes_a_lan() -> None:
    path = controller("auto")
    assert path.status().name == "bbr"
    model = LinkModel(LinkConfig(megabits(200), 0.0002, 500_000), seed=2)
    flow = Flow(model, path, size_bytes=20_000_000)
    model.run(5)
    assert path.status().name == "lan"
    assert flow.finished_at is not None
    assert path.bytes_in_flight == 0


@pytest.mark.parametrize(
    "link",
    [
        LinkConfig(megabits(50), 0.02, 200_000),
        LinkConfig(megabits(50), 0.003, 200_000, loss=0.02),
    ],
    ids=["far", "lossy"],
)
def test_what_was_taken_for_a_lan_is_handed_to_the_model(link: LinkConfig) -> None:
    path = controller("auto", near=True)
    assert path.status().name == "lan"
    pacer = path.pacer
    model = LinkModel(link, seed=3)
    flow = Flow(model, path, size_bytes=20_000_000)
    model.run(60)
    assert path.status().name == "bbr"
    assert path.pacer is pacer
    assert flow.finished_at is not None
    assert path.bytes_in_flight == 0


def test_caps_and_flight_survive_a_change_of_class() -> None:
    path = controller("auto", near=False)
    model = LinkModel(LinkConfig(megabits(20), 0.03, 100_000), seed=4)
    path.set_rate_cap(500_000)
    path.set_window_cap(200_000)
    flow = Flow(model, path)
    model.at(3, lambda: path.choose("background", 3.0))
    model.at(9, lambda: path.choose("auto", 9.0))
    model.run(6)
    assert path.status().name == "background"
    model.run(15)
    assert path.status().name == "bbr"
    assert flow.goodput(0, 15) <= 1.05 * 500_000
    assert flow.goodput(10, 15) >= 0.9 * 500_000
    assert path.congestion_window <= 200_000


def test_unknown_and_stock_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="no congestion controller called 'vegas'"):
        controller("vegas")
    path = controller("auto")
    with pytest.raises(ValueError, match="no congestion controller called"):
        path.choose("vegas", 0.0)
    with pytest.raises(ValueError, match="before a connection begins"):
        path.choose("cubic", 0.0)
