"""An aioquic that does not fit costs speed and is said; it never crashes and never loosens a bound."""

import pytest
from aioquic.quic.recovery import QuicPacketNumberWindow
from aioquic.tls import CipherSuite

from edgesync.transport import ciphers, engine
from edgesync.transport.fast.sending import FastQuicConnection
from edgesync.transport.quic import BoundedQuicConnection


def test_the_installed_aioquic_fits() -> None:
    assert engine.misfits() == []
    assert engine.Connection is FastQuicConnection
    assert engine.transport_warnings() == []


def test_a_name_that_is_gone_falls_back_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Renamed(QuicPacketNumberWindow):
        def __getattribute__(self, name: str) -> object:
            if name == "_lower":
                raise AttributeError(name)
            return super().__getattribute__(name)

    monkeypatch.setattr("aioquic.quic.recovery.QuicPacketNumberWindow", Renamed)
    chosen, warnings = engine._choose()
    assert chosen is BoundedQuicConnection
    assert "window._lower" in warnings[0]


@pytest.mark.parametrize("slow", [True, False])
def test_a_machine_without_aes_instructions_keeps_out_of_its_way(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ciphers, "aes_is_slow", lambda: slow)
    chacha = CipherSuite.CHACHA20_POLY1305_SHA256
    assert (ciphers.preferred()[0] is chacha) == slow
    assert (ciphers.offered() == [chacha]) == slow
    assert set(ciphers.offered()) <= set(ciphers.preferred())
