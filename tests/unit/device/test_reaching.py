"""QUIC or TLS: the verdict about UDP with time as an argument, and who wins a dial."""

import asyncio
import random

import pytest

from device import reaching
from device.reaching import UdpVerdict, reach
from edgesync.errors import (
    NotAuthorizedError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
)

WHERE = ("127.0.0.1", 9)


def test_pauses_grow_to_a_bound_and_an_answer_forgets_them() -> None:
    verdict = UdpVerdict(random.Random(1))
    pauses = []
    for _ in range(12):
        verdict.blocked("net", now=0.0)
        pauses.append(verdict.probe_at("net"))
    assert all(p is not None and p <= 1.25 * reaching.MAX_PAUSE_S for p in pauses)
    assert pauses[0] is not None
    assert pauses[0] <= 1.25 * reaching.MIN_PAUSE_S
    assert verdict.is_blocked("net")
    assert not verdict.is_blocked("another")
    assert verdict.open("net")
    assert not verdict.open("net")
    assert verdict.probe_at("net") is None


def test_few_networks_are_remembered() -> None:
    verdict = UdpVerdict()
    for number in range(100):
        verdict.blocked(str(number), now=0.0)
    assert not verdict.is_blocked("0")
    assert verdict.is_blocked("99")


async def answered() -> None:
    return None


async def silent() -> None:
    raise PeerTimeoutError("silence")


class Dials:
    def __init__(self, quic: Exception | None, tls: Exception | None) -> None:
        self.outcome = {False: quic, True: tls}
        self.made: list[str] = []

    async def __call__(self, *, over_tls: bool, timeout_s: float) -> str:
        del timeout_s
        name = "tls" if over_tls else "quic"
        self.made.append(name)
        await asyncio.sleep(0)
        if (error := self.outcome[over_tls]) is not None:
            raise error
        return name


async def test_quic_is_enough_where_it_answers() -> None:
    dials = Dials(None, None)
    assert await reach(UdpVerdict(), WHERE, dials, timeout_s=1) == "quic"
    assert dials.made == ["quic"]


async def test_what_quic_answered_is_not_asked_again_by_tls() -> None:
    dials = Dials(NotAuthorizedError("no"), None)
    with pytest.raises(NotAuthorizedError):
        await reach(UdpVerdict(), WHERE, dials, timeout_s=1)
    assert dials.made == ["quic"]


async def test_silence_leads_to_tls_and_is_remembered() -> None:
    verdict = UdpVerdict()
    dials = Dials(PeerTimeoutError("silence"), None)
    network = reaching.network_towards(WHERE)
    assert await reach(verdict, WHERE, dials, timeout_s=1) == "tls"
    assert not verdict.is_blocked(network)
    assert not await reaching.probe(verdict, WHERE, silent)
    assert verdict.is_blocked(network)
    assert await reach(verdict, WHERE, dials, timeout_s=1) == "tls"
    assert dials.made == ["quic", "tls", "tls"]


async def test_tls_that_was_first_after_an_outage_is_no_verdict_about_udp() -> None:
    verdict = UdpVerdict()
    network = reaching.network_towards(WHERE)
    dials = Dials(PeerTimeoutError("silence"), None)
    assert await reach(verdict, WHERE, dials, timeout_s=1) == "tls"
    due = verdict.probe_at(network)
    assert due is not None
    assert due <= asyncio.get_running_loop().time()
    assert await reaching.probe(verdict, WHERE, answered)
    assert verdict.probe_at(network) is None


def test_a_suspicion_does_not_shorten_a_verdict() -> None:
    verdict = UdpVerdict()
    assert verdict.blocked("net", now=0.0)
    due = verdict.probe_at("net")
    verdict.suspect("net", now=1.0)
    assert verdict.probe_at("net") == due
    assert not verdict.blocked("net", now=2.0)


async def test_both_dead_is_no_verdict_about_udp() -> None:
    verdict = UdpVerdict()
    dials = Dials(PeerTimeoutError("silence"), PeerUnreachableError("the proxy p:1 answered 403"))
    with pytest.raises(PeerUnreachableError, match="the proxy p:1 answered 403; by UDP: silence"):
        await reach(verdict, WHERE, dials, timeout_s=1)
    assert not verdict.is_blocked(reaching.network_towards(WHERE))


async def test_what_tls_answered_is_told_where_quic_was_silent() -> None:
    dials = Dials(PeerTimeoutError("silence"), NotAuthorizedError("another gateway"))
    with pytest.raises(NotAuthorizedError):
        await reach(UdpVerdict(), WHERE, dials, timeout_s=1)


async def test_a_slow_path_and_a_refusal_by_quic_are_not_blocked_but_asked_less_often() -> None:
    network = reaching.network_towards(WHERE)

    async def refused() -> None:
        raise PeerBusyError("later", retry_after_s=1)

    slow, busy = UdpVerdict(), UdpVerdict()
    assert not await reaching.probe(slow, WHERE, silent, heard=lambda: True)
    assert not await reaching.probe(busy, WHERE, refused)
    for verdict in (slow, busy):
        assert not verdict.is_blocked(network)
        due = verdict.probe_at(network)
        assert due is not None
        assert due > asyncio.get_running_loop().time()


@pytest.mark.parametrize("stands", [True, False])
async def test_silence_is_blocked_only_while_tls_stands(stands: bool) -> None:
    verdict = UdpVerdict()

    async def tls_stands() -> bool:
        return stands

    await reaching.probe(verdict, WHERE, silent, tls_stands=tls_stands)
    assert verdict.is_blocked(reaching.network_towards(WHERE)) is stands


async def test_a_probe_that_is_answered_ends_the_verdict() -> None:
    verdict = UdpVerdict()
    network = reaching.network_towards(WHERE)
    verdict.blocked(network, now=0.0)

    assert not await reaching.probe(verdict, WHERE, silent)
    assert verdict.is_blocked(network)
    assert await reaching.probe(verdict, WHERE, answered)
    assert not verdict.is_blocked(network)
