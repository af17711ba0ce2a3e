"""Signed statements over exact bytes: what everything but TUF metadata is signed with.

An envelope is JSON ``{"v": 1, "type": T, "key": hex public key, "sig": base64, "payload": base64}``; the Ed25519
signature covers ``edgesync/1/T``, a zero byte and the payload's exact bytes. Proofs that have a message of their own
(QUIC proof, join) carry the bare signature over the same prefix (``sign_raw``, ``verify_raw``).

It says who signed these bytes and for which purpose; it does not parse the payload and knows no clock. Invariants:

* the order is cap, envelope fields, expected signer, signature; the payload comes out only after all four;
* a signature made for one type never passes for another;
* bytes that were signed are handed on as they came, never encoded again;
* only errors of VerificationError come out, whatever the bytes.

Called by the assignment sets, the MQTT messages, the QUIC proof and the join.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Final, Literal, Protocol

import msgspec
from nacl.bindings import crypto_sign, crypto_sign_open, crypto_sign_seed_keypair
from nacl.exceptions import CryptoError

from edgesync import limits
from edgesync.errors import BadSignatureError, NotAuthorizedError, VerificationError
from edgesync.ids import PeerKey

PREFIX: Final = b"edgesync/1/"
SIGNATURE_BYTES: Final = 64
KEY_BYTES: Final = 32
_TYPE: Final = re.compile(r"[a-z][a-z0-9-]{0,31}\Z")
_KEY: Final = re.compile(r"[0-9a-f]{64}\Z")


class Signer(Protocol):
    """Whoever can sign: a machine's identity, or a SigningKey."""

    @property
    def key(self) -> PeerKey: ...

    def sign(self, context: str, payload: bytes) -> bytes: ...


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 key held as its 32-byte seed, for signing envelopes and nothing else."""

    _secret: bytes
    key: PeerKey

    @classmethod
    def from_seed(cls, seed: bytes) -> "SigningKey":
        """Raises ValueError: not 32 bytes."""
        if len(seed) != KEY_BYTES:
            raise ValueError("an Ed25519 seed has 32 bytes")
        public, secret = crypto_sign_seed_keypair(seed)
        return cls(secret, PeerKey(public.hex()))

    def sign(self, context: str, payload: bytes) -> bytes:
        signed: bytes = crypto_sign(message(context, payload), self._secret)
        return signed[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"SigningKey({self.key[:12]}…)"


class _Form(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    v: Literal[1]
    type: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9-]{0,31}\Z")]
    key: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    sig: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
    payload: Annotated[bytes, msgspec.Meta(max_length=limits.MAX_ENVELOPE_BYTES)]


_decoder = msgspec.json.Decoder(_Form)


@dataclass(frozen=True, slots=True)
class Envelope:
    """What was signed, and by whom, after the signature held."""

    type: str
    key: PeerKey
    payload: bytes


def message(context: str, payload: bytes) -> bytes:
    """The bytes a signature covers. Raises ValueError: ``context`` is not a type name (our own mistake)."""
    if not _TYPE.match(context):
        raise ValueError(f"{context!r} is not an envelope type")
    return b"".join((PREFIX, context.encode(), b"\0", payload))


def sign_raw(context: str, payload: bytes, signer: Signer) -> bytes:
    """64 bytes of signature over ``payload`` for the purpose ``context``."""
    return signer.sign(context, payload)


def verify_raw(context: str, payload: bytes, signature: bytes, key: bytes | PeerKey) -> None:
    """Raise BadSignatureError unless ``key`` (32 bytes or 64 hex digits) signed ``payload`` for ``context``."""
    raw = _raw_key(key)
    if len(signature) != SIGNATURE_BYTES:
        raise BadSignatureError(f"a signature of {len(signature)} bytes is none")
    try:
        crypto_sign_open(signature + message(context, payload), raw)
    except (CryptoError, TypeError, ValueError) as exc:
        raise BadSignatureError(
            f"the signature on this {context} is not by key {raw.hex()[:16]}"
        ) from exc


def sign(type_: str, payload: bytes, signer: Signer) -> bytes:
    """The envelope of ``payload``. Raises ValueError: the payload is over the cap (our own mistake)."""
    data = msgspec.json.encode(
        _Form(
            v=1, type=type_, key=signer.key, sig=sign_raw(type_, payload, signer), payload=payload
        )
    )
    if len(data) > limits.MAX_ENVELOPE_BYTES:
        raise ValueError(
            f"an envelope of {len(data)} bytes is over the cap of {limits.MAX_ENVELOPE_BYTES}"
        )
    return data


def verify(
    data: bytes,
    *,
    type_: str,
    keys: Collection[PeerKey],
    max_bytes: int = limits.MAX_ENVELOPE_BYTES,
) -> Envelope:
    """Open an envelope of ``type_`` signed by one of ``keys``.

    Raises NotAuthorizedError: it names another key. Raises BadSignatureError: the signature does not hold.
    Raises VerificationError: too large, no envelope, or of another type.
    """
    form = _read(data, max_bytes)
    if form.type != type_:
        raise VerificationError(f"expected a signed {type_}, got a signed {form.type}")
    if form.key not in keys:
        raise NotAuthorizedError(
            f"this {type_} is signed by key {form.key[:16]}, which may not sign it"
        )
    verify_raw(type_, form.payload, form.sig, PeerKey(form.key))
    return Envelope(form.type, PeerKey(form.key), form.payload)


def claimed_key(data: bytes, *, max_bytes: int = limits.MAX_ENVELOPE_BYTES) -> PeerKey:
    """The key an envelope says it is signed by, unverified: a hint for looking its owner up."""
    return PeerKey(_read(data, max_bytes).key)


def _read(data: bytes, max_bytes: int) -> _Form:
    if len(data) > max_bytes:
        raise VerificationError(
            f"a signed message of {len(data)} bytes is over the cap of {max_bytes}"
        )
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise VerificationError(f"a signed message cannot be read: {exc}") from exc


def _raw_key(key: bytes | PeerKey) -> bytes:
    if isinstance(key, str):
        if not _KEY.match(key):
            raise BadSignatureError("a key that is not 64 hex digits signs nothing")
        return bytes.fromhex(key)
    if len(key) != KEY_BYTES:
        raise BadSignatureError(f"a key of {len(key)} bytes signs nothing")
    return bytes(key)


__all__ = [
    "Envelope",
    "Signer",
    "SigningKey",
    "claimed_key",
    "message",
    "sign",
    "sign_raw",
    "verify",
    "verify_raw",
]
