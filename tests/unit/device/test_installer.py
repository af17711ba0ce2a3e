"""What the installer tells of an assignment: each step once, also over restarts, repairs and missing metadata."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import TargetFile

from device.bundle_store import BundleStore, StagedBundle
from device.executions import Execution, Executions
from device.installer import Installer
from device.metadata import Metadata
from device.state import StateDatabase
from device.trust_store import Clocks, TrustStore
from edgesync import limits
from edgesync.assignment import Entry
from edgesync.errors import NotFoundError
from edgesync.ids import Digest
from edgesync.testing.metadata import FleetMetadata
from tests.crash.builders import Built, build

NOW = 1_800_000_000.0
STEPS = ["downloading", "downloaded", "installing", "verifying", "succeeded"]


class Swarm:
    """Has every piece of the bundles it was given; ``gate`` holds a transfer up."""

    def __init__(self, *bundles: Built) -> None:
        self.bundles = {built.digest: built for built in bundles}
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch_bundle(self, staged: StagedBundle) -> None:
        await self.gate.wait()
        for index in list(staged.have.missing()):
            staged.write_piece(index, self.bundles[staged.digest].pieces[index])

    def waiting_reason(self, _digest: Digest) -> str:
        return ""


class Device:
    """The stores of one device, and an installer that can be restarted on them."""

    def __init__(self, directory: Path, *bundles: Built) -> None:
        self.directory = directory
        self.fleet = FleetMetadata(utc_now=NOW)
        self.swarm = Swarm(*bundles)
        self.manifests = {f"sha256/{built.digest}": built.data for built in bundles}
        for built in bundles:
            self.list(built)
        self.state = StateDatabase.open(directory / "state.db")
        self.store = BundleStore.open(directory, self.state)
        self.trust = TrustStore.create(
            directory, self.fleet.bootstrap(), clocks=Clocks(lambda: NOW, lambda: 1000.0)
        )
        self.told: list[str] = []
        self.heard = asyncio.Event()

    def list(self, built: Built) -> None:
        path = f"files/app@{built.manifest.version}"
        self.fleet.add_bundle("app", built.manifest.version, path=path)
        target = TargetFile.from_data(path, built.data, ["sha256"])
        target.unrecognized_fields = self.fleet.bundles.targets[path].unrecognized_fields
        self.fleet.bundles.targets[path] = target
        self.fleet.commit("bundles")

    async def fetch(self, name: str, _max_bytes: int, _check: Any) -> bytes:
        files = self.fleet.files | self.manifests
        if name not in files:
            raise NotFoundError(f"nobody has {name}")
        return files[name]

    async def start(self) -> None:
        self.metadata = Metadata(self.trust, fetch=self.fetch, executor=self.store.executor)
        await self.metadata.refresh()
        self.installer = Installer(
            store=self.store,
            trust_store=self.trust,
            executions=Executions(self.state),
            metadata=self.metadata,
            swarm=self.swarm,
            hardware="",
            on_change=self._changed,
        )

    async def _changed(self, row: Execution, news: bool) -> None:
        if news:
            self.told.append(row.step or row.status)
        self.heard.set()

    def row(self, built: Built) -> Execution:
        return self.installer.rows[built.digest]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                self.heard.clear()
                await self.heard.wait()

    async def idle(self) -> None:
        """Until nothing is worked on."""
        async with asyncio.timeout(30):
            while tasks := list(self.installer._tasks.values()):
                await asyncio.wait(tasks)

    async def stop(self) -> None:
        await self.installer.close()

    async def close(self) -> None:
        await self.stop()
        self.store.close()
        self.state.close()
        self.trust.close()


def entry(built: Built, assignment: str = "a-1") -> Entry:
    return Entry(
        kind="files",
        name="app",
        version=built.manifest.version,
        target_hash=built.digest,
        target_length=len(built.data),
        assignment_id=assignment,
    )


ONE = build({"a": b"1" * 9000, "b": b"2" * 5000}, version="1")
TWO = build({"a": b"1" * 9000, "b": b"3" * 5000}, version="2")
THREE = build({"a": b"1" * 9000, "b": b"4" * 5000}, version="3")


@pytest.fixture
async def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Device]:
    monkeypatch.setattr(limits, "RESERVE_BYTES", 4096)
    made = Device(tmp_path, ONE, TWO, THREE)
    await made.start()
    yield made
    await made.close()


async def test_each_step_of_an_assignment_is_told_once(device: Device) -> None:
    device.installer.want([entry(ONE)])
    await device.idle()
    assert device.told == STEPS
    device.installer.want([entry(ONE)])  # a set that was only signed anew
    await device.idle()
    await device.stop()
    await device.start()
    device.installer.want([entry(ONE)])
    await device.idle()
    assert device.told == STEPS
    device.installer.want([entry(ONE, "a-2")])
    await device.idle()
    assert device.told == [*STEPS, "succeeded"]


async def test_a_repair_is_no_second_success(device: Device) -> None:
    device.installer.want([entry(ONE)])
    await device.idle()
    path = device.store.bundle_path("app", "1")
    (path / "b").write_bytes(b"edited")
    assert device.store.verify(ONE.digest) != []
    device.installer.damaged(ONE.digest)
    await device.idle()
    assert (path / "b").read_bytes() == b"2" * 5000
    assert (device.told, device.row(ONE).status) == (STEPS, "succeeded")


async def test_metadata_that_lists_it_no_more_ends_nothing(device: Device) -> None:
    device.installer.want([entry(ONE)])
    await device.idle()
    del device.fleet.bundles.targets["files/app@1"]
    device.fleet.commit("bundles")
    await device.metadata.refresh()
    device.installer.want([entry(ONE)])
    # An assignment that does wait says so; by then the one before has been looked at.
    for _ in range(3):
        await asyncio.sleep(0)
    assert device.row(ONE).status == "succeeded"
    device.list(ONE)
    await device.metadata.refresh()
    device.installer.look_again()
    await device.idle()
    assert device.told == STEPS


async def test_what_was_removed_is_told_no_more(device: Device) -> None:
    for built in (ONE, TWO, THREE):
        device.installer.want([entry(built, f"a-{built.manifest.version}")])
        await device.idle()
    # The active one and the one before stay.
    assert sorted(row.version for row in device.installer.rows.values()) == ["2", "3"]
    assert sorted(row.version for row in Executions(device.state).all()) == ["2", "3"]
    device.installer.removed(TWO.digest)
    assert [row.version for row in device.installer.rows.values()] == ["3"]


async def test_what_is_fetched_or_installed_is_in_use(device: Device) -> None:
    device.swarm.gate.clear()
    device.installer.want([entry(ONE)])
    await device.until(lambda: device.told == ["downloading"])
    assert device.installer.is_fetching(ONE.digest)
    assert not device.installer.is_fetching(TWO.digest)
    device.swarm.gate.set()
    await device.until(lambda: "installing" in device.told)
    assert device.installer.is_fetching(ONE.digest)
    await device.idle()
    assert not device.installer.is_fetching(ONE.digest)
