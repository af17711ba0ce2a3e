"""mDNS on loopback: agents of one host find each other, and a flood of invented peers changes nothing."""

import asyncio
import os
import subprocess
import sys

import pytest

from device.discovery import CACHE_RECORDS, Candidate, Discovery, Verdict
from edgesync import limits
from edgesync.ids import PeerKey
from edgesync.testing import mdns_flood
from tests.swarm_fleet import until

MOVED = """
import asyncio, logging, subprocess
from device.discovery import Discovery
from edgesync.ids import PeerKey

class Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.event = asyncio.Event()
    def emit(self, record):
        print(self.format(record), flush=True)
        self.event.set()

async def main():
    said = Said()
    logging.getLogger().addHandler(said)
    async def dial(candidate):
        return "unreachable"
    discovery = Discovery(
        device_id="es-test-1", key=PeerKey("1" * 64), port=7001, wanted=lambda: True, on_candidate=dial
    )
    def ip(*words):
        return asyncio.to_thread(subprocess.run, ["ip", *words], check=True)
    await ip("link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
    await ip("address", "add", "10.9.8.7/24", "dev", "cable0")
    await ip("link", "set", "cable0", "up")
    await ip("link", "set", "cable1", "up")
    task = asyncio.create_task(discovery.run())
    async with asyncio.timeout(60):
        while discovery._info is None:
            await asyncio.sleep(0.05)
        await ip("address", "delete", "10.9.8.7/24", "dev", "cable0")
        await said.event.wait()
        await ip("address", "add", "10.9.8.8/24", "dev", "cable0")
        discovery.interfaces_changed()
        while discovery._addresses != ("10.9.8.8",) or discovery._info is None:
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

asyncio.run(main())
"""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_address_that_goes_is_one_line_of_the_log() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", MOVED],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "mDNS could not be sent, the network of this machine may have changed: Network is unreachable"
    ]


class Finder:
    def __init__(self, name: str, key: str, port: int, verdict: Verdict = "connected") -> None:
        self.found: list[Candidate] = []
        self.verdict: Verdict = verdict
        self.wanted = True
        self.discovery = Discovery(
            device_id=name,
            key=PeerKey(key * 64),
            port=port,
            interface="127.0.0.1",
            versions=lambda: (1, 7),
            wanted=lambda: self.wanted,
            on_candidate=self.dial,
        )

    async def dial(self, candidate: Candidate) -> Verdict:
        self.found.append(candidate)
        return self.verdict if candidate.id.startswith("es-test-") else "unreachable"


async def test_two_agents_of_one_host_find_each_other() -> None:
    one, two = Finder("es-test-1", "1", 7001), Finder("es-test-2", "2", 7002)
    tasks = [asyncio.ensure_future(finder.discovery.run()) for finder in (one, two)]
    try:
        await until(lambda: any(c.id == "es-test-2" for c in one.found), within_s=15)
        await until(lambda: any(c.id == "es-test-1" for c in two.found), within_s=15)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    (seen,) = {c.addresses for c in one.found if c.id == "es-test-2"}
    assert seen == (("127.0.0.1", 7002),)
    assert {c.timestamp_version for c in one.found if c.id == "es-test-2"} == {7}


async def test_flood_stays_bounded() -> None:
    victim = Finder("es-test-3", "3", 7003)
    task = asyncio.ensure_future(victim.discovery.run())
    try:
        await until(lambda: victim.discovery._info is not None, within_s=10)
        begun = asyncio.get_running_loop().time()
        await asyncio.to_thread(
            mdns_flood.flood, interface="127.0.0.1", records=6000, seconds=2.0, seed=9
        )
        await until(lambda: len(victim.discovery.sightings) > 0, within_s=5)
        elapsed = asyncio.get_running_loop().time() - begun
        assert len(victim.discovery.sightings) <= limits.MAX_PEER_CANDIDATES
        assert victim.discovery._zeroconf is not None
        cache = victim.discovery._zeroconf.zeroconf.cache
        assert cache._total_records <= CACHE_RECORDS + 64
        dials = sum(not c.id.startswith("es-test-") for c in victim.found)
        assert dials <= elapsed / limits.MIN_DIAL_INTERVAL_S + 1
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
