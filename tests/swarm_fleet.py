"""A gateway with a seeder and devices with swarms, over real endpoints on loopback, in one process."""

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from device.bundle_store import BundleStore, StagedBundle
from device.caps import DeviceCaps, own_caps
from device.state import StateDatabase
from device.swarm import Swarm
from edgesync import caps, piece_codec
from edgesync import identity as identities
from edgesync import manifest as manifests
from edgesync.identity import CertificateAuthority, Identity
from edgesync.ids import Digest, PeerIdentity, PeerKey, PieceId
from edgesync.manifest import Chunking, DirectoryEntry, FileEntry, Manifest
from edgesync.transport.endpoint import Endpoint, EndpointConfig
from edgesync.wire.messages import JoinRefused
from gateway.packs import StoredPiece
from gateway.register import Device, Register
from gateway.seeder import Seeder
from gateway.throttles import Throttles


@dataclass(frozen=True)
class Content:
    """A bundle and its pieces."""

    digest: Digest
    manifest_bytes: bytes
    manifest: Manifest
    pieces: dict[PieceId, StoredPiece]

    @property
    def wire_bytes(self) -> int:
        return sum(len(piece.data) for piece in self.pieces.values())


def make_content(
    *,
    size: int,
    piece: int = 65_536,
    seed: int = 1,
    access: str = "fleet",
    compressible: bool = False,
) -> Content:
    rng = random.Random(seed)
    ids: list[bytes] = []
    lengths: list[int] = []
    pieces: dict[PieceId, StoredPiece] = {}
    files: list[FileEntry] = []
    left, number = size, 0
    while left > 0:
        count = min(rng.randint(1, 8), -(-left // piece))
        first, whole = len(ids), hashlib.sha256()
        total = 0
        for _ in range(count):
            length = min(left, rng.randint(piece // 2, piece * 3 // 2))
            if not length:
                break
            data = (
                rng.randbytes(length // 4) * 4 + b"x" * (length % 4)
                if compressible
                else rng.randbytes(length)
            )
            whole.update(data)
            piece_id = PieceId(hashlib.sha256(data).digest())
            encoding, packed = piece_codec.encode(data)
            pieces[piece_id] = StoredPiece(encoding, packed, len(data))
            ids.append(piece_id)
            lengths.append(len(data))
            left -= length
            total += length
        used = len(ids) - first
        files.append(
            FileEntry(
                f"d/f{number:05}",
                0o644,
                total,
                ((first, used),),
                whole.digest() if used > 1 else None,
            )
        )
        number += 1
    manifest = Manifest(
        requires_features=[],
        kind="files",
        name="app",
        version=f"{seed}.0",
        release_counter=0,
        hardware=[],
        access=access,
        payload_bytes=size,
        chunking=Chunking("fastcdc", 16_384, 65_536, 262_144),
        piece_ids=b"".join(ids),
        piece_lengths=lengths,
        directories=[DirectoryEntry("d", 0o755)],
        files=files,
        symlinks=[],
    )
    data = manifests.encode(manifest)
    return Content(manifests.digest(data), data, manifest, pieces)


class FakePacks:
    def __init__(self) -> None:
        self.pieces: dict[PieceId, StoredPiece] = {}

    def read(self, piece: PieceId) -> StoredPiece | None:
        return self.pieces.get(piece)

    def sizes(self, ids: Iterable[PieceId]) -> dict[PieceId, int]:
        return {piece: len(self.pieces[piece].data) for piece in ids if piece in self.pieces}


class FakeTrusted:
    def __init__(self) -> None:
        self.listed: dict[Digest, bytes] = {}

    def by_digest(self, digest: Digest) -> bytes | None:
        return self.listed.get(digest)


class Agent:
    """One device: store, swarm, endpoint."""

    def __init__(self, name: str, identity: Identity, store: BundleStore) -> None:
        self.name = name
        self.identity = identity
        self.store = store
        self.swarm: Swarm
        self.endpoint: Endpoint

    def begin(self, content: Content) -> StagedBundle:
        return self.store.begin(content.manifest_bytes, content.manifest)

    async def fetch(self, content: Content) -> StagedBundle:
        staged = self.begin(content)
        await self.swarm.fetch_bundle(staged)
        return staged

    async def close(self) -> None:
        await self.swarm.close()
        await self.endpoint.close()
        self.store.close()


class SwarmFleet:
    """Context manager; everything it started is closed at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = CertificateAuthority.create("region")
        self.gateway_identity = Identity.generate("gw")
        self.packs = FakePacks()
        self.trusted = FakeTrusted()
        self.agents: list[Agent] = []
        self.devices: dict[PeerKey, Device] = {}
        self.assigned: dict[PeerKey, frozenset[Digest]] = {}
        self.seeder: Seeder | None = None
        self.endpoint: Endpoint | None = None
        self.gateway_port = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for agent in self.agents:
            await agent.close()
        await self.stop_gateway()

    def judge(self, der: bytes) -> PeerIdentity:
        key = identities.certificate_key(der)
        if key == self.gateway_identity.key:
            return PeerIdentity("gateway", "gw", key)
        identities.check_issued(der, self.authority.certificate_der)
        return PeerIdentity("device", identities.certificate_id(der), key)

    @property
    def register(self) -> Register:
        return Register(
            dict(self.devices), {one.id: one for one in self.devices.values()}, dict(self.assigned)
        )

    def publish(self, content: Content) -> None:
        self.packs.pieces.update(content.pieces)
        self.trusted.listed[content.digest] = content.manifest_bytes

    async def start_gateway(self, *, upload_limit: float = 0, seed: int = 1) -> None:
        async def manifest(digest: Digest) -> bytes | None:
            return self.trusted.listed.get(digest)

        async def fetch(_conn: object, name: str) -> bytes | None:
            return self.trusted.listed.get(Digest(name.removeprefix("sha256/")))

        async def join(*_: object) -> JoinRefused:
            return JoinRefused(reason="unknown_token")

        throttles = Throttles([caps.Cap("test", upload=caps.parse(int(upload_limit)))])
        throttles.update((), utc_now=time.time())
        self.seeder = Seeder(
            pieces=self.packs,  # type: ignore[arg-type]
            manifest=manifest,
            fetch=fetch,
            join=join,
            register=self.register,
            trusted=self.trusted,  # type: ignore[arg-type]
            throttles=throttles,
            rng=random.Random(seed),
        )
        self.endpoint = await Endpoint.open(
            host="127.0.0.1",
            port=self.gateway_port,
            identity=self.gateway_identity,
            judge=self.judge,
            handler=self.seeder,
            config=EndpointConfig(role="gateway", announce_port=False),
        )
        self.gateway_port = self.endpoint.port
        self.seeder.attach(self.endpoint)

    async def stop_gateway(self) -> None:
        if self.endpoint is not None and self.seeder is not None:
            await self.endpoint.close()
            await self.seeder.close()
            self.endpoint = self.seeder = None

    async def agent(
        self,
        name: str,
        *,
        identity: Identity | None = None,
        may_read: Callable[[PeerKey, str, Digest], bool] = lambda *_: True,
        seed: int = 0,
        **limits: float,
    ) -> Agent:
        if identity is None:
            made = Identity.generate(name)
            identity = made.with_certificate(self.authority.issue(made.public_raw, name))
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        state = StateDatabase.open(folder / "state.db")
        holder: list[Swarm] = []
        store = BundleStore.open(
            folder,
            state,
            on_lost=lambda *lost: holder[0].lost(*lost),  # noqa: PLW0108 - made below
            boot_id="b",
        )
        agent = Agent(name, identity, store)
        held = DeviceCaps(
            device_id=name,
            site="lan",
            own=own_caps(limits.get("upload_limit", 0), limits.get("download_limit", 0), "UTC"),
            state=None,
            in_storage=asyncio.to_thread,
            utc_now=time.time,
        )
        agent.swarm = Swarm(
            store=store,
            metadata=lambda _name: None,
            gateway_key=lambda: self.gateway_identity.key,
            gateway_addresses=lambda: (
                [f"127.0.0.1:{self.gateway_port}"] if self.gateway_port else []
            ),
            may_read=may_read,
            rng=random.Random(seed or len(self.agents) + 1),
            obey_caps=held.obey,
        )
        holder.append(agent.swarm)
        agent.endpoint = await Endpoint.open(
            host="127.0.0.1",
            port=0,
            identity=identity,
            judge=self.judge,
            handler=agent.swarm,
            config=EndpointConfig(),
        )
        agent.swarm.attach(agent.endpoint)
        self.devices[identity.key] = Device(
            id=name,  # type: ignore[arg-type]
            key=identity.key,
            state="accepted",
            site="lan",
            labels={},
            address="127.0.0.1",
            local_addresses=(f"127.0.0.1:{agent.endpoint.port}",),
            online=True,
        )
        if self.seeder is not None:
            await self.seeder.updated(self.register, self.trusted)  # type: ignore[arg-type]
        self.agents.append(agent)
        return agent


async def until(condition: Callable[[], bool], *, within_s: float = 20.0) -> None:
    """Return once the condition holds. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - many things, none with an event of its own
            await asyncio.sleep(0.01)
