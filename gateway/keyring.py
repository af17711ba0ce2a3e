"""The private keys of a gateway that are no TUF keys: its identity, its region's authority, its assignment key.

It reads and writes them in the data directory, 0600, and nothing else; TUF keys are ``gateway.repository``'s. A key
that is not there is one sentence that names the file.
"""

from pathlib import Path

from edgesync.envelope import Signer
from edgesync.errors import ConfigError
from edgesync.identity import CertificateAuthority, Identity, self_signed
from edgesync.storage.atomic import replace_file
from edgesync.storage.datadir import DataDir

MAX_KEY_BYTES = 64 * 1024


def create(
    datadir: DataDir, *, gateway_id: str, region: str
) -> tuple[Identity, CertificateAuthority, Identity]:
    """Make identity, authority and assignment key, write them, and return them in this order."""
    identity = self_signed(Identity.generate(gateway_id), gateway_id)
    authority = CertificateAuthority.create(region)
    assigner = Identity.generate()
    for folder in (datadir.ca, datadir.online):
        folder.mkdir(mode=0o700, exist_ok=True)
    for path, pem in (
        (datadir.identity_key, identity.key_pem()),
        (datadir.identity_certificate, identity.certificate_pem()),
        (datadir.ca / "ca.key", authority.key_pem()),
        (datadir.ca / "ca.crt", authority.certificate_pem()),
        (datadir.online / "assign.key", assigner.key_pem()),
    ):
        replace_file(path.parent, path.name, pem)
    return identity, authority, assigner


def identity(datadir: DataDir) -> Identity:
    return Identity.from_pem(_read(datadir.identity_key), _read(datadir.identity_certificate))


def authority(datadir: DataDir) -> CertificateAuthority:
    return CertificateAuthority.from_pem(_read(datadir.ca / "ca.key"), _read(datadir.ca / "ca.crt"))


def assignment_signer(datadir: DataDir) -> Signer:
    return Identity.from_pem(_read(datadir.online / "assign.key"))


def readable(datadir: DataDir) -> dict[str, bool]:
    """Which of these keys are here, by the name a status screen gives them."""
    return {
        "identity": _is_readable(datadir.identity_key),
        "authority": _is_readable(datadir.ca / "ca.key"),
        "assignments": _is_readable(datadir.online / "assign.key"),
    }


def _is_readable(path: Path) -> bool:
    try:
        with path.open("rb"):
            return True
    except OSError:
        return False


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_KEY_BYTES)
    except FileNotFoundError as exc:
        raise ConfigError(
            f"{path} is missing: this gateway cannot do without it, restore a backup"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror or exc}") from exc
