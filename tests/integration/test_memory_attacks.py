"""What a stranger and a member can make an endpoint hold, measured from outside its process."""

import asyncio
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from edgesync.identity import Identity
from edgesync.testing import hostile_quic, hostile_tls
from edgesync.testing.hostile_quic import MEMBER_ATTACKS, STRANGER_ATTACKS, Target, many_sources

GROWTH = 10 * 1024 * 1024

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc to measure another process"
)


@pytest.fixture(params=["gateway", "device"])
def victim(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgesync.testing.victim", request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    yield json.loads(process.stdout.readline())
    assert process.poll() is None, "the attacks killed the endpoint"
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()


@pytest.mark.slow
async def test_attacks_grow_an_endpoint_by_little(victim: dict[str, Any]) -> None:
    member = Identity.from_pem(victim["key_pem"].encode(), victim["certificate_pem"].encode())
    target = Target(("127.0.0.1", victim["port"]), member, many_sources("127.0.0.1"))
    outcomes = [o async for o in hostile_quic.run_all(target, victim["pid"])]
    for outcome in outcomes:
        print(outcome)
    assert len(outcomes) == len(STRANGER_ATTACKS + MEMBER_ATTACKS)
    worst = max(outcomes, key=lambda o: o.rss_growth_bytes or 0)
    assert (worst.rss_growth_bytes or 0) <= GROWTH, worst
    # and it still serves honest members
    async with hostile_quic.HostileQuic(target.address) as client:
        await client.handshake()
        await client.prove(member)
        client.leave()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gateway"], indirect=True)
async def test_attacks_on_the_tls_port_grow_an_endpoint_by_little(victim: dict[str, Any]) -> None:
    member = Identity.from_pem(victim["key_pem"].encode(), victim["certificate_pem"].encode())
    target = Target(("127.0.0.1", victim["port"]), member, many_sources("127.0.0.1"))
    outcomes = []
    # What the first TLS session costs once, imports and OpenSSL's tables, is no attack's.
    await asyncio.to_thread(honest, target)
    async for outcome in hostile_quic.run_all(
        target,
        victim["pid"],
        by_strangers=tuple(map(beside_honest, hostile_tls.STRANGER_ATTACKS)),
        by_members=tuple(map(beside_honest, hostile_tls.MEMBER_ATTACKS)),
    ):
        print(outcome)
        outcomes.append(outcome)
    assert len(outcomes) == len(hostile_tls.STRANGER_ATTACKS + hostile_tls.MEMBER_ATTACKS)
    worst = max(outcomes, key=lambda o: o.rss_growth_bytes or 0)
    assert (worst.rss_growth_bytes or 0) <= GROWTH, worst


def beside_honest(attack: hostile_quic.Attack) -> hostile_quic.Attack:
    @functools.wraps(attack)
    async def both(target: Target) -> None:
        await asyncio.gather(attack(target), asyncio.to_thread(honest, target))

    return both


def honest(target: Target) -> None:
    """Asks again while it is sent away, as a device does."""
    assert target.member is not None
    until = time.monotonic() + 30
    while True:
        try:
            with hostile_tls.HostileTls(target.address) as client:
                client.handshake()
                client.prove(target.member)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
        else:
            return
