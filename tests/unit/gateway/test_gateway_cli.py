import json
import time

import pytest

from edgesync.cli import main as cli
from edgesync.storage.datadir import DataDir
from gateway.service import status
from gateway.store import GatewayStore


@pytest.fixture
def edgesync(tmp_path, capsys, monkeypatch):
    """Run a command as typed; returns (exit code, stdout, stderr)."""
    monkeypatch.delenv("EDGESYNC_DATA", raising=False)
    app = cli.build()

    def run(*arguments, data=tmp_path / "gw"):
        given = [*arguments, "--data", str(data)] if data else list(arguments)
        monkeypatch.setattr("sys.argv", ["edgesync", *given])
        monkeypatch.setattr(cli, "build", lambda: app)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr()
        return int(ended.value.code or 0), told.out, told.err

    return run


@pytest.fixture
def fleet(edgesync):
    code, out, err = edgesync(
        "gateway", "init", "acme", "--advertise", "127.0.0.1:7443", "--region", "eu", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["schema"] == "edgesync.gateway-init/1"
    return edgesync


def add_device(tmp_path, device_id, state="accepted"):
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store, store.atomic() as db:
        db.conn.execute(
            "INSERT INTO devices (id, key, region, labels, hardware, state, joined) "
            "VALUES (?, ?, 'eu', '{}', '', ?, 0)",
            (device_id, device_id.encode().hex().ljust(64, "0"), state),
        )


def test_every_command_without_a_fleet_says_what_to_do(edgesync):
    for command in (
        ("gateway", "run"),
        ("gateway", "status"),
        ("token", "create"),
        ("token", "list"),
        ("device", "list"),
        ("assign", "app", "--all"),
        ("events",),
    ):
        code, out, err = edgesync(*command)
        assert (code, out) == (78, "")
        assert err.startswith("edgesync: no gateway in ")
        assert err.count("\n") == 1


def test_token_create_prints_the_join_command(fleet):
    code, out, _err = fleet("token", "create", "--ttl", "10m", "--site", "lab", "--label", "rack=2")
    assert code == 0
    token = next(line for line in out.splitlines() if line.startswith("es1"))
    assert f"echo {token} | edgesync agent join --token-file -" in out.splitlines()
    told = json.loads(fleet("token", "create", "--uses", "3", "--json")[1])
    assert set(told) >= {"schema", "token", "join_command", "expires"}
    assert told["pending"]
    assert "active" in fleet("token", "list")[1]
    assert fleet("token", "revoke", told["id"])[0] == 0
    assert json.loads(fleet("token", "list", "--json")[1])["tokens"][0]["state"] == "revoked"
    assert fleet("token", "revoke", "nosuch")[0] == 6
    assert fleet("token", "create", "--ttl", "soon")[0] == 2
    assert fleet("token", "create", "--label", "x")[0] == 2


def test_publish_assign_status_and_events(fleet, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.txt").write_text("hello")
    code, out, _err = fleet("publish", "bundle", str(tree), "app@1", "--json")
    published = json.loads(out)
    assert (code, published["schema"], published["payload_bytes"]) == (0, "edgesync.published/1", 5)
    (tree / "a.txt").write_text("other")
    code, _out, err = fleet("publish", "bundle", str(tree), "app@1")
    assert (code, "already" in err) == (1, True)
    assert fleet("publish", "bundle", str(tree), "--name", "app", "--version", "2")[0] == 0
    assert fleet("publish", "bundle", str(tree), "app")[0] == 2
    assert fleet("publish", "bundle", str(tree), "App@1")[0] == 2
    code, _out, err = fleet("publish", "bundle", "", "app@9")
    assert (code, "is empty" in err) == (2, True)
    code, _out, err = fleet("publish", "bundle", str(tree), "app@9", "--hardware", "")
    assert (code, "--hardware '' is not" in err, "$." in err) == (2, True, False)
    code, _out, err = fleet("token", "create", "--hardware", "pi 4")
    assert (code, "--hardware 'pi 4' is not" in err) == (2, True)
    assert fleet("publish", "bundle", str(tree), "app@3", "--kind", "music")[0] == 2
    add_device(tmp_path, "cam-1")
    add_device(tmp_path, "cam-2", "pending")
    assert fleet("assign", "app", "--all")[1] == "app@2 is assigned to 1 device\n"
    assert fleet("assign", "app@1", "--device", "cam-2")[0] == 1
    assert fleet("assign", "app@9", "--all")[0] == 6
    assert fleet("assign", "app")[0] == 2
    code, _out, err = fleet("assign", "app@1", "--all", "--wait", "--timeout", "0")
    assert (code, err.count("\n")) == (4, 1)
    assert fleet("device", "accept", "cam-2")[1] == "accepted 1: cam-2\n"
    assert json.loads(fleet("device", "show", "cam-2", "--json")[1])["state"] == "accepted"
    assert fleet("device", "label", "cam-2", "site=roof", "gone-")[1] == "cam-2: site=roof\n"
    assert "cam-2" in fleet("device", "list", "-l", "site=roof")[1]
    assert "cam-1" not in fleet("device", "list", "-l", "site=roof")[1]
    told = json.loads(fleet("gateway", "status", "--json")[1])
    assert (told["schema"], told["devices"]["accepted"], told["min_site_replication"]) == (
        "edgesync.gateway-status/1",
        2,
        None,
    )
    assert told["bundles"][0]["version"] == "1"
    assert fleet("gateway", "status")[0] == 0
    assert fleet("unassign", "app", "--all")[1] == "app is no longer assigned to 1 device\n"
    events = [json.loads(line) for line in fleet("events")[1].splitlines()]
    assert [event["id"] for event in events] == list(range(1, len(events) + 1))
    later = [
        json.loads(line)
        for line in fleet("events", "--since", str(events[-2]["id"]))[1].splitlines()
    ]
    assert later == events[-1:]
    assert json.loads(fleet("events", "-l", "kind=device.accepted")[1])["subject"] == "device:cam-2"


def test_status_says_where_udp_is_blocked(fleet, tmp_path):
    for number in range(3):
        add_device(tmp_path, f"cam-{number}")
    assert "UDP" not in fleet("gateway", "status")[1]
    data = {
        "broker": {"kind": "embedded", "url": "mqtts://x:1", "connected": True, "error": ""},
        "quic": None,
        "min_site_replication": None,
        "problems": [],
    }
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store, store.atomic() as db:
        now = time.time()
        status.write_runtime(store, pid=1, started=now, utc_now=now, data=data)
        # The last is away: what held for it then need not hold now.
        db.conn.execute("UPDATE devices SET udp_blocked = 1, online = id <> 'cam-2'")
        db.conn.execute('UPDATE devices SET labels = \'{"site": "roof"}\'')
    out = fleet("gateway", "status")[1]
    assert "tls      UDP is blocked for devices online: 2 at roof\n" in out
    (site,) = json.loads(fleet("gateway", "status", "--json")[1])["sites"]
    assert (site["devices"], site["udp_blocked"]) == (3, 2)
    assert json.loads(fleet("device", "show", "cam-2", "--json")[1])["udp_blocked"] is True
    assert "udp_blocked    True\n" in fleet("device", "show", "cam-2")[1]


def test_publish_again_has_nothing_new(fleet, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "of it new" in fleet("publish", "bundle", str(tmp_path / "file"), "app@1")[1]
    code, out, _err = fleet("publish", "bundle", str(tmp_path / "file"), "app@1")
    assert (code, "nothing changed" in out, "new" in out) == (0, True, False)


def test_mutable_files(fleet, tmp_path):
    tree = tmp_path / "tree"
    (tree / "data").mkdir(parents=True)
    (tree / "data/a.db").write_text("x")
    globs = ("--mutable", "data/*.db", "--mutable", "*.log")
    code, _out, err = fleet("publish", "bundle", str(tree), "app@1", *globs)
    assert (code, "--mutable '*.log' matches no file" in err) == (2, True)
    assert fleet("publish", "bundle", str(tree), "app@1", *globs[:2])[0] == 0
    assert fleet("publish", "bundle", str(tree), "app@1", *globs[:2])[0] == 0
    # The same bytes, but other promises.
    assert fleet("publish", "bundle", str(tree), "app@1")[0] == 1


def test_devices_hold_what_they_have_whole(fleet, tmp_path):
    add_device(tmp_path, "cam-1")
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store, store.atomic() as db:
        for version, state in enumerate(("succeeded", "canceled", "in_progress", "failed")):
            db.conn.execute(
                "INSERT INTO device_bundles (device_id, name, version, kind, digest, state, reason, pieces_have, "
                "pieces_total, updated) VALUES ('cam-1', 'app', ?, 'files', ?, ?, '', 1, 2, 0)",
                (str(version), "a" * 64, state),
            )
    row = fleet("device", "list")[1].splitlines()[1]
    assert "app@0 " in row
    assert "app@0," not in row


def test_role_neutral_commands(fleet, tmp_path):
    (tmp_path / "file").write_text("x")
    fleet("publish", "bundle", str(tmp_path / "file"), "app@1")
    assert "app@1" in fleet("bundle", "list")[1]
    assert fleet("bundle", "show", "app@1")[0] == 0
    assert fleet("bundle", "verify", "app@1")[0] == 0
    assert fleet("bundle", "verify", "app@2")[0] == 6
    add_device(tmp_path, "cam-1")
    fleet("assign", "app@1", "--all")
    assert fleet("bundle", "remove", "app@1")[0] == 1
    fleet("unassign", "app", "--all")
    assert fleet("bundle", "remove", "app@1")[0] == 0
    assert "advertise" in fleet("config", "show", "--origin")[1]


def test_a_wrong_setting_names_file_and_key(fleet, tmp_path):
    with (tmp_path / "gw/gateway.toml").open("a") as file:
        file.write("upload_limmit = 1\n")
    code, _out, err = fleet("gateway", "run")
    assert code == 78
    assert "gateway.toml: unknown key 'upload_limmit'; did you mean 'upload_limit'?" in err


def test_remote_names_cannot_drive_the_terminal(fleet, tmp_path):
    add_device(tmp_path, "cam-1")
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store, store.atomic() as db:
        db.conn.execute(
            "UPDATE devices SET waiting = ?, agent_version = ?", ("\x1b[2Jgone", "\u202e1")
        )
        store.emit("device:cam-1", "device.joined", "device:cam-1", {"agent": "\x1b]0;x\x07"})
    for command in (("device", "list"), ("device", "show", "cam-1"), ("events",)):
        out = fleet(*command)[1]
        assert not any(character in out for character in "\x1b\x07\u202e")


def test_broker_config(fleet):
    assert "gateway-eu" in fleet("gateway", "broker-config", "mosquitto")[1]
    assert fleet("gateway", "broker-config", "hivemq")[0] == 2


def test_caps_and_budgets_say_in_json_what_they_did(fleet, tmp_path):
    add_device(tmp_path, "cam-1")
    told = json.loads(fleet("caps", "set", "--device", "cam-1", "--upload", "1MB", "--json")[1])
    assert told == {
        "schema": "edgesync.caps-set/1",
        "scope": "device",
        "target": "cam-1",
        "upload": "1MB",
        "download": "",
        "zone": "UTC",
        "until": None,
    }
    told = json.loads(fleet("caps", "clear", "--device", "cam-1", "--json")[1])
    assert told == {"schema": "edgesync.caps-clear/1", "scope": "device", "target": "cam-1"}
    told = json.loads(fleet("budget", "set", "2GB", "--site", "unknown", "--json")[1])
    assert told == {
        "schema": "edgesync.budget-set/1",
        "site": "unknown",
        "limit": 2_000_000_000,
        "zone": "UTC",
    }
    told = json.loads(fleet("budget", "clear", "--site", "unknown", "--json")[1])
    assert told == {"schema": "edgesync.budget-clear/1", "site": "unknown"}


@pytest.mark.parametrize("command", [("caps", "set", "--upload", "1MB"), ("budget", "set", "2GB")])
def test_a_site_without_devices_is_warned_of_and_an_unprintable_one_refused(
    fleet, tmp_path, command
):
    add_device(tmp_path, "cam-1")  # never seen: at the site "unknown"
    code, out, err = fleet(*command, "--site", "unknown")
    assert (code, err) == (0, "")
    code, out, err = fleet(*command, "--site", "nosuch")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("edgesync: no device is at site nosuch")
    assert "site nosuch" in out
    code, out, err = fleet(*command, "--site", "a\x1b[2J")
    assert (code, out, err.count("\n"), "\x1b" in err) == (2, "", 1, False)


def test_a_cap_for_a_device_that_is_not_there_exits_6(fleet):
    assert fleet("caps", "set", "--device", "nobody", "--upload", "1MB")[0] == 6
    assert fleet("caps", "clear", "--device", "nobody")[0] == 6


def test_a_cap_that_begins_with_a_minus_is_no_rate(fleet):
    code, _out, err = fleet("caps", "set", "--site", "a", "--download=-5")
    assert (code, err.count("\n")) == (2, 1)
    assert "--download: '-5' is not a rate" in err
