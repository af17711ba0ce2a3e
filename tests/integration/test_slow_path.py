"""Slow is not dead: real QUIC through a path with two seconds of round trip and 64 kbit/s."""

import asyncio
import hashlib
import random

import pytest

from edgesync import limits
from edgesync.errors import PeerTimeoutError
from edgesync.ids import Digest
from edgesync.testing.slow_path import SlowPath
from edgesync.testing.transport import TestFleet, gathered
from edgesync.transport.endpoint import Attempt
from edgesync.wire.messages import Join, Joined

MANIFEST = Digest("ab" * 32)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("lost", [0, 2])
async def test_a_stranger_joins_over_a_path_slower_than_the_probes(lost: int) -> None:
    async with TestFleet() as fleet:
        gateway, joiner = await fleet.gateway("hub"), await fleet.stranger("new")
        gateway.handler.blobs["root/1"] = b"root" * 1000
        gateway.handler.joins = lambda join: Joined(
            state="accepted", device_id=join.device_id, gateway_id="hub", region="r", root_version=1
        )
        async with SlowPath(
            gateway.address, delay_s=1.0, rate_bytes_s=8000, drop=lambda n, up: n == lost and not up
        ) as path:
            conn = await joiner.endpoint.join(
                path.address, expected_key=gateway.identity.key, timeout_s=3.0
            )
            question = Join(
                token_id="abcdefgh",
                secret=bytes(16),
                public_key=joiner.identity.public_raw,
                signature=bytes(64),
                device_id="new",
            )
            assert isinstance(await conn.ask(question), Joined)
            assert await conn.fetch("root/1", 10_000) == b"root" * 1000


async def test_streams_that_take_turns_are_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_TIMEOUT_S", 1.0)
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        rng = random.Random(7)  # contents of pieces
        ids = [right.shelf.put(rng.randbytes(30_000)) for _ in range(4)]
        async with SlowPath(right.address, delay_s=0.05, rate_bytes_s=20_000) as path:
            conn = await left.endpoint.connect(path.address, expected_key=right.identity.key)
            questions = [gathered(conn.request(MANIFEST, [one], stall_s=1.0)) for one in ids]
            answers = [answer for found in await asyncio.gather(*questions) for answer in found]
            assert {hashlib.sha256(answer.data).digest() for answer in answers} == set(ids)


async def test_a_path_that_carries_nothing_is_given_up() -> None:
    async with TestFleet() as fleet:
        left, right = await fleet.device("left"), await fleet.device("right")
        async with SlowPath(right.address) as path:
            path.up = False
            attempt = Attempt()
            with pytest.raises(PeerTimeoutError):
                await left.endpoint.connect(
                    path.address,
                    expected_key=right.identity.key,
                    timeout_s=0.5,
                    attempt=attempt,
                )
            assert not attempt.heard()
