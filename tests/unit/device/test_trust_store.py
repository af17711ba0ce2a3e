import os
import shutil
import sqlite3

import pytest

from device import trust_store
from device.trust_store import COPY, MAIN, SAVE_TIME_S, Clocks, TrustStore
from edgesync import assignment, identity, trust
from edgesync.assignment import AssignmentSet, Entry
from edgesync.envelope import SigningKey
from edgesync.errors import (
    ConfigError,
    ConflictError,
    DiskFullError,
    MetadataExpiredError,
    NotAuthorizedError,
    RollbackRefusedError,
    StateCorruptError,
    StorageError,
    VerificationError,
)
from edgesync.testing.metadata import DAY_S, FleetMetadata
from edgesync.trust import MetadataUpdate

NOW = 1_800_000_000.0


class Time:
    """A clock tests turn by hand."""

    def __init__(self):
        self.utc_now, self.running = NOW, 1000.0

    def clocks(self):
        return Clocks(utc=lambda: self.utc_now, running=lambda: self.running)


@pytest.fixture
def fleet():
    made = FleetMetadata(utc_now=NOW)
    made.add_bundle("app", "1.0")
    made.commit("bundles")
    return made


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def store(tmp_path, fleet, time):
    with TrustStore.create(tmp_path, fleet.bootstrap(), clocks=time.clocks()) as made:
        made.accept(fleet.update_for(made.state))
        yield made


def reopened(store, time):
    store.close()
    return TrustStore.open(store._directory, clocks=time.clocks())


def make_set(metadata, *, sequence=7, signer=None, **changes):
    signer = signer or metadata.assign_key
    fields = {
        "fleet": metadata.bootstrap().fleet_id,
        "gateway_key": signer.key,
        "device": "cam-1",
        "device_key": "d" * 64,
        "sequence": sequence,
        "issued": NOW,
        "expires": NOW + assignment.LIFETIME_S,
        "entries": (
            Entry(
                kind="files",
                name="app",
                version="1.0",
                target_hash="a" * 64,
                target_length=10,
                assignment_id="a-1",
            ),
        ),
    }
    return assignment.sign(AssignmentSet(**(fields | changes)), signer)


def take(store, data, keys=None):
    return store.accept_assignments(
        data,
        keys=store.state.view.assign_keys("eu") if keys is None else keys,
        device_id="cam-1",
        device_key="d" * 64,
    )


def test_a_closed_store_writes_nothing_more(store, time):
    store.close()
    again = TrustStore.open(store._directory, clocks=time.clocks())
    again.commit_counter("files", "app", 1)
    store.close()
    with pytest.raises(StorageError):
        store.commit_counter("files", "app", 9)
    again.close()
    with TrustStore.open(store._directory, clocks=time.clocks()) as last:
        assert last.counter("files", "app") == 1


def test_everything_survives_a_restart(store, fleet, time):
    store.commit_counter("files", "app", 3)
    take(store, make_set(fleet))
    state = store.state
    again = reopened(store, time)
    assert again.state == state
    assert again.state.view == state.view
    assert again.counter("files", "app") == 3
    assert again.assignments().sequence == again.assignment_sequence == 7
    assert again.assignment_envelope() == make_set(fleet)
    assert again.problems == ()
    again.close()


def test_files_are_for_their_owner(store):
    for name in (MAIN, COPY):
        assert (store._directory / name).stat().st_mode & 0o777 == 0o600


def test_both_files_hold_the_same(store):
    store.commit_counter("files", "app", 1)
    first, second = (trust_store._read(store._directory / n, read_only=True) for n in (MAIN, COPY))
    assert first == second


@pytest.mark.parametrize("name", [MAIN, COPY])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 10_000),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: flip(path, 3),
        lambda path: flip(path, 2),
    ],
)
def test_one_damaged_copy_is_made_anew_from_the_other(store, time, name, damage):
    store.commit_counter("files", "app", 5)
    state, path = store.state, store._directory / name
    store.close()
    damage(path)
    with reopened(store, time) as again:
        assert again.state == state
        assert again.counter("files", "app") == 5
        assert again.problems == ()
    first, second = (trust_store._read(store._directory / n, read_only=True) for n in (MAIN, COPY))
    assert first == second is not None


def flip(path, divisor):
    data = bytearray(path.read_bytes())
    data[len(data) // divisor] ^= 0x10
    path.write_bytes(data)


def test_no_flipped_bit_is_ever_believed(store, time):
    """One bit anywhere in one file: the other one wins, or the file still says exactly the same."""
    store.commit_counter("files", "app", 5)
    store.close()
    facts = trust_store._read(store._directory / COPY, read_only=True)
    path = store._directory / MAIN
    honest = path.read_bytes()
    for position in range(0, len(honest), 997):
        data = bytearray(honest)
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        assert trust_store._read(path, read_only=True) in (None, facts)


def test_the_higher_generation_wins_whichever_file_has_it(store, time, tmp_path_factory):
    old = tmp_path_factory.mktemp("old")
    for name in (MAIN, COPY):
        store.close()
        shutil.copy(store._directory / name, old / name)
        again = TrustStore.open(store._directory, clocks=time.clocks())
        again.commit_counter("files", "app", again.counter("files", "app") + 1)
        again.close()
        shutil.copy(old / name, store._directory / name)
    with TrustStore.open(store._directory, clocks=time.clocks()) as again:
        assert again.counter("files", "app") == 2


def test_both_lost_says_what_to_do_and_discard_makes_room(store, fleet, time):
    directory = store._directory
    store.close()
    for name in (MAIN, COPY):
        (directory / name).write_bytes(b"not a database")
    with pytest.raises(StateCorruptError, match="edgesync agent recover"):
        TrustStore.open(directory, clocks=time.clocks())
    with pytest.raises(StateCorruptError):
        TrustStore.create(directory, fleet.bootstrap(), clocks=time.clocks())
    TrustStore.discard(directory)
    assert (directory / f"{MAIN}.damaged").exists()
    with TrustStore.create(directory, fleet.bootstrap(), clocks=time.clocks()) as again:
        assert again.state.timestamp is None


def test_missing_altogether(tmp_path):
    with pytest.raises(StateCorruptError, match="agent recover"):
        TrustStore.open(tmp_path)


def test_joining_again_forgets_nothing_and_another_fleet_is_refused(store, fleet, time):
    store.commit_counter("files", "app", 4)
    directory = store._directory
    store.close()
    with TrustStore.create(directory, fleet.bootstrap(), clocks=time.clocks()) as again:
        assert again.counter("files", "app") == 4
        assert again.state.timestamp is not None
    with pytest.raises(ConflictError, match="another data directory"):
        TrustStore.create(directory, FleetMetadata(utc_now=NOW).bootstrap(), clocks=time.clocks())


def test_a_newer_version_s_file_is_left_alone(store, time):
    directory = store._directory
    store.close()
    with sqlite3.connect(directory / MAIN) as db:
        db.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at)"
            " VALUES ('device-trust', 'm999_later', '')"
        )
    db.close()
    before = (directory / MAIN).read_bytes()
    with pytest.raises(ConfigError, match="newer version"):
        TrustStore.open(directory, clocks=time.clocks())
    assert (directory / MAIN).read_bytes() == before


def test_read_only_changes_nothing(store, time):
    directory = store._directory
    store.close()
    (directory / COPY).write_bytes(b"damaged")
    with TrustStore.open(directory, read_only=True, clocks=time.clocks()) as again:
        assert again.state.view.find("app") is not None
        with pytest.raises(StorageError):
            again.commit_counter("files", "app", 9)
    assert (directory / COPY).read_bytes() == b"damaged"


# --- metadata --------------------------------------------------------------------------------------------------------
def test_roots_stay_whatever_comes_of_the_rest(store, fleet, time):
    fleet.new_root("root")
    fleet.new_root()
    fleet.commit("bundles")
    update = fleet.update_for(store.state)
    broken = MetadataUpdate(update.roots, update.timestamp, {})
    with pytest.raises(VerificationError, match="lacks"):
        store.accept(broken)
    assert store.state.root_version == 3
    again = reopened(store, time)
    assert again.state.root_version == 3
    assert again.accept(update)
    assert not again.accept(update)
    again.close()


def test_older_metadata_is_refused_after_a_restart(store, fleet, time):
    old = MetadataUpdate(timestamp=fleet.files["timestamp"])
    fleet.commit("bundles")
    store.accept(fleet.update_for(store.state))
    again = reopened(store, time)
    with pytest.raises(RollbackRefusedError):
        again.accept(old)
    again.close()


def test_a_role_that_is_gone_from_the_set_is_gone_from_the_store(store, fleet):
    names = set(store._facts)
    state = trust.add_root(store.state, fleet.new_root("timestamp"))
    store._believe(state)
    assert {"timestamp", "snapshot", "targets", "role/bundles"} & set(store._facts) == set()
    assert "regions" in store._facts
    assert "regions" in names


# --- time ------------------------------------------------------------------------------------------------------------
def test_running_time_counts_and_is_stored_hourly(store, time):
    time.utc_now = 0.0
    assert store.now() == NOW
    time.running += SAVE_TIME_S - 1
    assert store.now() == NOW + SAVE_TIME_S - 1
    assert not store.save_time()
    time.running += 1
    assert store.save_time()
    assert not store.save_time()
    time.running += 100
    # A power cut here: the last 100 seconds are lost, the stored hour is not.
    lost = TrustStore.open(store._directory, clocks=time.clocks())
    assert lost.now() == NOW + SAVE_TIME_S
    lost.close()


def test_trusted_time_is_stored_on_a_clean_exit(store, time):
    time.utc_now = 0.0
    time.running += 500
    again = reopened(store, time)
    assert again.now() == NOW + 500
    again.close()


def test_a_clock_from_2099_is_not_believed(store, time):
    time.utc_now = 4_070_908_800.0
    assert store.now() == NOW
    assert not store.clock_is_believed()
    time.utc_now = NOW + 100 * DAY_S
    assert store.now() == time.utc_now
    assert store.clock_is_believed()


def test_a_newer_floor_does_not_turn_time_back(store, fleet, time):
    time.utc_now = 0.0
    time.running += 10 * DAY_S
    before = store.now()
    fleet.utc_now += 7 * DAY_S
    fleet.commit("bundles")
    store.accept(fleet.update_for(store.state))
    assert store.now() == before
    fleet.utc_now += 7 * DAY_S
    fleet.commit("bundles")
    store.accept(fleet.update_for(store.state))
    assert store.now() == NOW + 14 * DAY_S


# --- assignments -----------------------------------------------------------------------------------------------------
def test_sequences_only_grow(store, fleet, time):
    take(store, make_set(fleet, sequence=7))
    assert take(store, make_set(fleet, sequence=7)).sequence == 7
    with pytest.raises(VerificationError, match="another assignment set"):
        take(store, make_set(fleet, sequence=7, entries=()))
    with pytest.raises(RollbackRefusedError):
        take(store, make_set(fleet, sequence=6))
    again = reopened(store, time)
    with pytest.raises(RollbackRefusedError):
        take(again, make_set(fleet, sequence=6))
    assert take(again, make_set(fleet, sequence=8, entries=())).entries == ()
    again.close()


def test_another_device_s_set_is_refused(store, fleet):
    for changes in ({"device": "cam-2"}, {"device_key": "e" * 64}, {"fleet": "0" * 64}):
        with pytest.raises(NotAuthorizedError):
            take(store, make_set(fleet, **changes))
    stranger = SigningKey.from_seed(bytes(32))
    with pytest.raises(NotAuthorizedError):
        take(store, make_set(fleet, signer=stranger))
    assert store.assignments() is None
    assert store.assignment_sequence == 0


def test_expiry_gates_accepting_and_not_what_was_accepted(store, fleet, time):
    data = make_set(fleet)
    take(store, data)
    time.utc_now += assignment.LIFETIME_S
    with pytest.raises(MetadataExpiredError):
        take(store, make_set(fleet, sequence=8))
    again = reopened(store, time)
    assert again.assignments().sequence == 7
    again.close()


def test_a_rotated_assignment_key_takes_its_sequence_and_its_set_with_it(store, fleet):
    take(store, make_set(fleet, sequence=2**53 - 1))
    fleet.assign_key = SigningKey.from_seed(bytes(range(32)))
    fleet.set_regions(fleet.regions())
    fleet.commit("targets")
    store.accept(fleet.update_for(store.state))
    assert store.assignments() is None
    assert take(store, make_set(fleet, sequence=1)).sequence == 1


def test_a_floor_holds_over_all_gateways_that_are_listed(store, fleet):
    second = SigningKey.from_seed(bytes(range(32)))
    keys = (fleet.assign_key.key, second.key)
    take(store, make_set(fleet, sequence=9), keys=keys)
    with pytest.raises(RollbackRefusedError):
        take(store, make_set(fleet, sequence=8, signer=second), keys=keys)
    assert take(store, make_set(fleet, sequence=10, signer=second), keys=keys).sequence == 10


def test_counters_only_grow_and_are_kept_by_kind_and_name(store):
    store.commit_counter("files", "app", 4)
    store.raise_counter("files", "app", 2)
    assert store.counter("files", "app") == 4
    assert store.counter("firmware", "app") == store.counter("files", "b") == 0


# --- failing disks ---------------------------------------------------------------------------------------------------
def failing(monkeypatch, name, error):
    """Every write to one of the two files fails; returns what mends the disk."""
    real_whole, real_connect = trust_store._write_whole, trust_store._connect

    def whole(path, facts, generation):
        if path.name == name:
            raise error
        real_whole(path, facts, generation)

    def connect(path, *, mode="rw"):
        if path.name == name and mode != "ro":
            raise error
        return real_connect(path, mode=mode)

    monkeypatch.setattr(trust_store, "_write_whole", whole)
    monkeypatch.setattr(trust_store, "_connect", connect)
    return monkeypatch.undo


def test_what_could_not_be_stored_is_not_believed(store, fleet, monkeypatch, time):
    again = reopened(store, time)
    mend = failing(monkeypatch, MAIN, DiskFullError("no space left"))
    before = again.state
    fleet.commit("bundles")
    update = fleet.update_for(before)
    for _ in range(2):
        with pytest.raises(DiskFullError):
            again.accept(update)
        with pytest.raises(DiskFullError):
            again.commit_counter("files", "app", 1)
        with pytest.raises(DiskFullError):
            take(again, make_set(fleet))
    assert again.state is before
    assert again.counter("files", "app") == again.assignment_sequence == 0
    mend()
    assert again.accept(update)
    assert again.problems == ()
    final = reopened(again, time)
    assert final.state.timestamp == fleet.files["timestamp"]
    final.close()


def test_a_copy_that_cannot_be_written_is_a_problem_and_no_stop(store, monkeypatch, time):
    again = reopened(store, time)
    mend = failing(monkeypatch, COPY, StorageError("trust.copy.db: disk I/O error"))
    again.commit_counter("files", "app", 1)
    assert "trust.copy.db" in again.problems[0]
    mend()
    again.commit_counter("files", "app", 2)
    assert again.problems == ()
    first, second = (trust_store._read(again._directory / n, read_only=True) for n in (MAIN, COPY))
    assert first == second
    again.close()


def test_a_stale_journal_beside_a_new_file_is_never_rolled_back_into_it(store, time):
    directory = store._directory
    store.close()
    (directory / MAIN).write_bytes(b"")
    (directory / f"{MAIN}-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + bytes(600))
    with reopened(store, time) as again:
        again.commit_counter("files", "app", 1)
        assert again.problems == ()
    with reopened(store, time) as again:
        assert again.counter("files", "app") == 1


def test_an_agent_that_was_killed_while_repairing_starts_again(store, time):
    directory = store._directory
    store.close()
    (directory / MAIN).unlink()
    (directory / f"{MAIN}.new").write_bytes(b"half")
    with reopened(store, time) as again:
        assert again.problems == ()
    assert not (directory / f"{MAIN}.new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_another_user_is_told_so(store, time):
    store.close()
    for name in (MAIN, COPY):
        (store._directory / name).chmod(0)
    with pytest.raises(ConfigError, match="owner"):
        TrustStore.open(store._directory, clocks=time.clocks())


def test_judging_goes_on_from_a_stored_state(store, fleet, time):
    device = fleet.device("cam-1")
    again = reopened(store, time)
    assert again.state.view.judge_certificate(device.certificate_der).id == "cam-1"
    stranger = identity.self_signed(identity.Identity.generate(), "cam-1")
    with pytest.raises(NotAuthorizedError):
        again.state.view.judge_certificate(stranger.certificate_der)
    again.close()
