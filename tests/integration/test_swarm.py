"""Real endpoints, stores, seeder and swarms on loopback."""

import asyncio
from pathlib import Path

import pytest

from device.bundle_store import Bundle
from edgesync import limits
from edgesync.errors import EdgeSyncError
from edgesync.ids import PieceId
from edgesync.transport.connection import PieceAnswer
from tests.swarm_fleet import SwarmFleet, make_content, until


async def test_devices_share_one_copy(tmp_path: Path) -> None:
    content = make_content(size=8_000_000, compressible=True)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway()
        agents = [await fleet.agent(f"d{n}") for n in range(4)]
        staged = await asyncio.gather(*(agent.fetch(content) for agent in agents))
        assert fleet.seeder is not None
        for one in staged:
            assert one.complete
            assert one.durable.complete
        out = fleet.seeder.totals().bytes_out
        assert out <= content.wire_bytes * 1.1
        received = [
            one.counters.bytes_from_gateway + one.counters.bytes_from_peers for one in staged
        ]
        assert all(content.wire_bytes <= size <= content.wire_bytes * 1.02 for size in received)
        seeder = fleet.seeder
        await until(lambda: seeder.min_site_replication() == 4)


async def test_devices_finish_without_the_gateway(tmp_path: Path) -> None:
    content = make_content(size=6_000_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway(upload_limit=3_000_000)
        agents = [await fleet.agent(f"d{n}", upload_limit=1_500_000) for n in range(3)]
        work = [asyncio.ensure_future(agent.fetch(content)) for agent in agents]
        seeder = fleet.seeder
        assert seeder is not None
        await until(lambda: (seeder.min_site_replication() or 0) >= 2, within_s=40)
        await fleet.stop_gateway()
        staged = await asyncio.wait_for(asyncio.gather(*work), 40)
        assert all(one.durable.complete for one in staged)


async def test_late_device_takes_nothing_from_the_gateway(tmp_path: Path) -> None:
    content = make_content(size=3_000_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway()
        first = await fleet.agent("d0")
        await first.fetch(content)
        late = await fleet.agent("d1")
        staged = await late.fetch(content)
        assert staged.counters.bytes_from_gateway == 0
        assert staged.counters.bytes_from_peers == content.wire_bytes
        assert fleet.seeder is not None
        assert fleet.seeder.take_sent() == {"lan": content.wire_bytes}


async def test_resume_after_a_stop_fetches_the_rest_only(tmp_path: Path) -> None:
    content = make_content(size=6_000_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway(upload_limit=2_000_000)
        agent = await fleet.agent("d0")
        work = asyncio.ensure_future(agent.fetch(content))
        await until(lambda: agent.swarm.waiting_reason(content.digest) != "")
        staged = agent.begin(content)
        await until(lambda: staged.have.count > len(staged.have) // 3, within_s=30)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        staged = await asyncio.wait_for(agent.fetch(content), 40)
        received = staged.counters.bytes_from_gateway + staged.counters.bytes_from_peers
        assert received <= content.wire_bytes * 1.1


async def test_assigned_bundles_are_for_the_assigned(tmp_path: Path) -> None:
    content = make_content(size=500_000, access="assigned")
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway()
        one = await fleet.agent("d0", may_read=lambda *_: False)
        two = await fleet.agent("d1")
        fleet.assigned = {one.identity.key: frozenset({content.digest})}
        assert fleet.seeder is not None
        await fleet.seeder.updated(fleet.register, fleet.trusted)  # type: ignore[arg-type]
        await asyncio.wait_for(one.fetch(content), 20)
        work = asyncio.ensure_future(two.fetch(content))
        two.swarm.told_peer(one.identity.key, f"127.0.0.1:{one.endpoint.port}")
        await until(lambda: len(two.swarm.peers()) == 2)
        conn = two.swarm.source(one.identity.key)
        assert conn is not None
        wanted = [next(iter(content.pieces))]
        answers = [answer async for answer in conn.request(content.digest, wanted)]
        assert [answer.missing for answer in answers] == ["refused"]
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        assert two.begin(content).have.count == 0


async def test_poisoner_is_quarantined_and_the_bundle_arrives(tmp_path: Path) -> None:
    content = make_content(size=4_000_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway()
        bad, good = await fleet.agent("bad"), await fleet.agent("good")
        await bad.fetch(content)

        def poison(_bundle: Bundle, _index: int, piece: PieceId, _packed: bool) -> PieceAnswer:
            return PieceAnswer(piece, "identity", b"\0" * 65_536)

        bad.swarm.uploads._cache.clear()
        bad.swarm.uploads._read = poison  # type: ignore[method-assign]
        staged = await asyncio.wait_for(good.fetch(content), 60)
        assert staged.durable.complete
        assert good.swarm.rejected_by_peer()[bad.identity.key] >= 2
        assert staged.counters.pieces_rejected >= 2


async def test_edited_file_is_answered_gone_and_never_sent(tmp_path: Path) -> None:
    content = make_content(size=1_000_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway()
        holder, other = await fleet.agent("d0"), await fleet.agent("d1")
        staged = await holder.fetch(content)
        await asyncio.to_thread(staged.activate)
        edited = holder.store.bundle_path("app", "1.0") / "d" / "f00000"
        edited.write_bytes(b"\1" * edited.stat().st_size)
        holder.swarm.uploads._cache.clear()
        got = await asyncio.wait_for(other.fetch(content), 60)
        assert got.durable.complete
        assert other.swarm.rejected_by_peer() == {}
        held = holder.store.held(content.digest)
        assert held is not None
        assert not held.have.complete


async def test_manifest_comes_from_a_peer_when_the_gateway_is_gone(tmp_path: Path) -> None:
    content = make_content(size=300_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway()
        one, two = await fleet.agent("d0"), await fleet.agent("d1")
        await one.fetch(content)
        name = f"sha256/{content.digest}"
        assert await two.swarm.fetch_any(name, 1_000_000) == content.manifest_bytes
        await fleet.stop_gateway()
        two.swarm.told_peer(one.identity.key, f"127.0.0.1:{one.endpoint.port}")
        found = await asyncio.wait_for(two.swarm.fetch_any(name, 1_000_000), 20)
        assert found == content.manifest_bytes
        with pytest.raises(EdgeSyncError):
            await two.swarm.fetch_any(f"sha256/{'0' * 64}", 1_000_000)


async def test_upload_limit_holds(tmp_path: Path) -> None:
    content = make_content(size=3_000_000)
    async with SwarmFleet(tmp_path) as fleet:
        fleet.publish(content)
        await fleet.start_gateway(upload_limit=1_000_000)
        agent = await fleet.agent("d0")
        begun = asyncio.get_running_loop().time()
        await agent.fetch(content)
        assert asyncio.get_running_loop().time() - begun >= 2.4


async def test_a_receiver_with_the_least_cap_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Two pieces at 8 kB/s: one session from the beginning to the end."""
    async with SwarmFleet(tmp_path) as fleet:
        content = make_content(size=60_000, piece=30_000)
        fleet.publish(content)
        await fleet.start_gateway()
        slow = await fleet.agent("slow", download_limit=limits.MIN_CAP_BYTES_S)
        staged = await slow.fetch(content)
        assert staged.complete
        assert staged.counters.resumes == 0
        (gateway,) = slow.swarm.peers()
        assert gateway["bytes_in"] == content.wire_bytes
