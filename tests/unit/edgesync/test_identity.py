import datetime as dt
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from edgesync import identity, limits
from edgesync.errors import NotAuthorizedError, StateCorruptError
from edgesync.identity import CertificateAuthority, Identity

AUTHORITY = CertificateAuthority.create("eu")


def member(name="cam-1"):
    made = Identity.generate()
    return made.with_certificate(AUTHORITY.issue(made.public_raw, name))


def test_issue_and_check():
    device = member()
    der = device.certificate_der
    identity.check_issued(der, AUTHORITY.certificate_der)
    assert identity.certificate_key(der) == device.key
    assert identity.certificate_id(der) == device.id == "cam-1"
    assert identity.certificate_issuer(der) == "eu"
    assert identity.authority_region(AUTHORITY.certificate_der) == AUTHORITY.region == "eu"
    assert len(der) <= limits.MAX_CERTIFICATE_BYTES


def test_certificates_hold_from_1970_to_9999():
    for der in (member().certificate_der, AUTHORITY.certificate_der):
        certificate = x509.load_der_x509_certificate(der)
        assert certificate.not_valid_before_utc == dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
        assert certificate.not_valid_after_utc.year == 9999


def test_longest_name():
    assert member("a" * 63).id == "a" * 63


def test_pem_round_trip():
    device = member()
    again = Identity.from_pem(device.key_pem(), device.certificate_pem())
    assert (again.key, again.id, again.certificate_der) == (
        device.key,
        "cam-1",
        device.certificate_der,
    )
    bare = Identity.from_pem(device.key_pem())
    assert bare.certificate is None
    with pytest.raises(ValueError, match="no certificate"):
        bare.certificate_pem()
    authority = CertificateAuthority.from_pem(AUTHORITY.key_pem(), AUTHORITY.certificate_pem())
    assert authority.region == "eu"


def test_damaged_files_are_state_errors():
    device, other = member(), member("cam-2")
    for key, certificate in (
        (b"", None),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", None),
        (device.key_pem(), b"nonsense"),
        (device.key_pem(), other.certificate_pem()),
    ):
        with pytest.raises(StateCorruptError):
            Identity.from_pem(key, certificate)
    with pytest.raises(StateCorruptError):
        CertificateAuthority.from_pem(device.key_pem(), AUTHORITY.certificate_pem())


def test_another_authority_of_the_same_name_does_not_count():
    impostor = CertificateAuthority.create("eu")
    made = Identity.generate()
    with pytest.raises(NotAuthorizedError, match="not issued by this region"):
        identity.check_issued(impostor.issue(made.public_raw, "cam-1"), AUTHORITY.certificate_der)


def test_a_member_cannot_issue():
    device, made = member(), Identity.generate()
    forged = CertificateAuthority(device.private_key, device.certificate).issue(
        made.public_raw, "gw-1"
    )
    with pytest.raises(NotAuthorizedError):
        identity.check_issued(forged, AUTHORITY.certificate_der)
    with pytest.raises(NotAuthorizedError):
        identity.authority_region(device.certificate_der)


def test_an_authority_is_no_member():
    with pytest.raises(NotAuthorizedError):
        identity.check_issued(AUTHORITY.certificate_der, AUTHORITY.certificate_der)


def test_flipping_any_byte_is_refused():
    der = bytearray(member().certificate_der)
    for position in range(0, len(der), 3):
        der[position] ^= 1
        with pytest.raises(NotAuthorizedError):
            identity.check_issued(bytes(der), AUTHORITY.certificate_der)
        der[position] ^= 1


def test_strange_certificates_are_refused():
    for der in (b"", b"\x30\x80", b"x" * 100, bytes(limits.MAX_CERTIFICATE_BYTES + 1)):
        with pytest.raises(NotAuthorizedError):
            identity.certificate_key(der)
    curve = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(NotAuthorizedError, match="not an Ed25519 key"):
        identity.certificate_key(build(["cam-1"], curve, hashes.SHA256()))
    key = Ed25519PrivateKey.generate()
    for names in ([], ["a", "b"], ["Not A Name"], ["a" * 64], ["cam-1\n"]):
        with pytest.raises(NotAuthorizedError):
            identity.certificate_id(build(names, key, None))
    with pytest.raises(NotAuthorizedError, match="other names"):
        identity.certificate_id(build(["cam-1"], key, None, alternatives=["cam-1", "gw-1"]))


def build(names, key, algorithm, alternatives=None):
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(identity.NOT_BEFORE)
        .not_valid_after(identity.NOT_AFTER)
    )
    if alternatives is not None:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in alternatives]),
            critical=False,
        )
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def test_bad_names_are_our_own_mistake():
    for name in ("", "Cam", "-cam", "a" * 64, "cam 1"):
        with pytest.raises(ValueError, match="not of the form"):
            AUTHORITY.issue(Identity.generate().public_raw, name)
        with pytest.raises(ValueError, match="not of the form"):
            identity.self_signed(Identity.generate(), name)


def test_repr_tells_no_secret():
    device = member()
    secret = device.private_key.private_bytes_raw()
    assert secret.hex() not in repr(device)
    assert repr(secret)[2:-1] not in repr(device)


def test_mutual_tls_with_openssl_in_strict_mode(tmp_path):
    """The same certificates serve the broker's door: OpenSSL on both sides, strict about extensions."""
    device, gateway = member(), member("gw-1")
    ca = tmp_path / "ca.pem"
    ca.write_bytes(AUTHORITY.certificate_pem())

    def context(role, who):
        made = ssl.SSLContext(role)
        made.load_verify_locations(ca)
        made.verify_flags |= ssl.VERIFY_X509_STRICT
        made.verify_mode = ssl.CERT_REQUIRED
        (tmp_path / "key").write_bytes(who.key_pem())
        (tmp_path / "crt").write_bytes(who.certificate_pem())
        made.load_cert_chain(tmp_path / "crt", tmp_path / "key")
        return made

    server_context = context(ssl.PROTOCOL_TLS_SERVER, gateway)
    client_context = context(ssl.PROTOCOL_TLS_CLIENT, device)
    left, right = socket.socketpair()
    seen = []

    def serve():
        with server_context.wrap_socket(left, server_side=True) as tls:
            seen.append(identity.certificate_id(tls.getpeercert(binary_form=True)))
            tls.send(b"ok")

    thread = threading.Thread(target=serve)
    thread.start()
    with client_context.wrap_socket(right, server_hostname="gw-1") as tls:
        assert tls.recv(2) == b"ok"
        assert identity.certificate_key(tls.getpeercert(binary_form=True)) == gateway.key
    thread.join(5)
    assert seen == ["cam-1"]
