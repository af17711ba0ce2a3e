import json
import os

import pytest

from edgesync.errors import ConfigError, ExitCode
from edgesync.storage.datadir import DataDir, choose_path, default_path, role_of


def test_create_then_open_either_way(tmp_path):
    made = DataDir.create(tmp_path / "gw", "gateway")
    assert (made.path.stat().st_mode & 0o777) == 0o700
    assert DataDir.open(tmp_path / "gw", "gateway") == made
    assert DataDir.open(tmp_path / "gw").role == "gateway"
    assert not DataDir.exists(tmp_path)
    agent = DataDir.create(tmp_path / "agent", "agent")
    assert (agent.path.stat().st_mode & 0o777) == 0o755


def test_missing_says_what_to_do(tmp_path):
    with pytest.raises(
        ConfigError, match=r"not joined: on the gateway run edgesync token create"
    ) as info:
        DataDir.open(tmp_path / "no", "agent")
    assert info.value.exit_code is ExitCode.CONFIG
    with pytest.raises(ConfigError, match="edgesync gateway init"):
        DataDir.open(tmp_path / "no", "gateway")
    with pytest.raises(ConfigError, match="not an EdgeSync data directory"):
        DataDir.open(tmp_path / "no")


def test_other_role_newer_format_and_damage(tmp_path):
    DataDir.create(tmp_path / "gw", "gateway")
    with pytest.raises(ConfigError, match=r"is a gateway's data directory, not an agent's"):
        DataDir.open(tmp_path / "gw", "agent")
    with pytest.raises(ConfigError, match=r"is a gateway's data directory, not an agent's"):
        DataDir.create(tmp_path / "gw", "agent")
    with pytest.raises(ConfigError, match="already"):
        DataDir.create(tmp_path / "gw", "gateway")
    role = tmp_path / "gw" / "role"
    for content, message in (
        (json.dumps({"role": "gateway", "format": 99}), "newer version"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"role": "king", "format": 1}), "names no role"),
        (json.dumps({"role": "agent"}), "names no format"),
        ("[" * 4000, "not JSON"),
    ):
        role.write_text(content)
        with pytest.raises(ConfigError, match=message):
            DataDir.open(tmp_path / "gw", "gateway")


def test_create_keeps_off_what_is_not_ours(tmp_path):
    (tmp_path / "letters").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        DataDir.create(tmp_path, "agent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make"):
        DataDir.create(tmp_path / "file" / "x", "agent")


def test_lock_names_the_holder(tmp_path):
    made = DataDir.create(tmp_path / "gw", "gateway")
    assert made.holder() is None
    with made.lock():
        assert made.holder() == os.getpid()
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
            made.lock()
    assert made.holder() is None
    made.lock().close()


def test_choose_path(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGESYNC_DATA", raising=False)
    assert choose_path("agent", None) == default_path("agent")
    monkeypatch.setenv("EDGESYNC_DATA", str(tmp_path))
    assert choose_path("agent", None) == tmp_path
    assert choose_path("agent", tmp_path / "x") == tmp_path / "x"
    assert DataDir(default_path("agent"), "agent").config.as_posix() == "/etc/edgesync/agent.toml"
    assert DataDir(tmp_path, "gateway").config == tmp_path / "gateway.toml"


def fail_while_building(path):
    with DataDir.building(path, "gateway") as made:
        made.keys.mkdir()
        (made.keys / "x").write_text("secret")
        raise RuntimeError


def test_building_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "gw"
    with pytest.raises(RuntimeError):
        fail_while_building(path)
    assert [entry.name for entry in path.iterdir()] == ["lock"]
    # What a killed process leaves: content and the marker, no role.
    (path / ".building").touch()
    (path / "gateway.db").write_text("half")
    with DataDir.building(path, "gateway") as made:
        assert not made.database.exists()
        with pytest.raises(ConfigError, match="in use"):
            DataDir.create(path, "gateway")
    assert role_of(path) == "gateway"
    assert not (path / ".building").exists()
