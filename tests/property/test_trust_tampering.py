"""Whatever is changed in signed metadata, the device's code refuses it, and only with errors of the project's own."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.metadata import MetaFile

from edgesync import manifest, trust
from edgesync.errors import VerificationError
from edgesync.testing.metadata import FleetMetadata
from edgesync.trust import MetadataUpdate

NOW = 1_800_000_000.0
FLEET = FleetMetadata(utc_now=NOW)
FLEET.add_bundle("app", "1.0", custom={"hardware": ["pi4"]})
FLEET.add_bundle("fw", "2", kind="firmware")
FLEET.commit("bundles")
FLEET.new_root()
FLEET.commit()
START = trust.bootstrap({1: FLEET.files["root/1"]}, FLEET.pin())
UPDATE = FLEET.update_for(START)
WHOLE = trust.apply(START, UPDATE, utc_now=NOW)


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, leaves and containers."""
    found = [here] if here else []
    if isinstance(value, dict):
        for key in value:
            found += paths(value[key], (*here, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += paths(item, (*here, index))
    return found


def changed(value: Any, at: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    place = copy
    for key in at[:-1]:
        place = place[key]
    if new is DELETE:
        del place[at[-1]]
    else:
        place[at[-1]] = new
    return copy


DELETE = object()


def other(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value, DELETE]
    if isinstance(value, int):
        return [value + 1, value - 1, str(value), DELETE]
    if isinstance(value, str):
        return [
            value + "x",
            value[:-1],
            value.swapcase() if value.swapcase() != value else "y",
            0,
            DELETE,
        ]
    return [None, DELETE, [] if value != [] else {}]


def tampered(data: bytes) -> list[bytes]:
    value = json.loads(data)
    return [
        json.dumps(changed(value, at, new)).encode()
        for at in paths(value)
        for new in other(find(value, at))
    ]


def find(value: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        value = value[key]
    return value


def refused(update: MetadataUpdate) -> None:
    for call in (
        lambda: trust.wanted(START, update),
        lambda: trust.apply(START, update, utc_now=NOW),
    ):
        try:
            call()
        except VerificationError:
            continue
        # ``wanted`` may ask for a file nobody has: what was changed is its hash. It never passes as complete.
        assert call() != [], "tampered metadata passed as complete"
        if not isinstance(call(), list):
            pytest.fail("tampered metadata was accepted")


def test_every_field_of_the_timestamp():
    versions = tampered(FLEET.files["timestamp"])
    assert len(versions) > 40
    for data in versions:
        refused(MetadataUpdate(UPDATE.roots, data, UPDATE.blobs))


def test_every_field_of_the_next_root():
    # One key, one signature: none is spare.
    for data in tampered(FLEET.files["root/2"]):
        with pytest.raises(VerificationError):
            trust.add_root(START, data)


def test_every_field_of_the_first_root():
    for data in tampered(FLEET.files["root/1"]):
        with pytest.raises(VerificationError):
            trust.bootstrap({1: data}, FLEET.pin())


@pytest.mark.parametrize("role", ["snapshot", "targets", "regions", "bundles"])
def test_every_field_of_what_is_named_by_hash(role):
    data = dict(WHOLE.delegated)["bundles"] if role == "bundles" else getattr(WHOLE, role)
    digest = manifest.digest(data)
    for version in tampered(data):
        # Under the honest digest (a liar's memory), and under its own (a liar's file): neither gets in.
        under_old = {**UPDATE.blobs, digest: version}
        under_own = {k: v for k, v in UPDATE.blobs.items() if k != digest}
        under_own[manifest.digest(version)] = version
        with pytest.raises(VerificationError):
            trust.apply(
                START, MetadataUpdate(UPDATE.roots, UPDATE.timestamp, under_old), utc_now=NOW
            )
        with pytest.raises(VerificationError):
            trust.apply(
                START, MetadataUpdate(UPDATE.roots, UPDATE.timestamp, under_own), utc_now=NOW
            )


@pytest.mark.parametrize("role", ["snapshot", "targets", "bundles"])
def test_every_field_of_a_role_whose_hash_a_thief_of_the_keys_above_can_fix(role):
    """Snapshot and timestamp keys stolen: hashes match, and still nothing below them can be changed."""
    thief = FleetMetadata(utc_now=NOW)
    thief.add_bundle("app", "1.0")
    thief.commit("bundles")
    state = thief.bootstrap()
    whole = thief.accepted()
    data = dict(whole.delegated)["bundles"] if role == "bundles" else getattr(whole, role)
    versions = tampered(data)
    for version in versions[:: max(1, len(versions) // 60)]:
        if role == "snapshot":
            thief.timestamp.snapshot_meta = MetaFile.from_data(
                thief.snapshot.version, version, ["sha256"]
            )
            thief.commit(snapshot=False)
        else:
            number = getattr(thief, role).version
            thief.snapshot.meta[f"{role}.json"] = MetaFile.from_data(number, version, ["sha256"])
            thief.commit()
        thief.files[f"sha256/{manifest.digest(version)}"] = version
        try:
            view = thief.accepted(state).view
        except VerificationError:
            continue
        # TUF signs what a file means: a time in lower case means the same.
        assert (view.bundles, view.regions, view.expiries["bundles"]) == (
            whole.view.bundles,
            whole.view.regions,
            whole.view.expiries["bundles"],
        )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_change_nothing(data):
    name = data.draw(st.sampled_from(["timestamp", "root/2"]))
    raw = bytearray(FLEET.files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    update = MetadataUpdate(
        {2: bytes(raw) if name == "root/2" else FLEET.files["root/2"]},
        bytes(raw) if name == "timestamp" else FLEET.files["timestamp"],
        UPDATE.blobs,
    )
    try:
        state = trust.apply(START, update, utc_now=NOW)
    except VerificationError:
        return
    # White space outside of strings is not signed in TUF; what the bytes say is.
    assert state.view == WHOLE.view


@settings(max_examples=40, deadline=None)
@given(
    clock=st.floats(0, 5e9),
    floor=st.none() | st.floats(0, 4e9),
    elapsed=st.floats(0, 1e8),
    later=st.floats(0, 1e8),
)
def test_trusted_time_never_runs_backwards(clock, floor, elapsed, later):
    """With a floor: neither as time passes, nor below the floor, nor with the clock's choice of year."""
    now = trust.trusted_time(clock, floor, elapsed)
    if floor is None:
        assert now == clock
        return
    assert now >= floor + elapsed or now == pytest.approx(floor + elapsed)
    assert trust.trusted_time(clock + later, floor, elapsed + later) >= now or clock > floor
    assert trust.trusted_time(0.0, floor, elapsed) <= now
