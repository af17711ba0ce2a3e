"""Metadata from couriers: junk under a root's name is dropped and asked for elsewhere, the cache is bounded."""

import hashlib

import pytest

from device import metadata as module
from device.metadata import Metadata
from device.trust_store import Clocks, TrustStore
from edgesync.errors import EdgeSyncError, NotFoundError, VerificationError
from edgesync.ids import Digest
from edgesync.testing.metadata import FleetMetadata

NOW = 1_800_000_000.0


class Sources:
    """Who can be asked, in this order; each is a table from name to bytes."""

    def __init__(self, *tables):
        self.tables = list(tables)
        self.asked = []

    async def fetch(self, name, max_bytes, check):
        self.asked.append(name)
        error = NotFoundError(f"nobody has {name}")
        for table in self.tables:
            if name in table:
                try:
                    await check(table[name])
                except EdgeSyncError as exc:
                    error = exc
                else:
                    return table[name]
        raise error


@pytest.fixture
def fleet():
    made = FleetMetadata(utc_now=NOW)
    made.add_bundle("app", "1.0")
    made.commit("bundles")
    return made


@pytest.fixture
def store(tmp_path, fleet):
    clocks = Clocks(utc=lambda: NOW, running=lambda: 1000.0)
    with TrustStore.create(tmp_path, fleet.bootstrap(), clocks=clocks) as made:
        made.accept(fleet.update_for(made.state))
        yield made


def rotated(fleet):
    """A timestamp that makes root 2 necessary."""
    fleet.new_root("timestamp", "snapshot")
    fleet.add_bundle("app", "2.0")
    fleet.commit("targets", "bundles")
    return fleet.files["timestamp"]


@pytest.mark.parametrize("junk", [b"junk", b"{}", b"x" * 100_000])
async def test_junk_a_courier_brought_as_a_root_is_asked_for_elsewhere(fleet, store, junk):
    sources = Sources(fleet.files)
    metadata = Metadata(store, fetch=sources.fetch, executor=None)
    timestamp = rotated(fleet)
    metadata.remember("root/2", junk)
    assert await metadata.offer(timestamp)
    assert (metadata.problem, metadata.trusted.root_version) == ("", 2)
    assert metadata.trusted.find("app", "2.0") is not None
    assert sources.asked.count("root/2") == 1


async def test_a_sound_root_of_a_courier_is_not_asked_for(fleet, store):
    sources = Sources(fleet.files)
    metadata = Metadata(store, fetch=sources.fetch, executor=None)
    timestamp = rotated(fleet)
    metadata.remember("root/2", fleet.files["root/2"])
    assert await metadata.offer(timestamp)
    assert "root/2" not in sources.asked


async def test_a_root_of_somebody_else_is_not_the_end(fleet, store):
    other = FleetMetadata(utc_now=NOW)
    other.new_root("timestamp")
    liar = {"root/2": other.files["root/2"]}
    metadata = Metadata(store, fetch=Sources(liar, fleet.files).fetch, executor=None)
    assert await metadata.offer(rotated(fleet))
    assert metadata.trusted.root_version == 2


async def test_where_only_junk_is_to_be_had_it_is_tried_again(fleet, store):
    async def fetch(name, _max_bytes, _check):
        return b"junk" if name == "root/2" else fleet.files[name]

    metadata = Metadata(store, fetch=fetch, executor=None)
    timestamp = rotated(fleet)
    metadata.remember("root/2", b"junk")
    assert not await metadata.offer(timestamp)
    assert metadata.incomplete
    assert "nobody in reach has a sound root/2" in metadata.problem
    honest = Metadata(store, fetch=Sources(fleet.files).fetch, executor=None)
    assert await honest.offer(timestamp)


async def test_a_file_too_large_to_keep_drives_nothing_out(fleet, store, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 100)
    metadata = Metadata(store, fetch=Sources().fetch, executor=None)
    kept, newer = b"a" * 60, b"b" * 60
    names = [f"sha256/{hashlib.sha256(data).hexdigest()}" for data in (kept, newer)]
    metadata.remember(names[0], kept)
    metadata.remember("root/9", bytes(101))
    assert await metadata.blob(Digest(names[0][7:]), 100) == kept
    metadata.remember(names[1], newer)
    assert await metadata.blob(Digest(names[1][7:]), 100) == newer
    with pytest.raises(NotFoundError):
        await metadata.blob(Digest(names[0][7:]), 100)


async def test_a_blob_that_is_something_else_is_asked_for(fleet, store):
    right = b"right"
    digest = Digest(hashlib.sha256(right).hexdigest())
    name = f"sha256/{digest}"
    metadata = Metadata(store, fetch=Sources({name: b"wrong"}, {name: right}).fetch, executor=None)
    metadata.remember(name, b"junk")
    assert await metadata.blob(digest, 100) == right
    liar = Metadata(store, fetch=Sources({name: b"wrong"}).fetch, executor=None)
    with pytest.raises(VerificationError, match="is something else"):
        await liar.blob(digest, 100)
