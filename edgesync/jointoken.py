"""The text an operator carries from a gateway to a machine that shall join it.

It says which token this is, the secret that proves it, where the gateway is, and what the machine may believe before it
knows anything: the gateway's key and the hash of a root version. It decides nothing: the gateway keeps the token's
limits, and the machine believes only a gateway that holds this key.

Form: ``es1`` and the base64url (no padding) of msgpack ``[id, secret, key, root version, root sha256, [address, …]]``
followed by the first 4 bytes of its SHA-256, so that a token cut short in copying is refused as such.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec

from edgesync import limits
from edgesync.errors import UsageError
from edgesync.ids import Digest, PeerKey

PREFIX: Final = "es1"
SECRET_BYTES: Final = 32
MAX_TOKEN_CHARS: Final = 4096
_CHECK_BYTES: Final = 4
_ID_ALPHABET: Final = "abcdefghijkmnpqrstuvwxyz23456789"


class _Body(msgspec.Struct, frozen=True, array_like=True):
    token_id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]{8,32}\Z")]
    secret: Annotated[bytes, msgspec.Meta(min_length=16, max_length=64)]
    gateway_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    root_version: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_ROOT_ROTATIONS)]
    root_sha256: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    addresses: Annotated[
        list[Annotated[str, msgspec.Meta(max_length=200)]], msgspec.Meta(max_length=8)
    ]


@dataclass(frozen=True)
class JoinToken:
    token_id: str
    secret: bytes = field(repr=False)
    gateway_key: PeerKey
    root_version: int
    root_sha256: Digest
    """SHA-256 of root metadata ``root_version``: what the machine trusts first."""
    addresses: tuple[str, ...]
    """Where the gateway's QUIC port may be reached, ``HOST:PORT``."""


def new_id() -> str:
    """12 characters that are hard to misread aloud."""
    return "".join(secrets.choice(_ID_ALPHABET) for _ in range(12))


def encode(token: JoinToken) -> str:
    body = msgspec.msgpack.encode(
        _Body(
            token.token_id,
            token.secret,
            bytes.fromhex(token.gateway_key),
            token.root_version,
            bytes.fromhex(token.root_sha256),
            list(token.addresses),
        )
    )
    check = hashlib.sha256(body).digest()[:_CHECK_BYTES]
    return PREFIX + base64.urlsafe_b64encode(body + check).rstrip(b"=").decode()


def decode(text: str) -> JoinToken:
    """Read a token as typed or piped. Raises UsageError: it is none, or was cut or changed in copying."""
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARS:
        raise UsageError(
            "this is not a join token: copy the whole line that edgesync token create printed"
        )
    try:
        raw = base64.b64decode(
            text[len(PREFIX) :] + "=" * (-(len(text) - len(PREFIX)) % 4), b"-_", validate=True
        )
        body, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
        if hashlib.sha256(body).digest()[:_CHECK_BYTES] != check:
            raise UsageError(
                "the join token was cut short or changed in copying: copy the whole line again"
            )
        parsed = msgspec.msgpack.decode(body, type=_Body)
    except (binascii.Error, ValueError, msgspec.DecodeError, RecursionError) as exc:
        raise UsageError(
            "the join token was cut short or changed in copying: copy the whole line again"
        ) from exc
    return JoinToken(
        parsed.token_id,
        parsed.secret,
        PeerKey(parsed.gateway_key.hex()),
        parsed.root_version,
        Digest(parsed.root_sha256.hex()),
        tuple(parsed.addresses),
    )


__all__ = ["MAX_TOKEN_CHARS", "PREFIX", "SECRET_BYTES", "JoinToken", "decode", "encode", "new_id"]
