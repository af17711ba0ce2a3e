"""Joining through a proxy: which one is asked, and what the settings file keeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from device import joining
from device.config import AgentSettings
from device.joining import Membership
from edgesync import config, jointoken
from edgesync.cli import main as cli
from edgesync.errors import ConfigError, UsageError
from edgesync.ids import DeviceId, Digest, GatewayId, PeerKey
from edgesync.io.proxy import Proxy, ProxySettings
from edgesync.storage.datadir import DataDir

TOKEN = jointoken.encode(
    jointoken.JoinToken(
        "abcdefgh", b"s" * 32, PeerKey("a" * 64), 1, Digest("b" * 64), ("gw.example:7443",)
    )
)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Proxy | None]:
    """The proxies joins went by, newest last; no gateway is asked."""
    found: list[Proxy | None] = []

    async def ask(data: DataDir, *more: Any) -> Membership:
        proxies = more[-1]
        assert isinstance(proxies, ProxySettings)
        found.append(proxies.towards("gw.example"))
        held = Membership(
            DeviceId("cam-1"), GatewayId("gw"), PeerKey("a" * 64), region="eu", state="accepted"
        )
        held.save(data)
        return held

    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "EDGESYNC_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(joining, "_ask", ask)
    return found


def join(path: Path, proxy: str | None) -> dict[str, Any]:
    return joining.join(path, TOKEN, device_id="cam-1", hardware="", gateway_quic=None, proxy=proxy)


def test_the_flag_is_used_and_kept(
    tmp_path: Path, used: list[Proxy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://other:1")
    assert join(tmp_path / "a", "http://proxy:3128")["settings_written"]
    assert used == [Proxy("proxy", 3128)]
    kept = DataDir.open(tmp_path / "a", "agent").config
    assert config.load(AgentSettings, kept, environ={}).values.proxy == "http://proxy:3128"
    assert kept.stat().st_mode & 0o007 == 0
    join(tmp_path / "b", "none")
    join(tmp_path / "c", None)
    assert used[1:] == [None, Proxy("other", 1)]
    unset = DataDir.open(tmp_path / "c", "agent").config
    assert config.load(AgentSettings, unset, environ={}).values.proxy == ""


def test_a_settings_file_from_before_is_read_and_kept(
    tmp_path: Path, used: list[Proxy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataDir.create(tmp_path / "a", "agent")
    data.config.parent.mkdir(parents=True, exist_ok=True)
    data.config.write_text('proxy = "http://file:1"\n')
    join(data.path, None)
    data.join_file.unlink()
    monkeypatch.setenv("EDGESYNC_PROXY", "http://variable:1")
    join(data.path, None)
    data.join_file.unlink()
    assert not join(data.path, "http://flag:1")["settings_written"]
    assert used == [Proxy("file", 1), Proxy("variable", 1), Proxy("flag", 1)]
    assert data.config.read_text() == 'proxy = "http://file:1"\n'


def test_what_is_no_proxy_is_told_before_anybody_is_asked(
    tmp_path: Path, used: list[Proxy | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"--proxy: what is given is no proxy"):
        join(tmp_path / "a", "ftp://proxy")
    monkeypatch.setenv("HTTPS_PROXY", "ftp://proxy")
    with pytest.raises(ConfigError, match="HTTPS_PROXY: what is given is no proxy"):
        join(tmp_path / "a", None)
    assert not used
    join(tmp_path / "a", "http://proxy")


def test_the_command_says_when_the_flag_is_not_kept(
    tmp_path: Path,
    used: list[Proxy | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = DataDir.create(tmp_path / "a", "agent")
    data.config.parent.mkdir(parents=True, exist_ok=True)
    data.config.write_text("")
    monkeypatch.setenv("EDGESYNC_TOKEN", TOKEN)
    arguments = ["agent", "join", "--proxy", "http://proxy", "--data", str(data.path), "--json"]
    monkeypatch.setattr("sys.argv", ["edgesync", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = capsys.readouterr()
    assert json.loads(told.out)["settings_written"] is False
    assert "agent.toml was there before" in told.err
    assert used == [Proxy("proxy", 3128)]
