"""Changes of a machine's network are heard, in a namespace of our own."""

import os
import subprocess
import sys

import pytest

WATCH = """
import asyncio, contextlib, subprocess
from edgesync.io import network_watch

async def main():
    changed = asyncio.Event()
    task = asyncio.create_task(network_watch.follow(changed.set))
    def ip(*words):
        return asyncio.to_thread(subprocess.run, ["ip", *words], check=True)
    async with asyncio.timeout(60):
        while not changed.is_set():  # until it listens
            await ip("link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
            await ip("address", "add", "10.9.8.7/24", "dev", "cable0")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await changed.wait()
            await ip("link", "delete", "cable0")
        print("heard an address", flush=True)
        await ip("link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
        await ip("address", "add", "10.9.8.7/24", "dev", "cable0")
        await ip("link", "set", "cable0", "up")
        await ip("link", "set", "cable1", "up")
        while network_watch.view()[0] != ("10.9.8.7",):
            changed.clear()
            await ip("route", "replace", "default", "via", "10.9.8.1")
        await changed.wait()
        print("heard a route", flush=True)
    task.cancel()

asyncio.run(main())
"""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_address_and_a_route_that_come_are_heard() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", WATCH],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.splitlines() == ["heard an address", "heard a route"], done.stderr
