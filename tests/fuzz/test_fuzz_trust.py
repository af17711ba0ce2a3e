"""Mutated bytes into everything that reads signed or trust data: only errors of the project's own may come out.

A short seeded run; EDGESYNC_FUZZ_SECONDS makes it a long one.
"""

import json
import os
import random
import time

import pytest

from edgesync import assignment, envelope, identity, manifest, trust
from edgesync.assignment import AssignmentSet, Entry
from edgesync.errors import EdgeSyncError
from edgesync.testing.metadata import FleetMetadata
from edgesync.trust import MetadataUpdate

NOW = 1_800_000_000.0
SECONDS = float(os.environ.get("EDGESYNC_FUZZ_SECONDS", "0.6"))
SEED = int(os.environ.get("EDGESYNC_FUZZ_SEED", "1"))

FLEET = FleetMetadata(utc_now=NOW)
FLEET.add_bundle("app", "1.0")
FLEET.commit("bundles")
FLEET.new_root("root")
FLEET.commit()
STATE = FLEET.bootstrap()
WHOLE = FLEET.accepted()
UPDATE = FLEET.update_for(STATE)
DEVICE = FLEET.device("cam-1")
SET = assignment.sign(
    AssignmentSet(
        fleet=STATE.fleet_id,
        gateway_key=FLEET.assign_key.key,
        device="cam-1",
        device_key=DEVICE.key,
        sequence=7,
        issued=NOW,
        expires=NOW + 1000,
        entries=(
            Entry(
                kind="files",
                name="app",
                version="1.0",
                target_hash="a" * 64,
                target_length=10,
                assignment_id="a",
            ),
        ),
    ),
    FLEET.assign_key,
)

TOKENS = [
    text.encode("latin-1") for text in ("null", "true", "-1", "1e999", "9" * 20, '""', "[]", "{}")
]
TOKENS += [b'"\\ud800"', b"NaN", b"\xff"]


def mutate(rng, data):
    raw = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(6):
            case 0 if raw:
                raw[at % len(raw)] = rng.randrange(256)
            case 1:
                raw[at:at] = rng.choice(TOKENS)
            case 2:
                del raw[at : at + rng.randint(1, 40)]
            case 3:
                raw[at:at] = raw[at : at + rng.randint(1, 60)]
            case 4:
                raw[at:at] = rng.choice((b"[", b'{"a":')) * rng.randint(1, 3000)
            case _:
                # Replace one JSON value by another kind: gets past the first decoder more often than bytes do.
                text = bytes(raw)
                start = text.find(b":", at)
                if start >= 0:
                    end = min(
                        (n for c in (b",", b"}", b"]") if (n := text.find(c, start)) >= 0),
                        default=len(raw),
                    )
                    raw[start + 1 : end] = rng.choice(TOKENS)
    return bytes(raw)


def take_assignment(data):
    assignment.verify(
        data,
        keys={FLEET.assign_key.key},
        fleet=STATE.fleet_id,
        device_id="cam-1",
        device_key=DEVICE.key,
        floor_sequence=1,
        utc_now=NOW,
    )


def resigned(payload):
    """The payload under an honest signature: what a stolen key can send."""
    if len(payload) < 60_000:
        take_assignment(envelope.sign("assign", payload, FLEET.assign_key))


def timestamp(data):
    update = MetadataUpdate(UPDATE.roots, data, UPDATE.blobs)
    trust.wanted(STATE, update)
    trust.apply(STATE, update, utc_now=NOW)


def hashed(role):
    """A file under the digest the set names: only memory gone wrong gets this far."""
    honest = dict(WHOLE.delegated)["bundles"] if role == "bundles" else getattr(WHOLE, role)
    digest = manifest.digest(honest)

    def take(data):
        update = MetadataUpdate(UPDATE.roots, UPDATE.timestamp, {**UPDATE.blobs, digest: data})
        trust.apply(STATE, update, utc_now=NOW)

    return take


TARGETS = {
    "envelope": (
        lambda data: envelope.verify(data, type_="assign", keys={FLEET.assign_key.key}),
        SET,
    ),
    "claimed_key": (envelope.claimed_key, SET),
    "assignment": (take_assignment, SET),
    "assignment_signed": (
        resigned,
        envelope.verify(SET, type_="assign", keys={FLEET.assign_key.key}).payload,
    ),
    "timestamp": (timestamp, FLEET.files["timestamp"]),
    "root": (lambda data: trust.add_root(STATE, data), FLEET.files["root/2"]),
    "first_root": (
        lambda data: trust.bootstrap({1: data}, (1, manifest.digest(data))),
        FLEET.files["root/1"],
    ),
    "regions": (trust.parse_regions, WHOLE.regions),
    "snapshot": (hashed("snapshot"), WHOLE.snapshot),
    "certificate": (WHOLE.view.judge_certificate, DEVICE.certificate_der),
    "authority": (identity.authority_region, FLEET.authority.certificate_der),
}


@pytest.mark.parametrize("target", TARGETS)
def test_only_our_errors_come_out(target):
    function, honest = TARGETS[target]
    function(honest)
    rng = random.Random(f"{SEED}/{target}")
    deadline = time.monotonic() + SECONDS / 2
    runs = 0
    while runs < 50 or time.monotonic() < deadline:
        data = mutate(rng, honest)
        try:
            function(data)
        except EdgeSyncError:
            pass
        except BaseException:
            print(f"seed {SEED}, target {target}, run {runs}: {data!r:.2000}")
            raise
        runs += 1
    print(f"{target}: {runs} runs, seed {SEED}")


ROLES = ("root", "targets", "bundles", "snapshot", "timestamp")


@pytest.mark.parametrize("role", ROLES)
def test_signed_nonsense_is_an_error_of_ours(role):
    """A thief of a role's key signs JSON of any shape: python-tuf's own parsers are behind the signature."""
    from securesystemslib.formats import encode_canonical

    rng = random.Random(f"{SEED}/signed/{role}")
    honest = {
        "root": FLEET.files["root/2"],
        "timestamp": FLEET.files["timestamp"],
        "snapshot": WHOLE.snapshot,
        "targets": WHOLE.targets,
        "bundles": dict(WHOLE.delegated)["bundles"],
    }[role]
    deadline = time.monotonic() + SECONDS / 2
    runs = 0
    while runs < 20 or time.monotonic() < deadline:
        runs += 1
        value = json.loads(honest)
        graft(rng, value["signed"])
        try:
            canonical = encode_canonical(value["signed"]).encode()
        except Exception:  # noqa: BLE001 - canonical JSON has no floats: nothing to sign
            continue
        value["signatures"] = [
            {"keyid": signer.public_key.keyid, "sig": signer.sign(canonical).signature}
            for signer in FLEET.signers[role]
        ]
        data = json.dumps(value).encode()
        try:
            if role == "root":
                trust.add_root(STATE, data)
            elif role == "timestamp":
                timestamp(data)
            else:
                below(role, data)
        except EdgeSyncError:
            pass


def graft(rng, value):
    """Put a wrong value somewhere into a JSON object."""
    place, key = value, None
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        break
    place[key] = rng.choice(
        [
            None,
            True,
            -1,
            0,
            2**80,
            "",
            "x" * 300,
            [],
            {},
            [[]],
            {"a": {}},
            "9999-99-99T99:99:99Z",
            "\ud800",
        ]
    )


def below(role, data):
    from tuf.api.metadata import MetaFile, Snapshot, Timestamp

    snapshot = Snapshot(version=9, expires=FLEET.after(9), meta=dict(FLEET.snapshot.meta))
    if role != "snapshot":
        number = getattr(FLEET, role).version
        snapshot.meta[f"{role}.json"] = MetaFile.from_data(number, data, ["sha256"])
    signed = data if role == "snapshot" else FLEET.sign("snapshot", snapshot)
    number = FLEET.snapshot.version if role == "snapshot" else 9
    stamp = Timestamp(
        version=9,
        expires=FLEET.after(9),
        snapshot_meta=MetaFile.from_data(number, signed, ["sha256"]),
        unrecognized_fields={trust.ISSUED_FIELD: int(NOW), trust.ROOT_FIELD: 2},
    )
    blobs = {**UPDATE.blobs, manifest.digest(signed): signed, manifest.digest(data): data}
    update = MetadataUpdate(UPDATE.roots, FLEET.sign("timestamp", stamp), blobs)
    trust.wanted(STATE, update)
    trust.apply(STATE, update, utc_now=NOW).view.latest("app")
