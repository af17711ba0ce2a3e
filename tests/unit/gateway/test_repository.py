import sqlite3
import threading

import msgspec
import pytest
from sqlite_utils import Database

from edgesync import identity, limits, manifest, trust
from edgesync.errors import (
    ConfigError,
    ConflictError,
    NotFoundError,
    UsageError,
    VerificationError,
)
from edgesync.trust import GatewayEntry, MetadataUpdate, RegionEntry, Regions
from gateway import certificates, repository
from gateway.repository import DAY_S, LIFETIMES_S, Repository

NOW = 1_800_000_000.0


def open_db(directory):
    connection = sqlite3.connect(directory / "gateway.db", timeout=10, check_same_thread=False)
    connection.execute("PRAGMA journal_mode=WAL")
    db = Database(connection)
    repository.migrations.apply(db)
    return db


@pytest.fixture
def regions(tmp_path):
    authority = certificates.create_authority(tmp_path / "ca", "eu")
    gateway = identity.self_signed(identity.Identity.generate(), "gw-1")
    assign = certificates.create_assign_key(tmp_path / "online")
    entry = GatewayEntry(id="gw-1", key=gateway.key, assign_key=assign.key)
    return Regions(
        regions=(RegionEntry(name="eu", ca=authority.certificate_der, gateways=(entry,)),)
    )


def create(tmp_path, regions, threshold=(1, 1)):
    db = open_db(tmp_path)
    return Repository.create(
        db,
        keys=tmp_path / "keys",
        online=tmp_path / "online",
        regions=regions,
        threshold=threshold,
        utc_now=NOW,
    )


@pytest.fixture
def repo(tmp_path, regions):
    return create(tmp_path, regions)


def publish(repo, version="1.0", name="app", digest="a", **changes):
    arguments = {"utc_now": NOW} | changes
    kind = arguments.pop("kind", "files")
    return repo.publish(kind, name, version, digest * 64, 100, **arguments)


def device(repo, state=None, *, utc_now=NOW):
    """What a device believes after fetching from this repository."""
    if state is None:
        state = trust.bootstrap({1: repo.metadata("root/1")}, repo.root_pin())
    update = MetadataUpdate()
    while wants := trust.wanted(state, update):
        for want in wants:
            data = repo.metadata(want.name)
            assert data is not None
            assert len(data) <= want.max_bytes
            update = update.with_file(want.name, data)
    return trust.apply(state, update, utc_now=utc_now)


def test_a_device_believes_what_the_repository_signs(repo):
    first = device(repo)
    made = publish(repo, hardware=("pi4", "pi5"), release_counter=3)
    assert (made.path, made.published_seq, made.hardware) == ("files/app@1.0", 1, ("pi4", "pi5"))
    state = device(repo, first)
    assert state.view.find("app") == made
    assert state.view == repo.trusted()
    assert repo.fleet_id() == state.fleet_id
    assert (state.view.timestamp_version, state.view.snapshot_version) == (2, 2)


def test_lifetimes(repo):
    assert repo.expiries() == pytest.approx(
        {role: NOW + seconds for role, seconds in LIFETIMES_S.items()}
    )


@pytest.mark.parametrize("threshold", [(1, 2), (2, 3), (3, 3)])
def test_thresholds(tmp_path, regions, threshold):
    repo = create(tmp_path, regions, threshold)
    assert len(list((tmp_path / "keys").iterdir())) == 2 * threshold[1]
    assert device(repo).view.region("eu") is not None
    for index in range(threshold[1] - threshold[0]):
        (tmp_path / "keys" / f"targets-{index + 1}.key").unlink()
    repo.set_regions(regions, utc_now=NOW)
    assert device(repo).view.region("eu") is not None
    (tmp_path / "keys" / f"targets-{threshold[1]}.key").unlink()
    with pytest.raises(ConfigError, match=f"{threshold[0]} of {threshold[1]} keys"):
        repo.set_regions(regions, utc_now=NOW)


@pytest.mark.parametrize("threshold", [(0, 1), (2, 1), (1, 17)])
def test_thresholds_that_make_no_sense(tmp_path, regions, threshold):
    with pytest.raises(UsageError, match="--threshold"):
        create(tmp_path, regions, threshold)


def test_keys_are_for_their_owner_and_never_overwritten(tmp_path, repo, regions):
    for directory in ("keys", "online", "ca"):
        assert (tmp_path / directory).stat().st_mode & 0o077 == 0
        for key in (tmp_path / directory).glob("*.key"):
            assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConflictError):
        create(tmp_path, regions)
    with pytest.raises(ConfigError, match="cannot write"):
        certificates.create_assign_key(tmp_path / "online")


def test_publish_works_without_the_offline_keys_and_says_what_needs_them(tmp_path, repo, regions):
    (tmp_path / "keys").rename(tmp_path / "safe")
    assert publish(repo).version == "1.0"
    with pytest.raises(ConfigError, match=r"targets key is not at .*keys/targets-1\.key"):
        repo.set_regions(regions, utc_now=NOW)
    roles = {(key.role, key.readable) for key in repo.readable_keys()}
    assert roles == {
        ("root", False),
        ("targets", False),
        ("bundles", True),
        ("snapshot", True),
        ("timestamp", True),
        ("assign", True),
    }


@pytest.mark.parametrize("role", ["bundles", "snapshot", "timestamp"])
def test_a_missing_online_key_changes_nothing(tmp_path, repo, role):
    (tmp_path / "online" / f"{role}.key").unlink()
    files = repo.current_files()
    with pytest.raises(ConfigError, match=rf"{role} key is not at .*online/{role}\.key"):
        publish(repo)
    assert repo.current_files() == files
    assert repo.trusted().find("app") is None


def test_a_key_of_another_fleet_signs_nothing(tmp_path, repo):
    path = tmp_path / "online" / "bundles.key"
    path.write_bytes(identity.Identity.generate().key_pem())
    with pytest.raises(ConfigError, match="not a key the fleet's metadata names"):
        publish(repo)


def test_publishing_again(repo):
    made = publish(repo)
    version = repo.trusted().timestamp_version
    assert publish(repo) == made
    assert repo.trusted().timestamp_version == version
    with pytest.raises(ConflictError, match="other content"):
        publish(repo, digest="b")
    with pytest.raises(ConflictError, match="belongs to one kind"):
        publish(repo, version="2.0", kind="model")
    with pytest.raises(ConflictError, match="other content"):
        publish(repo, kind="model")


def test_withdraw_and_a_sequence_that_is_never_given_twice(repo):
    state = device(repo)
    publish(repo)
    publish(repo, version="2.0", digest="b")
    repo.withdraw("files", "app", "2.0", utc_now=NOW)
    state = device(repo, state)
    assert state.view.latest("app").version == "1.0"
    with pytest.raises(NotFoundError):
        repo.withdraw("files", "app", "2.0", utc_now=NOW)
    assert publish(repo, version="3.0", digest="c").published_seq == 3


def test_set_regions(repo, regions):
    state = device(repo)
    other = identity.CertificateAuthority.create("us")
    more = Regions(
        regions=(
            *regions.regions,
            RegionEntry(name="us", ca=other.certificate_der, gateways=()),
        )
    )
    repo.set_regions(more, utc_now=NOW)
    assert device(repo, state).view.region("us") is not None
    assert repo.trusted().region("us") is not None
    twice = msgspec.structs.replace(more, regions=more.regions * 2)
    with pytest.raises(VerificationError):
        repo.set_regions(twice, utc_now=NOW)


def test_refresh_at_half_life(tmp_path, repo):
    state = device(repo)
    assert repo.refresh(utc_now=NOW + 6 * DAY_S) == []
    assert repo.refresh(utc_now=NOW + 8 * DAY_S) == ["timestamp"]
    assert repo.refresh(utc_now=NOW + 8 * DAY_S) == []
    assert repo.refresh(utc_now=NOW + 16 * DAY_S) == ["snapshot", "timestamp"]
    state = device(repo, state, utc_now=NOW + 16 * DAY_S)
    due = repo.refresh(utc_now=NOW + 200 * DAY_S)
    assert due == ["bundles", "snapshot", "timestamp"]
    state = device(repo, state, utc_now=NOW + 200 * DAY_S)
    assert state.view.expiries["bundles"] == NOW + 565 * DAY_S
    # A publisher's key that lives elsewhere stops neither of the others.
    (tmp_path / "online" / "bundles.key").unlink()
    assert "timestamp" in repo.refresh(utc_now=NOW + 390 * DAY_S)


def test_warnings_come_sixty_days_before_offline_metadata_ends(repo):
    assert repo.warnings(utc_now=NOW + 300 * DAY_S) == []
    (warning,) = repo.warnings(utc_now=NOW + 310 * DAY_S)
    assert "targets metadata expires in 55 days" in warning
    assert "has expired" in repo.warnings(utc_now=NOW + 400 * DAY_S)[0]


def test_a_clock_that_went_wrong_poisons_nobody(repo):
    with pytest.raises(ConfigError, match="set the clock"):
        publish(repo, utc_now=4_070_908_800.0)
    assert repo.trusted().find("app") is None
    publish(repo, utc_now=0.0)
    assert repo.trusted().issued_at == NOW
    assert device(repo).view.find("app") is not None


def test_serving(repo):
    publish(repo)
    for name, data in repo.current_files().items():
        assert repo.metadata(name) == data
    assert list(repo.current_files())[-1] == "timestamp"
    for name in ("root/2", "root/0", "root/x", "x", "", f"sha256/{'0' * 64}"):
        assert repo.metadata(name) is None
    # A root or timestamp is asked for by name only: by digest it would be one more file to serve for nothing.
    assert repo.metadata(f"sha256/{manifest.digest(repo.metadata('timestamp'))}") is None


def test_a_device_that_is_fetching_still_finds_the_set_before(repo):
    publish(repo)
    state = trust.bootstrap({1: repo.metadata("root/1")}, repo.root_pin())
    update = MetadataUpdate().with_file("timestamp", repo.metadata("timestamp"))
    publish(repo, version="2.0", digest="b")
    while wants := trust.wanted(state, update):
        for want in wants:
            update = update.with_file(want.name, repo.metadata(want.name))
    assert trust.apply(state, update, utc_now=NOW).view.latest("app").version == "1.0"


def test_old_versions_are_forgotten_and_roots_never(repo):
    for number in range(repository.KEPT_VERSIONS + 5):
        publish(repo, version=f"1.{number}", digest=f"{number % 10}")
    rows = dict(
        repo._db.conn.execute("SELECT role, COUNT(*) FROM trust_metadata GROUP BY role").fetchall()
    )
    assert rows["root"] == rows["targets"] == 1
    assert rows["timestamp"] == rows["bundles"] == repository.KEPT_VERSIONS
    assert device(repo).view.latest("app").published_seq == repository.KEPT_VERSIONS + 5


def test_a_rolled_back_transaction_leaves_no_trace(repo):
    state = device(repo)
    repo._db.conn.execute("BEGIN IMMEDIATE")
    publish(repo)
    assert repo.trusted().find("app") is not None
    repo._db.conn.execute("ROLLBACK")
    assert repo.trusted().find("app") is None
    publish(repo, version="9.0", digest="b")
    assert [bundle.version for bundle in repo.trusted().bundles] == ["9.0"]
    assert device(repo, state).view.latest("app").version == "9.0"


def test_two_publishers_at_once_never_fork_a_version(tmp_path, repo):
    errors = []

    def work(name):
        own = Repository(open_db(tmp_path), keys=tmp_path / "keys", online=tmp_path / "online")
        try:
            for number in range(6):
                publish(own, version=f"1.{number}", name=name, digest=name[-1])
        except Exception as exc:  # noqa: BLE001 - told to the test
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(f"app-{letter}",)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    view = device(repo).view
    assert sorted(bundle.published_seq for bundle in view.bundles) == list(range(1, 19))
    assert view.timestamp_version == 19


def test_without_metadata(tmp_path):
    empty = Repository(open_db(tmp_path), keys=tmp_path, online=tmp_path)
    for call in (empty.trusted, empty.root_pin, empty.current_files, empty.readable_keys):
        with pytest.raises(ConfigError, match="gateway init"):
            call()
    assert empty.metadata("timestamp") is None
    assert empty.expiries() == {}


def test_metadata_that_devices_would_refuse_is_not_signed(repo, monkeypatch):
    publish(repo)
    files = repo.current_files()
    monkeypatch.setattr(limits, "MAX_TARGETS_BYTES", 700)
    with pytest.raises(ConfigError, match="withdraw bundles"):
        publish(repo, version="2.0", digest="b")
    assert repo.current_files() == files


def test_certificates_round_trip(tmp_path, repo):
    del repo
    made = identity.Identity.generate()
    der = certificates.issue(tmp_path / "ca", made.public_raw, "cam-1")
    authority = certificates.load_authority(tmp_path / "ca")
    identity.check_issued(der, authority.certificate_der)
    assert certificates.load_assign_key(tmp_path / "online").key
    kept = made.with_certificate(der)
    certificates.create_identity(tmp_path / "identity.key", tmp_path / "identity.crt", kept)
    again = certificates.load_identity(tmp_path / "identity.key", tmp_path / "identity.crt")
    assert (again.key, again.id) == (made.key, "cam-1")
    (tmp_path / "ca" / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"not at .*ca\.key"):
        certificates.load_authority(tmp_path / "ca")
