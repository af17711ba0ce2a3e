"""Enrolling this machine: `edgesync agent join`, `agent recover`, and the same question asked again while pending.

It makes the key, asks the gateway the token names, checks that the first root is the one the token pins, and writes the
data directory; from then on nothing but signed metadata is believed. The key is on disk before the gateway is asked, so
that a lost reply is answered again with the same certificate. ``join.json`` (0600) keeps what the gateway said, and the
token only as long as the device is pending.
"""

import asyncio
import contextlib
import functools
import json
import re
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from device.config import AgentSettings
from device.metadata import Metadata
from device.reaching import UdpVerdict, reach
from device.trust_store import TrustStore
from edgesync import __version__, config, jointoken, limits, trust
from edgesync.config import HostPort, parse_host_port
from edgesync.errors import (
    ConfigError,
    ConflictError,
    EdgeSyncError,
    ErrorCode,
    NotAuthorizedError,
    PeerUnreachableError,
    StateCorruptError,
    TransportError,
    UsageError,
)
from edgesync.identity import Identity
from edgesync.ids import DeviceId, GatewayId, PeerKey, PieceId
from edgesync.io.proxy import ProxySettings
from edgesync.jointoken import JoinToken
from edgesync.manifest import NAME_PATTERN
from edgesync.storage.atomic import replace_file
from edgesync.storage.datadir import DataDir
from edgesync.transport.connection import JoinConnection, PeerConnection, PieceAnswer
from edgesync.transport.endpoint import Attempt, Endpoint, EndpointConfig
from edgesync.wire.messages import (
    ControlMessage,
    Join,
    Joined,
    JoinRefused,
    Request,
    join_payload,
)

JOIN_TIMEOUT_S = 15.0
DIAL_TIMEOUT_S = 6.0
_REFUSALS = {
    "unknown_token": "the gateway does not know this token: was it made on this gateway?",
    "expired": "the token has expired: make a new one on the gateway with `edgesync token create`",
    "used_up": "the token was used by another machine: make a new one with `edgesync token create`",
    "revoked": "the token was revoked: make a new one with `edgesync token create`",
    "id_refused": "the token does not allow this id: choose another with --id",
    "id_taken": "another machine has this id: choose another with --id",
    "busy": "the gateway answers too many joins just now: try again in a minute",
    "rejected": "the operator rejected this device",
}


@dataclass
class Membership:
    """What ``join.json`` keeps."""

    id: DeviceId
    gateway: GatewayId
    gateway_key: PeerKey
    region: str
    state: str
    """``accepted`` or ``pending``."""
    hardware: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    gateway_quic: list[str] = field(default_factory=list)
    brokers: list[str] = field(default_factory=list)
    token: str = field(default="", repr=False)

    @classmethod
    def load(cls, data: DataDir) -> "Membership":
        """Raises ConfigError: this directory was never joined to the end."""
        try:
            held = cls(**json.loads(data.join_file.read_bytes()))
            ok = all(isinstance(value, str) for value in held._texts()) and all(
                isinstance(value, kind)
                for value, kind in (
                    (held.labels, dict),
                    (held.gateway_quic, list),
                    (held.brokers, list),
                )
            )
        except FileNotFoundError as exc:
            raise ConfigError(
                f"not joined: on the gateway run edgesync token create, then here agent join (looked in {data.path})"
            ) from exc
        except (ValueError, TypeError) as exc:
            raise ConfigError(f"{data.join_file} is damaged: join again with a new token") from exc
        if not ok:
            raise ConfigError(f"{data.join_file} is damaged: join again with a new token")
        return held

    def _texts(self) -> tuple[str, ...]:
        return (
            self.id,
            self.gateway,
            self.gateway_key,
            self.region,
            self.state,
            self.hardware,
            self.token,
        )

    def save(self, data: DataDir) -> None:
        write_file(data.join_file, json.dumps(self.__dict__, indent=1).encode() + b"\n", mode=0o600)


def join(
    path: Path,
    token_text: str,
    *,
    device_id: str | None,
    hardware: str,
    gateway_quic: str | None,
    proxy: str | None = None,
) -> dict[str, Any]:
    """Make ``path`` the data directory of a member. Raises EdgeSyncError with one sentence for whatever is wrong.

    ``agent.toml`` keeps ``gateway_quic`` and ``proxy``, unless it was there before.
    """
    token = jointoken.decode(token_text)
    data = _directory(path)
    if data.join_file.exists():
        held = Membership.load(data)
        if held.state == "accepted":
            raise ConflictError(
                f"{path} has joined as {held.id} already: name another directory with --data"
            )
    proxies = _proxies(data, proxy)
    identity = load_or_make_identity(data)
    name = _device_id(device_id, identity)
    gateway = _parse(gateway_quic) if gateway_quic else None
    membership = asyncio.run(
        _ask(data, identity, token, token_text, name, hardware, gateway, proxies)
    )
    written = not data.config.exists()
    if written:
        given = {"gateway_quic": gateway_quic, "proxy": proxy}
        flags = {key: value for key, value in given.items() if value}
        data.config.parent.mkdir(parents=True, exist_ok=True)
        text = config.render(AgentSettings, "Settings of the EdgeSync agent", flags)
        write_file(data.config, text.encode(), mode=config.file_mode())
    return {**_told(membership), "settings_written": written}


def recover(
    data: DataDir, token_text: str, *, gateway_quic: str | None, proxy: str | None = None
) -> dict[str, Any]:
    """Start trust anew with the same key. Raises ConflictError: the stored trust is readable, nothing to recover."""
    from device.bundle_store import BundleStore
    from device.state import StateDatabase

    token = jointoken.decode(token_text)
    proxies = _proxies(data, proxy)
    with data.lock():
        with contextlib.suppress(StateCorruptError):
            TrustStore.open(data.path).close()
            raise ConflictError("trust.db can be read: there is nothing to recover")
        TrustStore.discard(data.path)
        held = Membership.load(data)
        identity = load_or_make_identity(data)
        gateway = _parse(gateway_quic) if gateway_quic else None
        membership = asyncio.run(
            _ask(data, identity, token, token_text, held.id, held.hardware, gateway, proxies)
        )
        state = StateDatabase.open(data.state_database)
        store = BundleStore.open(data.path, state)
        floors = 0
        try:
            trusted = TrustStore.open(data.path)
            for bundle in store.held_bundles():
                trusted.raise_counter(bundle.row.kind, bundle.name, bundle.row.release_counter)
                floors += 1
            trusted.close()
        finally:
            store.close()
            state.close()
    return {**_told(membership), "floors": floors}


async def ask_again(
    data: DataDir,
    identity: Identity,
    held: Membership,
    gateway: HostPort | None,
    proxies: ProxySettings,
) -> Membership:
    """While pending: the same question with the same key. Raises EdgeSyncError."""
    token = jointoken.decode(held.token)
    return await _ask(data, identity, token, held.token, held.id, held.hardware, gateway, proxies)


def load_or_make_identity(data: DataDir) -> Identity:
    """The machine's key and, when there is one, its certificate. Raises ConfigError: they cannot be read."""
    if not data.identity_key.exists():
        identity = Identity.generate()
        write_file(data.identity_key, identity.key_pem(), mode=0o600)
        return identity
    certificate = data.identity_certificate
    try:
        return Identity.from_pem(
            data.identity_key.read_bytes(),
            certificate.read_bytes() if certificate.exists() else None,
        )
    except StateCorruptError as exc:
        raise ConfigError(
            f"{data.identity_key} or its certificate is damaged: join again with a new data directory"
        ) from exc


def write_file(path: Path, data: bytes, *, mode: int) -> None:
    """Write or replace a file durably. Raises StorageError."""
    replace_file(path.parent, path.name, data, mode=mode)


def _directory(path: Path) -> DataDir:
    return DataDir.open(path, "agent") if DataDir.exists(path) else DataDir.create(path, "agent")


def _parse(text: str) -> HostPort:
    try:
        return parse_host_port(text, default_port=7443)
    except ValueError as exc:
        raise UsageError(f"--gateway-quic: {exc}") from exc


def _proxies(data: DataDir, flag: str | None) -> ProxySettings:
    """As the agent finds its proxy; ``agent.toml`` may be there before the machine has joined."""
    return config.load(AgentSettings, data.config, flags={"proxy": flag}).values.proxies()


def _device_id(given: str | None, identity: Identity) -> DeviceId:
    if given is not None:
        if not re.fullmatch(NAME_PATTERN, given):
            raise UsageError(f"--id {given!a} is not of the form [a-z0-9][a-z0-9-]{{0,62}}")
        return DeviceId(given)
    host = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")
    return DeviceId(f"{host[:58] or 'device'}-{identity.key[:4]}")


async def _ask(
    data: DataDir,
    identity: Identity,
    token: JoinToken,
    token_text: str,
    device_id: DeviceId,
    hardware: str,
    gateway: HostPort | None,
    proxies: ProxySettings,
) -> Membership:
    addresses = (
        [gateway]
        if gateway
        else [parse_host_port(text, default_port=7443) for text in token.addresses]
    )
    endpoint = await Endpoint.open(
        host="",
        port=0,
        identity=identity,
        judge=_nobody,
        handler=_Nobody(),
        config=EndpointConfig(proxy=proxies),
    )
    try:
        connection = await _connect(endpoint, addresses, token.gateway_key)
        try:
            reply = await connection.ask(
                Join(
                    token_id=token.token_id,
                    secret=token.secret,
                    public_key=identity.public_raw,
                    signature=identity.sign(
                        "join",
                        join_payload(
                            token_id=token.token_id,
                            device_id=device_id,
                            server_certificate_sha256=connection.server_certificate_sha256,
                        ),
                    ),
                    device_id=device_id,
                    hardware=hardware,
                    agent=__version__,
                )
            )
            if isinstance(reply, JoinRefused):
                told = reply.text if reply.reason in {"id_refused", "id_taken", "rejected"} else ""
                detail = f" ({told})" if told else ""
                raise NotAuthorizedError(_REFUSALS[reply.reason] + detail)
            await _fetch_trust(data, token, reply, connection)
        finally:
            await connection.close()
    finally:
        await endpoint.close()
    membership = Membership(
        id=DeviceId(reply.device_id),
        gateway=GatewayId(reply.gateway_id),
        gateway_key=token.gateway_key,
        region=reply.region,
        state=reply.state,
        hardware=reply.hardware or hardware,
        labels=dict(reply.labels),
        gateway_quic=[str(address) for address in addresses]
        if gateway
        else list(reply.gateway_quic),
        brokers=list(reply.brokers),
        token="" if reply.state == "accepted" else token_text,
    )
    if reply.certificate:
        whole = identity.with_certificate(reply.certificate)
        write_file(data.identity_certificate, whole.certificate_pem(), mode=0o644)
    membership.save(data)
    return membership


class _Nobody:
    """Handler of an endpoint that only asks."""

    async def connected(self, conn: PeerConnection) -> None:
        await conn.close(ErrorCode.UNEXPECTED, "this machine has not joined")

    async def disconnected(self, conn: PeerConnection, error: EdgeSyncError) -> None:
        pass

    async def message(self, conn: PeerConnection, message: ControlMessage) -> None:
        pass

    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        for piece in request.pieces:
            yield PieceAnswer(PieceId(piece), missing="refused")

    async def serve_fetch(self, conn: PeerConnection | None, name: str) -> bytes | None:
        return None

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused:
        return JoinRefused(reason="rejected", text="a device takes no joins")


def _nobody(_certificate: bytes) -> Any:
    raise NotAuthorizedError("this machine has not joined: it serves nobody")


async def _connect(endpoint: Endpoint, addresses: list[HostPort], key: PeerKey) -> JoinConnection:
    """Dial the gateway's addresses in turn. Raises PeerUnreachableError naming all, or what the last one said."""
    error: EdgeSyncError | None = None
    verdict = UdpVerdict()
    for address in addresses:
        attempt = Attempt()
        try:
            target = (address.host, address.port)
            return await reach(
                verdict,
                target,
                functools.partial(endpoint.join, target, expected_key=key, attempt=attempt),
                timeout_s=DIAL_TIMEOUT_S,
                heard=attempt.heard,
            )
        except NotAuthorizedError as exc:
            raise NotAuthorizedError(
                f"another gateway than the token's answers at {address}: was the token made on this gateway?"
            ) from exc
        except TransportError as exc:
            error = exc
    where = ", ".join(str(address) for address in addresses)
    raise PeerUnreachableError(
        f"the gateway cannot be reached at {where} (UDP, then TCP): {error or 'the token names no address'}"
    ) from error


async def _fetch_trust(
    data: DataDir, token: JoinToken, reply: Joined, connection: JoinConnection
) -> None:
    """All roots, checked against the token's pin, then the newest metadata as far as it can be had."""
    roots = {
        version: await connection.fetch(f"root/{version}", limits.MAX_ROOT_BYTES)
        for version in range(1, reply.root_version + 1)
    }
    state = trust.bootstrap(roots, (token.root_version, token.root_sha256))
    store = TrustStore.create(data.path, state)
    try:
        await Metadata(
            store,
            fetch=lambda name, max_bytes, _check: connection.fetch(name, max_bytes),
            executor=None,
        ).refresh()
    finally:
        store.close()


def _told(membership: Membership) -> dict[str, Any]:
    return {
        "id": membership.id,
        "state": membership.state,
        "gateway": membership.gateway,
        "region": membership.region,
    }
