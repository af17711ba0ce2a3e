"""The region's certificate authority and the gateway's assignment key, as files of the data directory.

It makes them at ``gateway init`` and reads them for whoever signs; what certificates contain is
``edgesync.identity``'s business, which authorities count is decided by ``trust/regions``. Private keys are written
once, 0600, and never overwritten.
"""

import os
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from edgesync.envelope import SigningKey
from edgesync.errors import ConfigError, StateCorruptError
from edgesync.identity import CertificateAuthority, Identity, load_private_key

ASSIGN_KEY: Final = "assign.key"
_MAX_PEM_BYTES: Final = 16 * 1024


def create_authority(directory: Path, region: str) -> CertificateAuthority:
    """Make the region's authority in ``directory`` (``ca.key``, ``ca.crt``)."""
    authority = CertificateAuthority.create(region)
    directory.mkdir(mode=0o700, exist_ok=True)
    write_new(directory / "ca.key", authority.key_pem(), mode=0o600)
    write_new(directory / "ca.crt", authority.certificate_pem(), mode=0o644)
    sync_directory(directory)
    return authority


def load_authority(directory: Path) -> CertificateAuthority:
    """Raises ConfigError: not there or not readable. Raises StateCorruptError: damaged."""
    return CertificateAuthority.from_pem(
        read_key(directory / "ca.key", "the region's certificate authority"),
        read_key(directory / "ca.crt", "the region's certificate"),
    )


def issue(directory: Path, public_raw: bytes, name: str) -> bytes:
    """A member's certificate (DER) from the authority in ``directory``."""
    return load_authority(directory).issue(public_raw, name)


def create_assign_key(online: Path) -> SigningKey:
    """Make the key this gateway signs assignment sets with."""
    online.mkdir(mode=0o700, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    write_new(online / ASSIGN_KEY, pem(key), mode=0o600)
    sync_directory(online)
    return signing_key(key)


def load_assign_key(online: Path) -> SigningKey:
    """Raises ConfigError: not there or not readable. Raises StateCorruptError: damaged."""
    return signing_key(load_private_key(read_key(online / ASSIGN_KEY, "the assignment key")))


def create_identity(key_path: Path, certificate_path: Path, identity: Identity) -> None:
    """Keep an identity that has a certificate."""
    write_new(key_path, identity.key_pem(), mode=0o600)
    write_new(certificate_path, identity.certificate_pem(), mode=0o644)
    sync_directory(key_path.parent)


def load_identity(key_path: Path, certificate_path: Path) -> Identity:
    """Raises ConfigError: not there or not readable. Raises StateCorruptError: damaged."""
    return Identity.from_pem(
        read_key(key_path, "this machine's key"),
        read_key(certificate_path, "this machine's certificate"),
    )


def signing_key(key: Ed25519PrivateKey) -> SigningKey:
    return SigningKey.from_seed(key.private_bytes_raw())


def pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(path: Path, what: str) -> bytes:
    """The PEM file ``what`` is kept in. Raises ConfigError, StateCorruptError: too large to be one."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_PEM_BYTES + 1)
    except FileNotFoundError as exc:
        raise ConfigError(f"{what} is not at {path}: put the file back there") from exc
    except OSError as exc:
        raise ConfigError(f"{what} at {path} cannot be read: {exc.strerror}") from exc
    if len(data) > _MAX_PEM_BYTES:
        raise StateCorruptError(f"{path} is too large to be a key")
    return data


def write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Create ``path`` durably, with ``mode`` from its first moment. Raises ConfigError: it exists or cannot be made."""
    try:
        fd = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode
        )
        with open(fd, "wb") as stream:  # noqa: PTH123 - a descriptor
            stream.write(data)
            stream.flush()
            os.fsync(fd)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def sync_directory(path: Path) -> None:
    """Make new names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


__all__ = [
    "ASSIGN_KEY",
    "create_assign_key",
    "create_authority",
    "create_identity",
    "issue",
    "load_assign_key",
    "load_authority",
    "load_identity",
]
