"""A member that joined like any other and then lies: for the demo's last act and for tests.

It runs on a data directory made by `edgesync agent join`, fetches one manifest from the gateway, claims to hold every
piece of it, durable, to the gateway and to every peer that asks, and answers requests badly in one of MODES. It says
``ready`` on stdout once the gateway took its claim. Never part of a deployment.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from edgesync import limits, manifest
from edgesync.bitfield import Bitfield
from edgesync.config import parse_host_port
from edgesync.errors import EdgeSyncError, NotAuthorizedError
from edgesync.identity import Identity, certificate_id, certificate_key
from edgesync.ids import Digest, PeerIdentity, PieceId
from edgesync.transport.connection import PeerConnection, PieceAnswer
from edgesync.transport.endpoint import Endpoint, EndpointConfig
from edgesync.wire.messages import (
    BitfieldMessage,
    ControlMessage,
    Interested,
    Join,
    Joined,
    JoinRefused,
    Request,
)

MODES = ("tamper", "garbage", "not_held", "stall")
"""Random bytes of the right length; a broken zstd frame; claim, then deny; never answer."""
RETRY_S = 0.5


class HostileMember:
    """Handler of its own endpoint."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.digest = Digest("")
        self.lengths: dict[bytes, int] = {}
        self.endpoint: Endpoint | None = None

    def claim(self) -> BitfieldMessage:
        full = Bitfield.full(len(self.lengths))
        return BitfieldMessage(
            manifest=bytes.fromhex(self.digest), bits=full.to_bytes(), durable=True
        )

    async def connected(self, conn: PeerConnection) -> None:
        if self.lengths:
            await conn.send(self.claim())

    async def disconnected(self, conn: PeerConnection, error: EdgeSyncError) -> None:
        pass

    async def message(self, conn: PeerConnection, message: ControlMessage) -> None:
        if isinstance(message, Interested) and message.manifest.hex() == self.digest:
            await conn.send(self.claim())

    async def serve(self, conn: PeerConnection, request: Request) -> AsyncIterator[PieceAnswer]:
        del conn
        for piece in request.pieces:
            length = self.lengths.get(piece, 1)
            if self.mode == "stall":
                await asyncio.sleep(3600)
            elif self.mode == "not_held":
                yield PieceAnswer(PieceId(piece), missing="not_held")
            elif self.mode == "garbage":
                yield PieceAnswer(PieceId(piece), "zstd", os.urandom(min(length, 1000)))
            else:
                yield PieceAnswer(PieceId(piece), "identity", os.urandom(length))

    async def serve_fetch(self, conn: PeerConnection | None, name: str) -> bytes | None:
        del conn, name
        return None

    async def serve_join(
        self, address: tuple[str, int], join: Join, server_certificate_sha256: bytes
    ) -> Joined | JoinRefused:
        raise NotAuthorizedError("this is no gateway")


def _judge(certificate: bytes) -> PeerIdentity:
    """It trusts whoever speaks to it."""
    return PeerIdentity("device", certificate_id(certificate), certificate_key(certificate))


async def run(data: Path, digest: Digest, mode: str, interface: str) -> None:
    identity = Identity.from_pem(
        (data / "identity.key").read_bytes(), (data / "identity.crt").read_bytes()
    )
    told = json.loads((data / "join.json").read_bytes())
    member = HostileMember(mode)
    member.digest = digest
    endpoint = await Endpoint.open(
        host=interface if interface[:1].isdigit() else "",
        port=0,
        identity=identity,
        judge=_judge,
        handler=member,
        config=EndpointConfig(agent="intruder"),
    )
    try:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(
                _announced(told["id"], identity.key, endpoint.port, interface)
            )
            gateway = parse_host_port(told["gateway_quic"][0])
            ready = False
            while True:
                connection = await endpoint.connect(
                    (gateway.host, gateway.port), expected_key=told["gateway_key"]
                )
                connection.keep_alive = True
                if not member.lengths:
                    data_bytes = await connection.fetch(
                        f"sha256/{digest}", limits.MAX_MANIFEST_BYTES
                    )
                    parsed = manifest.parse(data_bytes)
                    member.lengths = {
                        bytes(parsed.piece_id(index)): parsed.piece_lengths[index]
                        for index in range(parsed.piece_count)
                    }
                await connection.send(member.claim())
                if not ready:
                    ready = True
                    sys.stdout.write("ready\n")
                    sys.stdout.flush()
                await connection.closed.wait()
                await asyncio.sleep(RETRY_S)
    finally:
        await endpoint.close()


@contextlib.asynccontextmanager
async def _announced(name: str, key: str, port: int, interface: str) -> AsyncIterator[None]:
    """Announce by mDNS as an honest agent does."""
    from zeroconf import InterfaceChoice
    from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

    zeroconf = AsyncZeroconf(interfaces=[interface] if interface else InterfaceChoice.All)
    address = interface if interface[:1].isdigit() else socket.gethostbyname(socket.gethostname())
    info = AsyncServiceInfo(
        "_edgesync._udp.local.",
        f"{name}._edgesync._udp.local.",
        addresses=[socket.inet_aton(address)],
        port=port,
        properties={"v": "1", "id": name, "fp": key[:16]},
        server=f"{name}.local.",
    )
    try:
        await zeroconf.async_register_service(info)
        yield
    finally:
        await zeroconf.async_close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bundle", required=True, help="digest of the manifest to lie about")
    parser.add_argument("--mode", choices=MODES, default="tamper")
    parser.add_argument("--interface", default="")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run(options.data, Digest(options.bundle), options.mode, options.interface))


if __name__ == "__main__":
    main()
