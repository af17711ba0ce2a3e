import stat

import pytest

from edgesync import config, jointoken
from edgesync.errors import ConfigError, UsageError
from edgesync.identity import check_issued
from edgesync.ids import DeviceId
from edgesync.storage.datadir import DataDir
from gateway import certificates, fleet
from gateway.config import GatewaySettings, broker_urls
from gateway.service import setup, status, tokens
from gateway.store import GatewayStore


@pytest.fixture
def made(tmp_path):
    facts = setup.init(
        tmp_path / "gw",
        name="acme",
        advertise=["gw.example.org"],
        region="eu",
        threshold=(1, 1),
        utc_now=1e9,
    )
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store:
        yield facts, store


def test_init_makes_a_fleet_whose_metadata_names_this_gateway(made):
    facts, store = made
    here = fleet.load(store)
    assert (here.name, here.region, here.gateway_id, here.fleet_id) == (
        "acme",
        "eu",
        "gateway-eu",
        facts["fleet_id"],
    )
    trusted = setup.repository(store).trusted()
    [gateway] = trusted.gateways("eu")
    assert (gateway.id, gateway.key) == (here.gateway_id, here.gateway_key)
    assert gateway.assign_key == certificates.load_assign_key(store.datadir.online).key
    certificate = setup.certifier(store)(DeviceId("cam-1"), bytes.fromhex(here.gateway_key))
    check_issued(certificate, trusted.region("eu").ca)


def test_secrets_are_for_the_owner_alone(made):
    _facts, store = made
    for path in store.datadir.path.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.datadir.path.stat().st_mode) == 0o700
    assert not stat.S_IMODE(store.datadir.config.stat().st_mode) & 0o007


def test_settings_are_written_commented_and_read_back(made):
    _facts, store = made
    settings = config.load(GatewaySettings, store.datadir.config, environ={}).values
    assert setup.advertised(settings) == ["gw.example.org:7443"]
    assert broker_urls(settings, None) == ["mqtts://gw.example.org:8883"]
    assert broker_urls(settings, 99) == ["mqtts://gw.example.org:99"]
    with pytest.raises(ConfigError, match="set advertise"):
        setup.advertised(GatewaySettings())


def test_token_pins_the_newest_root(made):
    _facts, store = made
    repository = setup.repository(store)
    version, digest = repository.root_pin()
    text = tokens.create(
        store, root_version=version, root_sha256=digest, addresses=["x:1"], utc_now=1e9
    ).token
    token = jointoken.decode(text)
    assert (token.root_version, token.root_sha256) == (1, fleet.load(store).fleet_id)


def test_second_init_changes_nothing(made):
    facts, store = made
    with pytest.raises(ConfigError, match="already"):
        setup.init(store.datadir.path, name="b", advertise=["x"], region="eu", threshold=(1, 1))
    assert fleet.load(store).fleet_id == facts["fleet_id"]


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "Acme"},
        {"region": "r" * 60},
        {"region": ""},
        {"advertise": ["a:b"]},
        {"threshold": (3, 2)},
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, bad):
    given = {"name": "acme", "advertise": ["gw"], "region": "eu", "threshold": (1, 1)} | bad
    with pytest.raises(UsageError):
        setup.init(tmp_path / "gw", **given)
    assert not (tmp_path / "gw" / "role").exists()
    setup.init(tmp_path / "gw", name="acme", advertise=["gw"], region="eu", threshold=(1, 1))


def test_private_addresses_alone_are_not_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("ifaddr.get_adapters", list)
    with pytest.raises(UsageError, match="--advertise HOST"):
        setup.init(tmp_path / "gw", name="acme", advertise=[], region="eu", threshold=(1, 1))


@pytest.mark.parametrize(("text", "value"), [("1-of-1", (1, 1)), ("2-of-3", (2, 3))])
def test_threshold(text, value):
    assert setup.parse_threshold(text) == value
    for wrong in ("2", "2of3", "0-of-1", "1-of-100", "-1-of-2"):
        with pytest.raises(UsageError):
            setup.parse_threshold(wrong)


def test_status_without_a_daemon(made):
    _facts, store = made
    now = status.read(store, utc_now=1e9)
    assert (now["schema"], now["running"], now["min_site_replication"]) == (
        "edgesync.gateway-status/1",
        False,
        None,
    )
    assert [role["version"] for role in now["metadata"]] == [1] * 5
    assert all(key["readable"] for key in now["keys"])
    assert now["problems"] == []


def test_status_says_what_only_the_daemon_knows_while_it_is_fresh(made, tmp_path):
    _facts, store = made
    data = {
        "broker": {
            "kind": "embedded",
            "url": "mqtts://x:1",
            "connected": False,
            "error": "refused",
        },
        "quic": {"port": 7},
        "min_site_replication": 2,
        "problems": [],
    }
    status.write_runtime(store, pid=1, started=1e9, utc_now=1e9, data=data)
    status.add_sent(store, {"lab": 5})
    status.add_sent(store, {"lab": 2, "roof": 1})
    now = status.read(store, utc_now=1e9 + 1)
    assert (now["running"], now["min_site_replication"], now["bytes_out"]) == (True, 2, 8)
    assert now["problems"] == ["not connected to the broker mqtts://x:1: refused"]
    assert not status.read(store, utc_now=1e9 + 60)["running"]
    (store.datadir.keys / "root-1.key").rename(tmp_path / "root-1.key")
    store_now = status.read(store, utc_now=1e9 + 5 * 365 * 86_400)
    assert [key["role"] for key in store_now["keys"] if not key["readable"]] == ["root"]
    assert any("root metadata" in problem for problem in store_now["problems"])
