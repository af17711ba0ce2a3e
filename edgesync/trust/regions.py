"""The document at ``trust/regions``: who the gateways are, and which authority vouches for a region's devices.

It is a target the ``targets`` role signs itself. A region's authority vouches for that region's devices and for nothing
else; a gateway is listed by its keys.
"""

from typing import Annotated, Final, Literal

import msgspec

from edgesync import identity, limits
from edgesync.errors import NotAuthorizedError, VerificationError
from edgesync.trust.files import cap

REGIONS_PATH: Final = "trust/regions"


class GatewayEntry(msgspec.Struct, frozen=True, kw_only=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """Identity key: what its TLS certificate must carry."""
    assign_key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class RegionEntry(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
    ca: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_CERTIFICATE_BYTES)]
    gateways: Annotated[
        tuple[GatewayEntry, ...], msgspec.Meta(max_length=limits.MAX_GATEWAYS_PER_REGION)
    ]


class Regions(msgspec.Struct, frozen=True, kw_only=True):
    """The document at ``trust/regions``: who the gateways are, and which authority vouches for a region's devices."""

    schema: Literal["edgesync.regions/1"] = "edgesync.regions/1"
    regions: Annotated[tuple[RegionEntry, ...], msgspec.Meta(max_length=limits.MAX_REGIONS)]


def encode_regions(document: Regions) -> bytes:
    """The bytes to sign as ``trust/regions``. Raises VerificationError: as ``parse_regions`` would."""
    data = msgspec.json.encode(document)
    parse_regions(data)
    return data


def parse_regions(data: bytes) -> Regions:
    """Read the regions document. Raises VerificationError: out of bounds, or it contradicts itself."""
    cap(REGIONS_PATH, data, limits.MAX_REGIONS_BYTES)
    try:
        document = _regions_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationError(f"the list of regions cannot be read: {exc}") from exc
    gateways = [gateway for region in document.regions for gateway in region.gateways]
    for what, values in (
        ("region", [region.name for region in document.regions]),
        ("gateway", [gateway.id for gateway in gateways]),
        ("gateway key", [gateway.key for gateway in gateways]),
        ("assignment key", [gateway.assign_key for gateway in gateways]),
    ):
        if len(set(values)) != len(values):
            raise VerificationError(f"the list of regions names a {what} twice")
    for region in document.regions:
        try:
            named = identity.authority_region(region.ca)
        except NotAuthorizedError as exc:
            raise VerificationError(f"the authority of region {region.name}: {exc}") from exc
        if named != region.name:
            raise VerificationError(f"the authority of region {region.name} is made out to {named}")
    return document


_regions_decoder = msgspec.json.Decoder(Regions)
