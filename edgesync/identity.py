"""Who a machine is: one Ed25519 key, and a certificate that says which name goes with it.

It makes keys, certificates and the certificate authority of a region, and checks that a certificate was issued by one;
which authorities count is the business of ``edgesync.trust``. It opens no files and no sockets. Invariants:

* certificates are valid from 1970 to 9999, because TLS libraries compare with the system clock, and a device's may be
  anything: how long a member is one is governed by signed metadata;
* a certificate carries exactly one common name, and the same as its only DNS name;
* an authority issues directly: there are no chains, and what it issues can issue nothing.

One identity serves three doors: TLS at the broker, TLS between QUIC peers, and the proof a QUIC client signs.
"""

import datetime as dt
import re
from dataclasses import dataclass, field, replace
from typing import Final, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edgesync import envelope, limits
from edgesync.errors import NotAuthorizedError, StateCorruptError
from edgesync.ids import PeerKey

NOT_BEFORE: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
NOT_AFTER: Final = dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC)
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_AUTHORITY_UNIT: Final = "EdgeSync region CA"
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
"""What ``cryptography`` raises about a certificate that is not what it seems."""


@dataclass(frozen=True)
class Identity:
    """A private key and, once somebody vouched for it, a certificate."""

    private_key: Ed25519PrivateKey = field(repr=False)
    certificate: x509.Certificate | None = field(default=None, repr=False)
    name: str = ""
    """The name the certificate carries; empty before there is one."""

    @classmethod
    def generate(cls, name: str = "") -> Self:
        """A new key. ``name`` is only remembered: ``self_signed`` or an authority puts it into a certificate."""
        return cls(Ed25519PrivateKey.generate(), None, name)

    @classmethod
    def from_pem(cls, key_pem: bytes, certificate_pem: bytes | None = None) -> Self:
        """Read what ``key_pem`` and ``certificate_pem`` wrote.

        Raises StateCorruptError: unreadable, not Ed25519, or the certificate is of another key.
        """
        private_key = load_private_key(key_pem)
        if certificate_pem is None:
            return cls(private_key)
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except _UNREADABLE as exc:
            raise StateCorruptError(f"the certificate cannot be read: {exc}") from exc
        return cls(private_key).with_certificate(certificate.public_bytes(Encoding.DER))

    def with_certificate(self, der: bytes) -> Self:
        """The same key with a certificate for it. Raises StateCorruptError: the certificate is of another key."""
        try:
            certificate = _load(der)
            key, name = _key_of(certificate), _name_of(certificate)
        except NotAuthorizedError as exc:
            raise StateCorruptError(str(exc)) from exc
        if key != self.key:
            raise StateCorruptError("the certificate is for another key than this machine's")
        return replace(self, certificate=certificate, name=name)

    def key_pem(self) -> bytes:
        """The private key, to be kept in a file only its owner reads."""
        return self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def certificate_pem(self) -> bytes:
        """Raises ValueError: there is no certificate yet (our own mistake)."""
        return self._certificate().public_bytes(Encoding.PEM)

    @property
    def certificate_der(self) -> bytes:
        """Raises ValueError: there is no certificate yet (our own mistake)."""
        return self._certificate().public_bytes(Encoding.DER)

    @property
    def public_raw(self) -> bytes:
        """The public key, 32 bytes."""
        return self.private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @property
    def key(self) -> PeerKey:
        return PeerKey(self.public_raw.hex())

    @property
    def id(self) -> str:
        return self.name

    def sign(self, context: str, payload: bytes) -> bytes:
        """64 bytes of signature for one purpose; see ``edgesync.envelope``."""
        return self.private_key.sign(envelope.message(context, payload))

    def _certificate(self) -> x509.Certificate:
        if self.certificate is None:
            raise ValueError("this identity has no certificate yet")
        return self.certificate


@dataclass(frozen=True)
class CertificateAuthority:
    """The authority of one region: what vouches for that region's devices, and for nothing else."""

    private_key: Ed25519PrivateKey = field(repr=False)
    certificate: x509.Certificate = field(repr=False)

    @classmethod
    def create(cls, region: str) -> Self:
        """Raises ValueError: ``region`` is not a name (our own mistake)."""
        key = Ed25519PrivateKey.generate()
        subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, _AUTHORITY_UNIT),
                x509.NameAttribute(NameOID.COMMON_NAME, _checked(region)),
            ]
        )
        certificate = (
            _builder(subject, subject, key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, None)
        )
        return cls(key, certificate)

    @classmethod
    def from_pem(cls, key_pem: bytes, certificate_pem: bytes) -> Self:
        """Raises StateCorruptError: unreadable, or the two do not belong together."""
        key = load_private_key(key_pem)
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
            belongs = _key_of(certificate) == raw_key(key.public_key()).hex()
        except (*_UNREADABLE, NotAuthorizedError) as exc:
            raise StateCorruptError(f"the region's certificate cannot be read: {exc}") from exc
        if not belongs:
            raise StateCorruptError("the region's certificate is for another key")
        return cls(key, certificate)

    def key_pem(self) -> bytes:
        return self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def certificate_der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def region(self) -> str:
        return _name_of(self.certificate, authority=True)

    def issue(self, public_raw: bytes, name: str) -> bytes:
        """A certificate (DER) that says ``name`` goes with this 32-byte key.

        Raises ValueError: ``name`` is not a member's name, or ``public_raw`` is no key.
        """
        public = Ed25519PublicKey.from_public_bytes(public_raw)
        return _member(public, name, self.private_key, self.certificate.subject).public_bytes(
            Encoding.DER
        )


def self_signed(identity: Identity, name: str) -> Identity:
    """``identity`` with a certificate signed by itself: a gateway's, which is known by its key alone."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _checked(name))])
    certificate = _member(identity.private_key.public_key(), name, identity.private_key, subject)
    return replace(identity, certificate=certificate, name=name)


def certificate_key(der: bytes) -> PeerKey:
    """The Ed25519 key a certificate is for. Raises NotAuthorizedError: it is none of ours."""
    return _key_of(_load(der))


def certificate_id(der: bytes) -> str:
    """The member's name a certificate carries. Raises NotAuthorizedError: it is none of ours."""
    return _name_of(_load(der))


def certificate_issuer(der: bytes) -> str:
    """The region whose authority a certificate says it is from, unverified; empty if it says none."""
    try:
        names = _load(der).issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    except _UNREADABLE as exc:
        raise NotAuthorizedError("a certificate's issuer cannot be read") from exc
    return str(names[0].value) if len(names) == 1 else ""


def authority_region(ca_der: bytes) -> str:
    """The region an authority is made out to. Raises NotAuthorizedError: it is none, or does not sign itself."""
    authority = _load(ca_der)
    _key_of(authority)
    name = _name_of(authority, authority=True)
    try:
        constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
        authority.verify_directly_issued_by(authority)
    except _UNREADABLE as exc:
        raise NotAuthorizedError("an authority's certificate does not hold") from exc
    if not constraints.ca:
        raise NotAuthorizedError("a member's certificate is not an authority's")
    return name


def check_issued(der: bytes, ca_der: bytes) -> None:
    """Raise NotAuthorizedError unless this authority issued this certificate, to a member."""
    certificate, authority = _load(der), _load(ca_der)
    _key_of(certificate)
    _name_of(certificate)
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        certificate.verify_directly_issued_by(authority)
    except _UNREADABLE as exc:
        raise NotAuthorizedError("the certificate was not issued by this region") from exc
    if constraints.ca:
        raise NotAuthorizedError("an authority's certificate is not a member's")


def load_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Raises StateCorruptError: unreadable or not Ed25519."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise StateCorruptError(f"a private key cannot be read: {exc}") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise StateCorruptError("a private key is not an Ed25519 key")
    return key


def raw_key(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _load(der: bytes) -> x509.Certificate:
    if len(der) > limits.MAX_CERTIFICATE_BYTES:
        raise NotAuthorizedError(
            f"a certificate of {len(der)} bytes is over the cap of {limits.MAX_CERTIFICATE_BYTES}"
        )
    try:
        return x509.load_der_x509_certificate(der)
    except _UNREADABLE as exc:
        raise NotAuthorizedError("a certificate cannot be read") from exc


def _key_of(certificate: x509.Certificate) -> PeerKey:
    try:
        key = certificate.public_key()
    except _UNREADABLE as exc:
        raise NotAuthorizedError("a certificate's key cannot be read") from exc
    if not isinstance(key, Ed25519PublicKey):
        raise NotAuthorizedError("a certificate's key is not an Ed25519 key")
    return PeerKey(raw_key(key).hex())


def _name_of(certificate: x509.Certificate, *, authority: bool = False) -> str:
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = names[0].value if len(names) == 1 else None
        if not isinstance(name, str) or not _NAME.match(name):
            raise NotAuthorizedError("a certificate does not carry one name of a member")
        if not authority:
            alternatives = certificate.extensions.get_extension_for_class(
                x509.SubjectAlternativeName
            ).value
            if list(alternatives) != [x509.DNSName(name)]:
                raise NotAuthorizedError(f"the certificate of {name} carries other names too")
    except _UNREADABLE as exc:
        raise NotAuthorizedError("a certificate's names cannot be read") from exc
    return name


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(f"{name!r} is not of the form [a-z0-9][a-z0-9-]{{0,62}}")
    return name


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Ed25519PublicKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOT_BEFORE)
        .not_valid_after(NOT_AFTER)
    )


def _member(
    public: Ed25519PublicKey, name: str, signer: Ed25519PrivateKey, issuer: x509.Name
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _checked(name))])
    # The two key identifiers are what OpenSSL's strict mode (default since Python 3.13) asks for.
    return (
        _builder(subject, issuer, public)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, None)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


__all__ = [
    "CertificateAuthority",
    "Identity",
    "authority_region",
    "certificate_id",
    "certificate_issuer",
    "certificate_key",
    "check_issued",
    "load_private_key",
    "raw_key",
    "self_signed",
]
