"""Names for the strings and bytes that identify things, so that a type checker tells them apart.

It checks nothing: ``edgesync.manifest`` and ``edgesync.wire.messages`` hold the patterns remote names must match.
"""

from dataclasses import dataclass
from typing import Literal, NewType

DeviceId = NewType("DeviceId", str)
"""Registered name of a device, ``[a-z0-9][a-z0-9-]{0,62}``."""

GatewayId = NewType("GatewayId", str)
"""Name of a gateway, same alphabet as a device's."""

PeerKey = NewType("PeerKey", str)
"""A machine's Ed25519 public key, 64 lower-case hex digits: who a peer is, whatever it calls itself."""

BundleName = NewType("BundleName", str)
Version = NewType("Version", str)

Digest = NewType("Digest", str)
"""SHA-256 as 64 lower-case hex digits: of a manifest's bytes it is the bundle id."""

PieceId = NewType("PieceId", bytes)
"""SHA-256 of a piece's plain bytes, 32 bytes."""

PieceIndex = NewType("PieceIndex", int)
"""Position of a piece in its manifest's piece table."""

FleetId = NewType("FleetId", str)
"""SHA-256 of the fleet's first root metadata, 64 hex digits."""

Role = Literal["device", "gateway"]
"""What a member is on the wire; the machine itself, not the daemon on it."""


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """A member of the fleet as its certificate was judged: by key for a gateway, by issuer for a device."""

    role: Role
    id: str
    key: PeerKey
    region: str = ""
    """The region that listed this gateway or vouched for this device; empty where nobody judged it."""
