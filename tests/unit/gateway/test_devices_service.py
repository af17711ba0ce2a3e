import json

import pytest

from edgesync.errors import ConflictError, NotFoundError, UsageError
from edgesync.selectors import parse
from gateway.service import devices
from gateway.site import site_of


def certify(device_id, public_raw):
    return b"cert:" + device_id.encode() + public_raw[:1]


def test_select(register, add_device):
    add_device("cam-1", labels=json.dumps({"site": "lab", "tier": "a"}))
    add_device("cam-2", labels=json.dumps({"site": "roof"}), hardware="pi4")
    add_device("cam-3", state="pending")
    assert [row["id"] for row in devices.select(register, everything=True)] == ["cam-1", "cam-2"]
    assert [row["id"] for row in devices.select(register, selector=parse("site!=lab"))] == ["cam-2"]
    assert [
        row["id"] for row in devices.select(register, selector=parse("region=eu,hardware=pi4"))
    ] == ["cam-2"]
    assert [row["id"] for row in devices.select(register, ids=["cam-2", "cam-1", "cam-2"])] == [
        "cam-1",
        "cam-2",
    ]
    with pytest.raises(NotFoundError):
        devices.select(register, ids=["cam-9"])
    with pytest.raises(ConflictError, match="cam-3 is pending"):
        devices.select(register, ids=["cam-3"])
    for wrong in (
        {},
        {"ids": ["cam-1"], "everything": True},
        {"selector": parse(""), "everything": True},
    ):
        with pytest.raises(UsageError, match="say which devices"):
            devices.select(register, **wrong)


def test_accept_and_reject(register, add_device):
    add_device("cam-1", state="pending")
    add_device("cam-2", state="pending")
    assert devices.accept(register, "cam-1", certify)
    assert not devices.accept(register, "cam-1", certify)
    assert register.one("SELECT certificate FROM devices WHERE id = 'cam-1'")[
        "certificate"
    ].startswith(b"cert:cam-1")
    with pytest.raises(ConflictError, match="until it is revoked"):
        devices.reject(register, "cam-1")
    assert devices.reject(register, "cam-2")
    assert not devices.reject(register, "cam-2")
    assert devices.accept(register, "cam-2", certify)
    with pytest.raises(NotFoundError):
        devices.accept(register, "no", certify)
    assert [row["kind"] for row in register.rows("SELECT kind FROM events")] == [
        "device.accepted",
        "device.rejected",
        "device.accepted",
    ]


def test_labels(register, add_device):
    add_device("cam-1", labels=json.dumps({"a": "1", "b": "2"}))
    assert devices.label(register, "cam-1", setting={"site": "roof"}, removing=["a"]) == {
        "b": "2",
        "site": "roof",
    }
    assert devices.list_devices(register)[0]["site_why"] == "label"
    with pytest.raises(UsageError):
        devices.label(register, "cam-1", setting={"bad key": "x"})
    with pytest.raises(UsageError, match="at most"):
        devices.label(register, "cam-1", setting={f"k{n}": "" for n in range(65)})


def test_list_and_show(register, add_device):
    add_device("cam-1", address="192.168.7.20:7443")
    register.db.conn.execute(
        "INSERT INTO device_bundles VALUES ('cam-1', 'files', 'app', '1', 'd', 'active', '', 3, 3, 1.0)"
    )
    register.db.conn.commit()
    [row] = devices.list_devices(register)
    assert (row["site"], row["site_why"], row["online"]) == ("192.168.7.0/24", "address", False)
    assert row["bundles"][0]["version"] == "1"
    assert devices.list_devices(register, parse("site=x")) == []
    assert devices.show(register, "cam-1")["assignments"] == []
    with pytest.raises(NotFoundError):
        devices.show(register, "cam-2")


@pytest.mark.parametrize(
    ("labels", "observed", "local", "expected"),
    [
        ({"site": "x"}, "1.2.3.4", (), ("x", "label")),
        ({}, "8.8.4.4:1", (), ("8.8.4.4/32", "translated address")),
        ({}, "8.8.4.4:1", ("8.8.4.4:7443",), ("8.8.4.0/24", "address")),
        ({}, "10.1.2.3", (), ("10.1.2.0/24", "address")),
        ({}, "[2a00:1450::9]:4", ("[2a00:1450::9]:7443",), ("2a00:1450::/64", "address")),
        ({}, "[fe80::1%eth0]:4", (), ("fe80::/64", "address")),
        ({}, "::ffff:10.0.0.9", (), ("10.0.0.0/24", "address")),
        ({}, "", (), ("unknown", "never seen")),
        ({}, "rubbish:9", (), ("unknown", "never seen")),
    ],
)
def test_site(labels, observed, local, expected):
    assert site_of(labels, observed, local) == expected
