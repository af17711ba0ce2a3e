"""The attacks TUF names, each against the code a device runs, and the recoveries."""

import json

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, MetaFile, Targets

from edgesync import identity, limits, manifest, trust
from edgesync.errors import (
    BadSignatureError,
    MetadataExpiredError,
    NotAuthorizedError,
    RollbackRefusedError,
    VerificationError,
)
from edgesync.manifest import Chunking, Manifest
from edgesync.testing.metadata import DAY_S, FleetMetadata
from edgesync.trust import MetadataUpdate, Want

NOW = 1_800_000_000.0
Y1970, Y2099 = 0.0, 4_070_908_800.0


@pytest.fixture
def fleet():
    made = FleetMetadata(utc_now=NOW)
    made.add_bundle("app", "1.0")
    made.commit("bundles")
    return made


# --- the straight way ----------------------------------------------------------------------------------------------
def test_a_new_device_asks_for_what_it_needs_in_order(fleet):
    state, update, asked = fleet.bootstrap(), MetadataUpdate(), []
    while wants := trust.wanted(state, update):
        asked.append([(want.name.partition("/")[0], want.max_bytes) for want in wants])
        for want in wants:
            update = update.with_file(want.name, fleet.files[want.name])
    assert asked[0] == [("timestamp", limits.MAX_TIMESTAMP_BYTES)]
    assert [len(step) for step in asked] == [1, 1, 2, 1]  # snapshot; targets and bundles; regions
    state = trust.apply(state, update, utc_now=NOW)
    view = state.view
    assert (view.root_version, view.timestamp_version, view.snapshot_version) == (1, 2, 2)
    assert view.fleet_id == state.fleet_id == fleet.pin()[1]
    assert view.find("app").path == "files/app@1.0"
    assert view.expires == pytest.approx(NOW + 14 * DAY_S)
    assert view.problems == ()


def test_a_second_update_fetches_only_what_changed(fleet):
    state = fleet.accepted()
    assert (
        trust.wanted(state, MetadataUpdate().with_file("timestamp", fleet.files["timestamp"])) == []
    )
    assert trust.apply(state, fleet.update_for(state), utc_now=NOW) is state
    fleet.add_bundle("app", "2.0")
    fleet.commit("bundles")
    update = fleet.update_for(state)
    assert len(update.blobs) == 2  # snapshot and bundles
    state = trust.apply(state, update, utc_now=NOW)
    assert state.view.latest("app").version == "2.0"
    assert state.view.find("app", "1.0").version == "1.0"


def test_a_state_read_back_says_the_same(fleet):
    state = fleet.accepted()
    again = trust.TrustState(
        **{name: getattr(state, name) for name in trust.TrustState.__dataclass_fields__}
    )
    assert again == state
    assert again.view == state.view


def test_stored_metadata_is_read_long_after_it_expired(fleet):
    state = fleet.accepted()
    assert trust.TrustState(
        **{n: getattr(state, n) for n in state.__dataclass_fields__}
    ).view.bundles
    fleet.utc_now += 700 * DAY_S
    fleet.commit("targets", "bundles")
    later = fleet.accepted(state)
    assert later.view.timestamp_version == 3


def test_a_state_serves_what_it_holds(fleet):
    state = fleet.accepted()
    for name in ("timestamp", "root/1"):
        assert state.file(name) == fleet.files[name]
    for data in (state.snapshot, state.targets, state.regions, dict(state.delegated)["bundles"]):
        assert state.file(f"sha256/{manifest.digest(data)}") == data
    for name in ("root/0", "root/2", "root/x", "root/-1", "root/²", "root/", "sha256/00", "x", ""):
        assert state.file(name) is None


def test_a_courier_device_can_bring_up_another(fleet):
    courier = fleet.accepted()
    state, update = fleet.bootstrap(), MetadataUpdate()
    while wants := trust.wanted(state, update):
        for want in wants:
            update = update.with_file(want.name, courier.file(want.name))
    assert trust.apply(state, update, utc_now=NOW) == courier


def test_only_a_timestamp_may_change(fleet):
    state = fleet.accepted()
    fleet.commit(snapshot=False)
    update = fleet.update_for(state)
    assert update.blobs == {}
    assert trust.apply(state, update, utc_now=NOW).view.timestamp_version == 3


# --- bootstrap -----------------------------------------------------------------------------------------------------
def test_bootstrap_trusts_the_pinned_root_and_its_chain(fleet):
    fleet.new_root("root")
    fleet.new_root()
    for version in (1, 2, 3):
        assert trust.bootstrap(fleet.roots(), fleet.pin(version)).root_version == 3


def test_bootstrap_refuses(fleet):
    fleet.new_root("root")
    other = FleetMetadata(utc_now=NOW)
    roots = fleet.roots()
    for given, pin in (
        (roots, other.pin()),
        ({}, fleet.pin()),
        ({1: roots[1]}, fleet.pin(2)),
        ({2: roots[2]}, fleet.pin(2)),
        ({1: other.files["root/1"], 2: roots[2]}, fleet.pin(2)),
        ({1: roots[1], 2: roots[1]}, fleet.pin(1)),
        ({1: roots[2]}, (1, fleet.pin(2)[1])),
        (
            {1: b"x" * (limits.MAX_ROOT_BYTES + 1)},
            (1, manifest.digest(b"x" * (limits.MAX_ROOT_BYTES + 1))),
        ),
        ({1: b"{}"}, (1, manifest.digest(b"{}"))),
        (roots, (0, fleet.pin()[1])),
    ):
        with pytest.raises(VerificationError):
            trust.bootstrap(given, pin)


# --- roots ---------------------------------------------------------------------------------------------------------
def test_a_root_is_fetched_when_the_timestamp_speaks_of_one(fleet):
    state = fleet.accepted()
    fleet.new_root("root")
    fleet.new_root("targets")
    fleet.commit("targets")
    update = MetadataUpdate().with_file("timestamp", fleet.files["timestamp"])
    assert trust.wanted(state, update) == [Want("root/2", limits.MAX_ROOT_BYTES)]
    state = trust.apply(state, fleet.update_for(state), utc_now=NOW)
    assert state.root_version == 3
    assert state.view.find("app") is not None


def test_a_set_signed_under_a_newer_root_does_not_pass_without_it(fleet):
    state = fleet.accepted()
    fleet.new_root()
    fleet.commit("bundles")
    update = fleet.update_for(state)
    with pytest.raises(VerificationError, match="signed under root 2"):
        trust.apply(
            state, MetadataUpdate(timestamp=update.timestamp, blobs=update.blobs), utc_now=NOW
        )


def test_a_root_needs_old_and_new_keys(fleet):
    state = fleet.bootstrap()
    stranger = [CryptoSigner.generate_ed25519()]
    fleet.root.version = 2
    for signers in (stranger, []):
        with pytest.raises(BadSignatureError):
            trust.add_root(state, fleet.sign("root", fleet.root, signers=signers))
    old = list(fleet.signers["root"])
    fleet.root.version = 1
    fleet.new_root("root")
    with pytest.raises(BadSignatureError):
        trust.add_root(state, fleet.sign("root", fleet.root, signers=old))
    with pytest.raises(BadSignatureError):
        trust.add_root(state, fleet.sign("root", fleet.root))
    assert trust.add_root(state, fleet.files["root/2"]).root_version == 2


@pytest.mark.parametrize("version", [1, 3, 2**31])
def test_roots_follow_one_by_one(fleet, version):
    fleet.root.version = version
    with pytest.raises(RollbackRefusedError):
        trust.add_root(fleet.bootstrap(), fleet.sign("root", fleet.root))


def test_one_of_two_targets_keys_is_not_enough():
    fleet = FleetMetadata(utc_now=NOW, threshold=2)
    state = fleet.accepted()
    fleet.targets.version += 1
    data = fleet.sign("targets", fleet.targets, signers=fleet.signers["targets"][:1])
    fleet.files[f"sha256/{manifest.digest(data)}"] = data
    fleet.snapshot.meta["targets.json"] = MetaFile.from_data(
        fleet.targets.version, data, ["sha256"]
    )
    fleet.commit()
    with pytest.raises(BadSignatureError):
        fleet.accepted(state)


def test_after_a_targets_rotation_the_old_set_lists_nothing_but_gateways_stay_known(fleet):
    state = fleet.accepted()
    state = trust.add_root(state, fleet.new_root("targets"))
    assert state.view.bundles == ()
    assert state.view.timestamp_version == 0
    assert state.view.judge_certificate(fleet.gateway.certificate_der).role == "gateway"
    fleet.commit("targets")
    assert fleet.accepted(state).view.find("app") is not None


# --- rollback, freeze, mix-and-match, fast-forward -------------------------------------------------------------------
def test_rollback_of_any_role_is_refused(fleet):
    old = dict(fleet.files)
    state = fleet.accepted()
    fleet.add_bundle("app", "2.0")
    fleet.commit("bundles")
    new = fleet.accepted(state)
    with pytest.raises(RollbackRefusedError):
        trust.wanted(new, MetadataUpdate(timestamp=old["timestamp"]))
    with pytest.raises(RollbackRefusedError):
        trust.apply(new, MetadataUpdate(timestamp=old["timestamp"]), utc_now=NOW)


@pytest.mark.parametrize("role", ["snapshot", "bundles", "targets"])
def test_a_newer_timestamp_cannot_bring_an_older_role(fleet, role):
    state = fleet.accepted()
    fleet.commit("targets", "bundles")
    state = fleet.accepted(state)
    if role == "snapshot":
        fleet.snapshot.version -= 2
        fleet.commit()
    else:
        signed = getattr(fleet, role)
        signed.version -= 2
        fleet.commit(role)
    with pytest.raises(RollbackRefusedError):
        fleet.accepted(state)


def test_a_role_cannot_vanish_from_the_snapshot(fleet):
    state = fleet.accepted()
    del fleet.snapshot.meta["bundles.json"]
    fleet.commit()
    with pytest.raises(VerificationError, match="missing info"):
        fleet.accepted(state)


def test_freeze_ends_with_the_timestamp(fleet):
    state = fleet.bootstrap()
    update = fleet.update_for(state)
    assert trust.apply(state, update, utc_now=NOW + 13 * DAY_S)
    with pytest.raises(MetadataExpiredError):
        trust.apply(state, update, utc_now=NOW + 15 * DAY_S)


@pytest.mark.parametrize(("role", "days"), [("snapshot", 30), ("targets", 365), ("root", 1825)])
def test_every_role_expires(fleet, role, days):
    state = fleet.bootstrap()
    fleet.utc_now += (days + 1) * DAY_S
    fleet.commit(snapshot=False)  # a fresh timestamp over stale roles
    with pytest.raises(MetadataExpiredError):
        fleet.accepted(state)


def test_mix_and_match_is_refused(fleet):
    first = fleet.update_for(fleet.bootstrap())
    fleet.add_bundle("app", "2.0")
    fleet.commit("targets", "bundles")
    second = fleet.update_for(fleet.bootstrap())
    for timestamp, blobs in (
        (first.timestamp, second.blobs),
        (second.timestamp, first.blobs),
        (second.timestamp, {}),
    ):
        with pytest.raises(VerificationError, match="lacks"):
            trust.apply(
                fleet.bootstrap(), MetadataUpdate(timestamp=timestamp, blobs=blobs), utc_now=NOW
            )
    lying = dict(zip(second.blobs, first.blobs.values(), strict=True))
    with pytest.raises(VerificationError):
        trust.apply(
            fleet.bootstrap(), MetadataUpdate(timestamp=second.timestamp, blobs=lying), utc_now=NOW
        )


@pytest.mark.parametrize("rotate", [("timestamp",), ("snapshot",), ("timestamp", "snapshot")])
def test_recovery_from_fast_forward_by_rotating_an_online_key(fleet, rotate):
    state = fleet.accepted()
    honest = (fleet.timestamp.version, fleet.snapshot.version, fleet.bundles.version)
    fleet.timestamp.version, fleet.snapshot.version, fleet.bundles.version = 2**40, 2**40, 2**40
    fleet.commit("bundles", issued=NOW + 13 * DAY_S)
    poisoned = fleet.accepted(state)
    assert poisoned.view.timestamp_version == 2**40 + 1
    fleet.timestamp.version, fleet.snapshot.version, fleet.bundles.version = honest
    fleet.commit("bundles")
    with pytest.raises(RollbackRefusedError):
        fleet.accepted(poisoned)
    fleet.new_root(*rotate)
    fleet.commit("bundles")
    healed = fleet.accepted(poisoned)
    assert healed.view.timestamp_version == honest[0] + 2
    assert healed.floor == NOW


def test_a_time_floor_from_2099_is_forgotten_with_the_key_that_signed_it(fleet):
    state = fleet.accepted()
    fleet.utc_now = Y2099
    fleet.new_root()
    fleet.commit("targets", "bundles")
    poisoned = fleet.accepted(state, utc_now=NOW)
    assert poisoned.floor == Y2099
    fleet.utc_now = NOW
    fleet.commit("targets", "bundles")
    with pytest.raises(MetadataExpiredError):
        fleet.accepted(poisoned)
    fleet.new_root("timestamp")
    fleet.commit("targets", "bundles")
    healed = fleet.accepted(poisoned)
    assert healed.floor == NOW


# --- clocks ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clock", [Y1970, NOW - 400 * DAY_S, NOW, Y2099, 1e18, -5.0])
def test_any_clock_can_take_fresh_metadata(fleet, clock):
    state = fleet.accepted(utc_now=clock)
    assert state.view.find("app") is not None
    fleet.utc_now += 20 * DAY_S
    fleet.commit("targets", "bundles")
    assert fleet.accepted(state, utc_now=clock).floor == fleet.utc_now


def test_a_dead_clock_does_not_hide_a_freeze_older_than_the_floor(fleet):
    stale = dict(fleet.files)
    state = fleet.bootstrap()
    fleet.utc_now += 20 * DAY_S
    fleet.commit("targets", "bundles")
    state = fleet.accepted(state, utc_now=Y1970)
    state = trust.TrustState(state.roots, floor=state.floor)  # only the floor is left
    with pytest.raises(MetadataExpiredError):
        trust.apply(
            state,
            MetadataUpdate(
                timestamp=stale["timestamp"],
                blobs={n[7:]: d for n, d in stale.items() if n.startswith("sha256/")},
            ),
            utc_now=Y1970,
        )


def test_trusted_time():
    far = limits.MAX_CLOCK_AHEAD_S
    assert trust.trusted_time(NOW, None) == NOW
    assert trust.trusted_time(NOW + 5, NOW) == NOW + 5
    assert trust.trusted_time(Y1970, NOW) == NOW
    assert trust.trusted_time(Y1970, NOW, 60.0) == NOW + 60
    assert trust.trusted_time(NOW + far, NOW) == NOW + far
    assert trust.trusted_time(NOW + far + 1, NOW) == NOW
    assert trust.trusted_time(NOW + far + 1, NOW, 60.0) == NOW + far + 1
    assert trust.trusted_time(Y2099, NOW, 60.0) == NOW + 60
    assert trust.trusted_time(1e300, None) < 2**53


def test_running_time_counts_against_a_freeze(fleet):
    state = fleet.accepted(utc_now=Y1970)
    update = fleet.update_for(trust.TrustState(state.roots))
    kept = trust.TrustState(state.roots, floor=state.floor)
    assert trust.apply(kept, update, utc_now=Y1970, elapsed_s=13 * DAY_S)
    with pytest.raises(MetadataExpiredError):
        trust.apply(kept, update, utc_now=Y1970, elapsed_s=15 * DAY_S)


@pytest.mark.parametrize("value", [None, -1, 1.5, "1", True, 2**70])
def test_a_timestamp_without_a_sound_time_is_refused(fleet, value):
    fleet.timestamp.version += 1
    fields = {trust.ISSUED_FIELD: value, trust.ROOT_FIELD: 1}
    if value is None:
        del fields[trust.ISSUED_FIELD]
    fleet.timestamp.unrecognized_fields = fields
    if isinstance(value, float):
        return  # canonical JSON has no floats: such a timestamp cannot even be signed
    fleet.files["timestamp"] = fleet.sign("timestamp", fleet.timestamp)
    with pytest.raises(VerificationError, match="x-issued-at"):
        fleet.accepted()


@pytest.mark.parametrize("value", [-1, "1", 2**31])
def test_a_timestamp_with_a_nonsensical_root_is_refused(fleet, value):
    fleet.timestamp.unrecognized_fields[trust.ROOT_FIELD] = value
    data = fleet.sign("timestamp", fleet.timestamp)
    with pytest.raises(VerificationError, match="x-root-version"):
        trust.wanted(fleet.bootstrap(), MetadataUpdate(timestamp=data))


# --- caps ------------------------------------------------------------------------------------------------------------
def test_sizes_are_capped_before_parsing(fleet):
    update = MetadataUpdate()
    for name, most in (
        ("timestamp", limits.MAX_TIMESTAMP_BYTES),
        ("root/2", limits.MAX_ROOT_BYTES),
        (f"sha256/{'0' * 64}", limits.MAX_TARGETS_BYTES),
    ):
        with pytest.raises(VerificationError, match="at most"):
            update.with_file(name, bytes(most + 1))
    big = MetadataUpdate(timestamp=b"[" * (limits.MAX_TIMESTAMP_BYTES + 1))
    with pytest.raises(VerificationError, match="at most"):
        trust.wanted(fleet.bootstrap(), big)
    with pytest.raises(VerificationError, match="at most"):
        trust.apply(fleet.bootstrap(), big, utc_now=NOW)


def test_names_and_hashes_are_checked_on_arrival():
    update = MetadataUpdate()
    for name in ("", "root", "root/", "root/x", "root/1234567890", "sha256/xyz", "assign/a", "x"):
        with pytest.raises(VerificationError):
            update.with_file(name, b"x")
    with pytest.raises(VerificationError, match="another hash"):
        update.with_file(f"sha256/{'0' * 64}", b"x")
    assert update.with_file(f"sha256/{manifest.digest(b'x')}", b"x").blobs


def test_a_signer_cannot_make_a_device_fetch_more_than_the_caps(fleet):
    for role, most in (
        ("snapshot", limits.MAX_SNAPSHOT_BYTES),
        ("bundles", limits.MAX_TARGETS_BYTES),
    ):
        meta = (
            fleet.timestamp.snapshot_meta
            if role == "snapshot"
            else fleet.snapshot.meta["bundles.json"]
        )
        kept, meta.length = meta.length, most + 1
        fleet.commit(snapshot=role != "snapshot")
        with pytest.raises(VerificationError, match="at most"):
            fleet.update_for(fleet.bootstrap())
        meta.length = kept
        fleet.commit()


def test_files_named_without_hash_or_length_are_refused(fleet):
    meta = fleet.snapshot.meta["bundles.json"]
    for change in ({"hashes": None}, {"length": None}, {"hashes": {"sha512": "0" * 128}}):
        kept = {name: getattr(meta, name) for name in change}
        for name, value in change.items():
            setattr(meta, name, value)
        fleet.commit()
        with pytest.raises(VerificationError, match="without its SHA-256"):
            fleet.update_for(fleet.bootstrap())
        for name, value in kept.items():
            setattr(meta, name, value)


@pytest.mark.parametrize(
    "bomb",
    [b"[" * 16_000, b'{"signed":' * 1_600, b'{"a":' + b"9" * 15_000 + b"}", b"\xff\xfe", b"", b"null", b"[]",
     b'{"signatures":[],"signed":{"_type":"timestamp"}}', b'{"signatures":1,"signed":[]}'],
)  # fmt: skip
def test_json_bombs_are_errors_of_ours(fleet, bomb):
    state = fleet.bootstrap()
    for call in (
        lambda: trust.wanted(state, MetadataUpdate(timestamp=bomb)),
        lambda: trust.apply(state, MetadataUpdate(timestamp=bomb), utc_now=NOW),
        lambda: trust.add_root(state, bomb),
        lambda: trust.parse_regions(bomb),
    ):
        with pytest.raises(VerificationError):
            call()


def test_too_many_delegated_roles(fleet):
    for n in range(limits.MAX_DELEGATED_ROLES + 1):
        fleet.snapshot.meta[f"r{n}.json"] = fleet.snapshot.meta["bundles.json"]
    fleet.commit()
    with pytest.raises(VerificationError, match="delegated roles"):
        fleet.update_for(fleet.bootstrap())


# --- bundles ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "custom",
    [
        {"name": "other"},
        {"version": "9"},
        {"kind": "model"},
        {"kind": "image"},
        {"release_counter": -1},
        {"release_counter": "1"},
        {"release_counter": 2**31},
        {"published_seq": 0},
        {"hardware": "pi4"},
        {"hardware": ["../x"]},
        {"hardware": ["x"] * 65},
    ],
)
def test_custom_data_must_equal_the_path_and_be_in_bounds(fleet, custom):
    fleet.add_bundle("bad", "1.0", custom=custom)
    fleet.commit("bundles")
    view = fleet.accepted().view
    assert [bundle.name for bundle in view.bundles] == ["app"]
    assert len(view.problems) == 1
    assert "bad@1.0" in view.problems[0]


@pytest.mark.parametrize(
    "path", ["files/bad@current", "files/Bad@1", "files/@1", "files/bad@", "files/bad@1@2"]
)
def test_paths_that_are_no_bundles_are_left_out(fleet, path):
    name, _, version = path.removeprefix("files/").partition("@")
    fleet.add_bundle(name, version, path=path)
    fleet.commit("bundles")
    assert [bundle.name for bundle in fleet.accepted().view.bundles] == ["app"]


def test_a_name_belongs_to_the_kind_that_came_first(fleet):
    fleet.add_bundle("app", "2.0", kind="firmware")
    fleet.commit("bundles")
    view = fleet.accepted().view
    assert [bundle.path for bundle in view.bundles] == ["files/app@1.0"]
    assert "app is a files bundle" in view.problems[0]


def test_a_role_signs_only_below_its_paths(fleet):
    fleet.add_bundle("x", "1.0", path="trust/regions")
    fleet.add_bundle("deep", "1.0", path="files/sub/deep@1.0")
    fleet.commit("bundles")
    view = fleet.accepted().view
    assert [bundle.name for bundle in view.bundles] == ["app"]
    assert view.region("eu") is not None


def team(fleet, *, paths, terminating, first):
    signer = CryptoSigner.generate_ed25519()
    role = DelegatedRole("team-a", [signer.public_key.keyid], 1, terminating, paths=paths)
    bundles = fleet.targets.delegations.roles["bundles"]
    fleet.targets.delegations = Delegations(
        fleet.targets.delegations.keys | {signer.public_key.keyid: signer.public_key},
        {"team-a": role, "bundles": bundles} if first else {"bundles": bundles, "team-a": role},
    )
    fleet.signers["team-a"] = [signer]
    return Targets(version=1, expires=fleet.after(30))


def commit_team(fleet, targets):
    data = fleet.sign("team-a", targets)
    fleet.files[f"sha256/{manifest.digest(data)}"] = data
    fleet.snapshot.meta["team-a.json"] = MetaFile.from_data(targets.version, data, ["sha256"])
    fleet.commit("targets")


def test_a_terminating_delegation_keeps_a_path_to_itself(fleet):
    targets = team(fleet, paths=["files/team-a-*"], terminating=True, first=True)
    fleet.add_bundle("team-a-tool", "1.0")
    fleet.commit("bundles")
    commit_team(fleet, targets)
    assert fleet.accepted().view.find("team-a-tool") is None
    targets.targets["files/team-a-tool@1.0"] = fleet.bundles.targets["files/team-a-tool@1.0"]
    targets.version += 1
    commit_team(fleet, targets)
    assert fleet.accepted().view.find("team-a-tool").role == "team-a"


def test_one_lapsed_team_does_not_stop_the_others(fleet):
    targets = team(fleet, paths=["files/team-a-*"], terminating=False, first=False)
    fleet.add_bundle("team-a-tool", "1.0")
    targets.targets["files/team-a-tool@1.0"] = fleet.bundles.targets.pop("files/team-a-tool@1.0")
    commit_team(fleet, targets)
    state = fleet.accepted()
    assert state.view.find("team-a-tool") is not None
    fleet.utc_now += 40 * DAY_S
    fleet.commit("bundles")
    view = fleet.accepted(state).view
    assert view.find("app") is not None
    assert view.find("team-a-tool") is None
    assert view.problems == ("role team-a is expired: its bundles are not listed",)


def test_hash_bins_are_refused_by_name(fleet):
    from tuf.api.metadata import SuccinctRoles

    key = fleet.signers["bundles"][0].public_key
    fleet.targets.delegations = Delegations(
        {key.keyid: key}, succinct_roles=SuccinctRoles([key.keyid], 1, 2, "bin")
    )
    fleet.commit("targets")
    with pytest.raises(VerificationError, match="hash bins"):
        fleet.accepted()


def test_check_manifest(fleet):
    bundle = fleet.accepted().view.find("app")
    found = Manifest(
        requires_features=[],
        kind="files",
        name="app",
        version="1.0",
        release_counter=0,
        hardware=[],
        access="fleet",
        payload_bytes=0,
        chunking=Chunking("fastcdc", 1, 1, 1),
        piece_ids=b"",
        piece_lengths=[],
        directories=[],
        files=[],
        symlinks=[],
    )
    trust.check_manifest(bundle, found)
    for change in (
        {"kind": "model"},
        {"name": "b"},
        {"version": "2"},
        {"release_counter": 1},
        {"hardware": ["pi4"]},
    ):
        with pytest.raises(VerificationError, match="the metadata says"):
            trust.check_manifest(bundle, msgspec.structs.replace(found, **change))


# --- members ---------------------------------------------------------------------------------------------------------
def test_a_gateway_is_known_by_its_key_alone(fleet):
    view = fleet.accepted().view
    found = view.judge_certificate(fleet.gateway.certificate_der)
    assert (found.role, found.id, found.key, found.region) == (
        "gateway",
        "gw-1",
        fleet.gateway.key,
        "eu",
    )
    again = identity.self_signed(identity.Identity(fleet.gateway.private_key), "whatever")
    assert view.judge_certificate(again.certificate_der).id == "gw-1"
    named = identity.self_signed(identity.Identity.generate(), "gw-1")
    with pytest.raises(NotAuthorizedError):
        view.judge_certificate(named.certificate_der)


def test_a_region_vouches_for_devices_and_never_for_a_gateway(fleet):
    view = fleet.accepted().view
    device = fleet.device("cam-1")
    found = view.judge_certificate(device.certificate_der)
    assert (found.role, found.id, found.key, found.region) == ("device", "cam-1", device.key, "eu")
    with pytest.raises(NotAuthorizedError, match="name of gateway"):
        view.judge_certificate(fleet.device("gw-1").certificate_der)


def test_regions_do_not_vouch_for_each_other(fleet):
    other = identity.CertificateAuthority.create("us")
    eu = fleet.regions().regions[0]
    us = trust.RegionEntry(name="us", ca=other.certificate_der, gateways=())
    fleet.set_regions(trust.Regions(regions=(eu, us)))
    fleet.commit("targets")
    view = fleet.accepted().view
    der = other.issue(identity.Identity.generate().public_raw, "cam-9")
    assert view.judge_certificate(der).region == "us"
    with pytest.raises(NotAuthorizedError):
        view.judge_certificate(der, region="eu")
    assert view.judge_certificate(fleet.gateway.certificate_der, region="us").role == "gateway"
    assert view.assign_keys("eu") == (fleet.assign_key.key,)
    assert view.assign_keys("us") == ()


def test_an_authority_that_is_not_listed_vouches_for_nobody(fleet):
    impostor = identity.CertificateAuthority.create("eu")
    stranger = identity.CertificateAuthority.create("mars")
    view = fleet.accepted().view
    for authority in (impostor, stranger):
        with pytest.raises(NotAuthorizedError):
            view.judge_certificate(
                authority.issue(identity.Identity.generate().public_raw, "cam-1")
            )


def test_an_authority_that_was_taken_off_the_list_stops_counting(fleet):
    state, device = fleet.accepted(), fleet.device("cam-1")
    assert state.view.judge_certificate(device.certificate_der)
    fleet.set_regions(trust.Regions(regions=()))
    fleet.commit("targets")
    with pytest.raises(NotAuthorizedError):
        fleet.accepted(state).view.judge_certificate(device.certificate_der)


def test_the_regions_document_must_not_contradict_itself(fleet):
    region = fleet.regions().regions[0]
    gateway = region.gateways[0]
    twin = msgspec.structs.replace
    other = identity.CertificateAuthority.create("us").certificate_der
    for regions in (
        (region, region),
        (twin(region, name="us"),),
        (twin(region, ca=b"x"),),
        (twin(region, ca=fleet.gateway.certificate_der),),
        (twin(region, gateways=(gateway, gateway)),),
        (region, trust.RegionEntry(name="us", ca=other, gateways=(gateway,))),
        (twin(region, gateways=(gateway, twin(gateway, id="gw-2"))),),
        (twin(region, gateways=(gateway, twin(gateway, id="gw-2", key="a" * 64))),),
        (twin(region, gateways=(twin(gateway, key="A" * 64),)),),
        (twin(region, name="EU"),),
    ):
        with pytest.raises(VerificationError):
            trust.encode_regions(trust.Regions(regions=regions))
    data = json.loads(trust.encode_regions(fleet.regions()))
    with pytest.raises(VerificationError):
        trust.parse_regions(json.dumps(data | {"schema": "edgesync.regions/2"}).encode())


def test_an_unsound_regions_document_is_refused_with_the_whole_set(fleet):
    state = fleet.accepted()
    fleet.add_document(trust.REGIONS_PATH, b'{"schema":"edgesync.regions/1","regions":[{}]}')
    fleet.commit("targets")
    with pytest.raises(VerificationError, match="regions"):
        fleet.accepted(state)
