"""`gateway init`: a new fleet from nothing; and how a command reaches what init made."""

import ipaddress
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from edgesync import config, trust
from edgesync.config import HostPort
from edgesync.errors import ConfigError, UsageError
from edgesync.identity import Identity, self_signed
from edgesync.ids import DeviceId, GatewayId
from edgesync.storage.datadir import DataDir
from edgesync.trust import GatewayEntry, RegionEntry, Regions
from gateway import certificates, fleet
from gateway.acting import become_owner
from gateway.config import QUIC_PORT, GatewaySettings
from gateway.fleet import Fleet
from gateway.repository import Repository
from gateway.service.devices import Certify
from gateway.store import GatewayStore

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_THRESHOLD: Final = re.compile(r"([1-9][0-9]?)-of-([1-9][0-9]?)\Z")
MAX_REGION_CHARS: Final = 63 - len("gateway-")


def parse_threshold(text: str) -> tuple[int, int]:
    """``2-of-3`` → (2, 3). Raises UsageError."""
    match = _THRESHOLD.match(text)
    if match is None:
        raise UsageError(f"--threshold {text!a} is not of the form M-of-N, such as 2-of-3")
    return int(match[1]), int(match[2])


def init(
    path: Path,
    *,
    name: str,
    advertise: Sequence[str],
    region: str,
    threshold: tuple[int, int],
    utc_now: float | None = None,
) -> dict[str, Any]:
    """Make a fleet and its first gateway in ``path``; returns what the command prints.

    Raises UsageError: a name, an address or the threshold. Raises ConfigError: there is something already.
    """
    for what, value, longest in (("fleet", name, 63), ("region", region, MAX_REGION_CHARS)):
        if not _NAME.match(value) or len(value) > longest:
            raise UsageError(
                f"{what} name {value!a} is not of the form [a-z0-9][a-z0-9-]{{0,{longest - 1}}}"
            )
    addresses = _advertised(advertise)
    utc_now = time.time() if utc_now is None else utc_now
    gateway_id = GatewayId(f"gateway-{region}")
    config_path = DataDir(path, "gateway").config
    if not config_path.is_relative_to(path) and not DataDir.exists(path):
        # Below /etc only root can write; from here on this process may be the directory's owner.
        _write_settings(config_path, addresses)
    become_owner(path)
    with DataDir.building(path, "gateway") as datadir:
        identity = self_signed(Identity.generate(gateway_id), gateway_id)
        certificates.create_identity(datadir.identity_key, datadir.identity_certificate, identity)
        authority = certificates.create_authority(datadir.ca, region)
        assigner = certificates.create_assign_key(datadir.online)
        for folder in (datadir.packs, datadir.blobs):
            folder.mkdir(mode=0o700)
        with GatewayStore.open(datadir) as store:
            entry = GatewayEntry(id=gateway_id, key=identity.key, assign_key=assigner.key)
            made = Repository.create(
                store.db,
                keys=datadir.keys,
                online=datadir.online,
                regions=Regions(
                    regions=(
                        RegionEntry(name=region, ca=authority.certificate_der, gateways=(entry,)),
                    )
                ),
                threshold=threshold,
                utc_now=utc_now,
            )
            fleet_id = made.fleet_id()
            with store.atomic():
                fleet.save(store, Fleet(name, fleet_id, region, gateway_id, identity.key, utc_now))
                store.emit(
                    "operator",
                    "gateway.initialised",
                    f"gateway:{gateway_id}",
                    {"fleet": name},
                    utc_now=utc_now,
                )
        _write_settings(config_path, addresses)
    return {
        "name": name,
        "fleet_id": fleet_id,
        "region": region,
        "gateway_id": gateway_id,
        "key": identity.key,
        "threshold": f"{threshold[0]}-of-{threshold[1]}",
        "data": str(datadir.path),
        "config": str(datadir.config),
        "keys": str(datadir.keys),
        "advertise": [str(address) for address in addresses],
    }


def repository(store: GatewayStore) -> Repository:
    return Repository(store.db, keys=store.datadir.keys, online=store.datadir.online)


def certifier(store: GatewayStore) -> Certify:
    """What issues certificates for this region's devices. Raises ConfigError: the authority's key is not here."""
    authority = certificates.load_authority(store.datadir.ca)

    def certify(device_id: DeviceId, public_raw: bytes) -> bytes:
        return authority.issue(public_raw, device_id)

    return certify


def bundle(store: GatewayStore, name: str, version: str | None) -> trust.BundleTarget | None:
    """What is published under this name; None for the version: the newest."""
    return repository(store).trusted().find(name, version)


def advertised(settings: GatewaySettings) -> list[str]:
    """Where devices find this gateway, as tokens and answers to joins carry it. Raises ConfigError: nowhere."""
    if not settings.advertise:
        raise ConfigError(
            "this gateway does not say where devices reach it: set advertise in its settings"
        )
    return [str(address) for address in settings.advertise]


def _advertised(given: Sequence[str]) -> list[HostPort]:
    try:
        addresses = [config.parse_host_port(text, default_port=QUIC_PORT) for text in given]
    except ValueError as exc:
        raise UsageError(f"--advertise: {exc}") from exc
    return addresses or _own_addresses()


def _own_addresses() -> list[HostPort]:
    """Public addresses of this machine. Raises UsageError: it has none, so only its operator knows its address."""
    import ifaddr

    found = []
    for adapter in ifaddr.get_adapters():
        for ip in adapter.ips:
            text = ip.ip if isinstance(ip.ip, str) else ip.ip[0]
            if ipaddress.ip_address(text).is_global:
                found.append(HostPort(text, QUIC_PORT))
    if not found:
        raise UsageError(
            "this machine has only private addresses: say how devices reach it with --advertise HOST[:PORT]"
        )
    return found


def _write_settings(path: Path, addresses: Sequence[HostPort]) -> None:
    """Write the commented file, unless there is one: an operator's, or that of an attempt that was cut off."""
    if path.exists():
        return
    text = config.render(
        GatewaySettings, "Settings of edgesync gateway", {"advertise": tuple(addresses)}
    )
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"cannot make {path.parent}: {exc.strerror or exc}") from exc
    certificates.write_new(path, text.encode(), mode=config.file_mode())
