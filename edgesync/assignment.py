"""The assignment set: one signed statement of which bundles one device shall run.

A gateway signs one set for each device with its assignment key; a set replaces the one before it, and what it no longer
names is removed. This module encodes, signs and verifies sets; whether a named bundle exists and fits is the business
of ``edgesync.trust`` and the installer. Invariants of a verified set:

* one of the region's listed assignment keys signed exactly these bytes, for this fleet, this device and this key;
* its sequence is not below the floor the caller keeps;
* each bundle name stands in it once.

Expiry gates accepting: a set that was accepted before is read again with ``read_accepted``, whatever its age.
"""

from collections.abc import Collection
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edgesync import envelope, limits
from edgesync.envelope import Signer
from edgesync.errors import (
    MetadataExpiredError,
    NotAuthorizedError,
    RollbackRefusedError,
    VerificationError,
)
from edgesync.ids import DeviceId, FleetId, PeerKey
from edgesync.manifest import NAME_PATTERN, Kind

ENVELOPE_TYPE: Final = "assign"
LIFETIME_S: Final = 90 * 86_400
"""How long a set may be accepted after it was signed; gateways sign anew at half of it."""

Hex32 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(pattern=NAME_PATTERN.replace("$", r"\Z"))]
Seconds = Annotated[float, Meta(ge=0, le=2**40)]
Action = Literal["install", "download"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One bundle the device shall have; times are Unix seconds."""

    kind: Kind
    name: Name
    version: Annotated[str, Meta(pattern=r"^(?!current\Z)[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}\Z")]
    target_hash: Hex32
    """SHA-256 of the manifest: must equal what the targets metadata says."""
    target_length: Annotated[int, Meta(ge=1, le=limits.MAX_MANIFEST_BYTES)]
    assignment_id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    action: Action = "install"
    rollout: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")] | None = None
    not_before: Seconds | None = None


class AssignmentSet(msgspec.Struct, frozen=True, kw_only=True):
    schema: Literal["edgesync.assignment/1"] = "edgesync.assignment/1"
    fleet: Hex32
    gateway_key: Hex32
    """The assignment key that signs this set."""
    device: Name
    device_key: Hex32
    sequence: Annotated[int, Meta(ge=1, lt=2**53)]
    issued: Seconds
    expires: Seconds
    entries: Annotated[tuple[Entry, ...], Meta(max_length=limits.MAX_ASSIGNMENT_ENTRIES)]


_decoder = msgspec.json.Decoder(AssignmentSet)


def next_sequence(last: int, utc_now: float) -> int:
    """The sequence of a device's next set: grows always, and past a database that was restored from a backup."""
    return max(last + 1, int(utc_now * 1000))


def encode(assignments: AssignmentSet) -> bytes:
    """The payload to sign. Raises VerificationError: out of bounds, a name twice, or over the cap."""
    payload = msgspec.json.encode(assignments)
    _parse(payload)
    return payload


def sign(assignments: AssignmentSet, signer: Signer) -> bytes:
    """The envelope of a set. Raises VerificationError: the set is not one its device would accept."""
    if assignments.gateway_key != signer.key:
        raise VerificationError("an assignment set must name the key that signs it")
    return envelope.sign(ENVELOPE_TYPE, encode(assignments), signer)


def verify(
    data: bytes,
    *,
    keys: Collection[PeerKey],
    fleet: FleetId,
    device_id: DeviceId,
    device_key: PeerKey,
    floor_sequence: int,
    utc_now: float,
) -> AssignmentSet:
    """Open a set that is for this device, from one of ``keys``, and not older than what it has.

    Raises NotAuthorizedError: another signer, fleet or device. Raises RollbackRefusedError: sequence below the floor.
    Raises MetadataExpiredError: too old to accept now. Raises VerificationError: no set, or out of bounds.
    """
    opened = envelope.verify(
        data, type_=ENVELOPE_TYPE, keys=keys, max_bytes=limits.MAX_ENVELOPE_BYTES
    )
    found = _parse(opened.payload)
    if found.gateway_key != opened.key:
        raise NotAuthorizedError("the assignment set names another key than the one that signed it")
    if found.fleet != fleet:
        raise NotAuthorizedError(f"the assignment set is for another fleet ({found.fleet[:16]})")
    if found.device != device_id or found.device_key != device_key:
        raise NotAuthorizedError(f"the assignment set is for device {found.device}, not this one")
    if found.sequence < floor_sequence:
        raise RollbackRefusedError(
            f"the assignment set has sequence {found.sequence}, this device has seen {floor_sequence}"
        )
    if utc_now >= found.expires:
        raise MetadataExpiredError(f"the assignment set expired at Unix time {found.expires:.0f}")
    return found


def read_accepted(data: bytes, *, keys: Collection[PeerKey]) -> AssignmentSet:
    """Read a set this device accepted before, if its signer is still one of ``keys``.

    Raises VerificationError (and its kinds): it is not, or these are not the bytes that were accepted.
    """
    opened = envelope.verify(data, type_=ENVELOPE_TYPE, keys=keys)
    return _parse(opened.payload)


def _parse(payload: bytes) -> AssignmentSet:
    if len(payload) > limits.MAX_ASSIGNMENT_SET_BYTES:
        raise VerificationError(
            f"an assignment set of {len(payload)} bytes is over the cap of {limits.MAX_ASSIGNMENT_SET_BYTES}"
        )
    try:
        found = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationError(f"the assignment set cannot be read: {exc}") from exc
    names = [entry.name for entry in found.entries]
    if len(set(names)) != len(names):
        raise VerificationError("the assignment set names a bundle twice")
    if found.expires <= found.issued:
        raise VerificationError("the assignment set expires before it is issued")
    return found


__all__ = [
    "ENVELOPE_TYPE",
    "LIFETIME_S",
    "AssignmentSet",
    "Entry",
    "encode",
    "next_sequence",
    "read_accepted",
    "sign",
    "verify",
]
