"""Real endpoints, stores, seeder and swarms on loopback."""

import asyncio
from pathlib import Path

from tests.swarm_fleet import SwarmFleet, make_content


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
        assert fleet.seeder.min_site_replication() == 4
