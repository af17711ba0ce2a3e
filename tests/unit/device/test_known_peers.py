"""Peers kept over a restart."""

from pathlib import Path

from device.known_peers import KnownPeers
from device.state import StateDatabase
from edgesync.ids import PeerKey

A, B = PeerKey("a" * 64), PeerKey("b" * 64)


def test_what_was_saved_last_is_there_after_a_restart(tmp_path: Path) -> None:
    state = StateDatabase.open(tmp_path / "state.db")
    peers = KnownPeers(state)
    assert peers.load() == {}
    peers.save({A: ("10.0.0.1:7443",)})
    peers.save({B: ("10.0.0.2:7443", "[fd00::2]:7443"), A: ("10.0.0.9:1",)})
    state.close()
    state = StateDatabase.open(tmp_path / "state.db")
    found = KnownPeers(state).load()
    assert found == {B: ("10.0.0.2:7443", "[fd00::2]:7443"), A: ("10.0.0.9:1",)}
    assert list(found) == [B, A]
    state.close()
