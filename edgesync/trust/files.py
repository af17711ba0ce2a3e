"""One metadata file at a time: caps, names, the fields we add to TUF's, and python-tuf's errors in our words.

Every function here works on unverified bytes or on objects python-tuf made of them; none of them believes anything.
"""

import datetime as dt
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

from tuf.api.exceptions import (
    BadVersionNumberError,
    ExpiredMetadataError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import Metadata, MetaFile, TargetFile, Timestamp

from edgesync import limits, manifest
from edgesync.errors import (
    BadSignatureError,
    MetadataExpiredError,
    RollbackRefusedError,
    VerificationError,
)
from edgesync.ids import Digest

ISSUED_FIELD: Final = "x-issued-at"
"""Extra field we sign into the timestamp: Unix seconds at signing. TUF has none, and a floor for time needs one."""
ROOT_FIELD: Final = "x-root-version"
"""Extra field of the timestamp: the newest root, so that a courier cannot hide one longer than a timestamp lives."""
MAX_TIME: Final = 253_402_300_799.0  # the last second of year 9999
_HEX64: Final = re.compile(r"[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Want:
    """One file to fetch next: its name on the wire and the most bytes it may have."""

    name: str
    max_bytes: int


@dataclass(frozen=True)
class MetadataUpdate:
    """Files collected from anywhere, unverified, towards a newer state."""

    roots: Mapping[int, bytes] = field(default_factory=dict)
    timestamp: bytes | None = None
    blobs: Mapping[Digest, bytes] = field(default_factory=dict)

    def with_file(self, name: str, data: bytes) -> "MetadataUpdate":
        """The update with one more file, as fetched under ``name``.

        Raises VerificationError: over its cap, not what its digest says, or not a name of metadata.
        """
        kind, _, rest = name.partition("/")
        if name == "timestamp":
            cap(name, data, limits.MAX_TIMESTAMP_BYTES)
            return replace(self, timestamp=data)
        if kind == "root" and rest.isdecimal() and rest.isascii() and len(rest) < 10:
            cap(name, data, limits.MAX_ROOT_BYTES)
            return replace(self, roots={**self.roots, int(rest): data})
        if kind == "sha256" and _HEX64.match(rest):
            cap(name, data, limits.MAX_TARGETS_BYTES)
            if manifest.digest(data) != rest:
                raise VerificationError(f"what came as {name[:20]}… has another hash")
            return replace(self, blobs={**self.blobs, Digest(rest): data})
        raise VerificationError(f"{name!a} is not the name of a metadata file")


@contextmanager
def mapped(what: str) -> Iterator[None]:
    """Turn python-tuf's errors about one file into ours."""
    try:
        yield
    except ExpiredMetadataError as exc:
        raise MetadataExpiredError(f"{what} metadata is not accepted: {exc}") from exc
    except BadVersionNumberError as exc:
        raise RollbackRefusedError(f"{what} metadata is not accepted: {exc}") from exc
    except UnsignedMetadataError as exc:
        raise BadSignatureError(f"{what} metadata is not accepted: {exc}") from exc
    except (
        RepositoryError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as exc:
        raise VerificationError(f"{what} metadata is not accepted: {exc}") from exc


def cap(name: str, data: bytes, most: int) -> None:
    if len(data) > most:
        raise VerificationError(f"{name} has {len(data)} bytes, at most {most} are allowed")


def digest_of(what: str, meta: MetaFile | TargetFile, most: int) -> Digest:
    """The SHA-256 signed metadata names for a file; TUF leaves hash and length optional, we do not."""
    digest = (meta.hashes or {}).get("sha256")
    if digest is None or not _HEX64.match(digest) or meta.length is None:
        raise VerificationError(f"{what!a} is named without its SHA-256 and length")
    if not 0 < meta.length <= most:
        raise VerificationError(f"{what!a} has {meta.length} bytes, at most {most} are allowed")
    return Digest(digest)


def check_exact(what: str, data: bytes) -> None:
    """Raise VerificationError unless a file reads back as it was signed.

    TUF signs what a file means, not its bytes: a time in lower case or a signature in upper-case hex would pass. Files
    below the timestamp are held by their hash; for root and timestamp this leaves white space as the only freedom.
    """
    with mapped(what):
        metadata = Metadata[Any].from_bytes(data)
        exact = metadata.to_dict() == json.loads(data)
        exact = exact and all(
            signature.signature == signature.signature.lower()
            for signature in metadata.signatures.values()
        )
    if not exact:
        raise VerificationError(f"{what} metadata is not written as it was signed")


def newest_root(timestamp: bytes) -> int:
    """The root version an unverified timestamp speaks of; 0 if of none."""
    cap("timestamp", timestamp, limits.MAX_TIMESTAMP_BYTES)
    check_exact("timestamp", timestamp)
    with mapped("timestamp"):
        signed = Metadata[Timestamp].from_bytes(timestamp).signed
        value = signed.unrecognized_fields.get(ROOT_FIELD, 0)
    if type(value) is not int or not 0 <= value <= limits.MAX_ROOT_ROTATIONS:
        raise VerificationError(f"the timestamp metadata has no sound {ROOT_FIELD}")
    return value


def issued_at(timestamp: Timestamp) -> float:
    value = timestamp.unrecognized_fields.get(ISSUED_FIELD)
    if type(value) is not int or not 0 <= value < timestamp.expires.timestamp():
        raise VerificationError(f"the timestamp metadata has no sound {ISSUED_FIELD}")
    return float(value)


def datetime_of(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(min(max(seconds, 0.0), MAX_TIME), dt.UTC)
