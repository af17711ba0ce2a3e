"""The fast engine and other QUIC stacks on real sockets, both ways: stock aioquic, and qh3 where it is installed."""

import asyncio
import contextlib
import datetime as dt
import hashlib
import importlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgesync import limits
from edgesync.errors import ErrorCode, TransportError
from edgesync.identity import Identity, self_signed
from edgesync.transport.fast.sending import FastQuicConnection
from edgesync.transport.flow import Budget
from edgesync.transport.link import Link, Stream
from edgesync.transport.quic import client_configuration, server_configuration
from edgesync.transport.switchboard import Switchboard
from edgesync.wire.messages import ALPN

SIZE = 256 * 12_000
BODY = bytes(range(256)) * (SIZE // 256)
DIGEST = hashlib.sha256(BODY).digest()
IDENTITY = self_signed(Identity.generate(), "server")


@pytest.fixture(params=["aioquic", "qh3"])
def library(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed here: pip install {name}")
    return name


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    assert IDENTITY.certificate is not None
    pem = serialization.Encoding.PEM
    (tmp_path / "cert.pem").write_bytes(IDENTITY.certificate.public_bytes(pem))
    (tmp_path / "key.pem").write_bytes(
        IDENTITY.private_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return tmp_path


class Owner:
    """Answers a stream with BODY, keeps its tasks."""

    def __init__(self) -> None:
        self.ready = asyncio.get_running_loop().create_future()
        self.tasks: set[asyncio.Task[None]] = set()

    def handshake_done(self, link: Link, alpn: str) -> None:
        del alpn
        self.ready.set_result(link)

    def stream_opened(self, link: Link, stream: Stream) -> None:
        del link
        self.tasks.add(asyncio.ensure_future(self._answer(stream)))

    async def _answer(self, stream: Stream) -> None:
        assert await stream.read_exactly(3) == b"get"
        await stream.expect_end()
        for at in range(0, SIZE, 100_000):
            stream.write(BODY[at : at + 100_000])
            await stream.drain()
        stream.write(b"", end=True)
        with contextlib.suppress(TransportError):  # the other side may leave once it has all
            await stream.drain(low_water=0)

    def link_closed(self, link: Link, error: Exception) -> None: ...


class Doorman:
    def __init__(self) -> None:
        self.owner = Owner()
        self.board: Switchboard

    def new_owner(self) -> Owner:
        return self.owner

    def accepted(self, link: Link) -> None:
        self.board.proven(link)


def _plain_certificate() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """qh3's client does not accept Ed25519."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
    builder = builder.not_valid_after(dt.datetime(9999, 1, 1, tzinfo=dt.UTC))
    return builder.sign(key, hashes.SHA256()), key


@pytest.fixture
async def doorman() -> AsyncIterator[Doorman]:
    doorman = Doorman()
    assert IDENTITY.certificate is not None
    configured = server_configuration(
        certificate=IDENTITY.certificate,
        private_key=IDENTITY.private_key,
        idle_timeout_s=30,
        joins=False,
    )
    configured.certificate, configured.private_key = _plain_certificate()
    doorman.board = Switchboard(
        "127.0.0.1",
        0,
        server=configured,
        doorman=doorman,
        budget=Budget(),
    )
    yield doorman
    await asyncio.gather(*doorman.owner.tasks)
    doorman.board.close()


def configuration(library: str, *, client: bool) -> Any:
    made = importlib.import_module(f"{library}.quic.configuration").QuicConfiguration(
        is_client=client, alpn_protocols=[ALPN], max_data=1 << 20, max_stream_data=1 << 19
    )
    made.max_datagram_size = 1452
    if client:
        made.verify_mode = ssl.CERT_NONE
        made.server_name = "localhost"
    return made


async def test_it_serves_another_client(library: str, doorman: Doorman) -> None:
    connect = importlib.import_module(f"{library}.asyncio").connect
    port = doorman.board.socket.address[1]
    async with (
        asyncio.timeout(60),
        connect("127.0.0.1", port, configuration=configuration(library, client=True)) as client,
    ):
        reader, writer = await client.create_stream()
        writer.write(b"get")
        writer.write_eof()
        assert hashlib.sha256(await reader.read()).digest() == DIGEST
        link = doorman.owner.ready.result()
        assert isinstance(link.quic, FastQuicConnection)
        assert link.quic.sent_fast >= SIZE // limits.MAX_DATAGRAM_BYTES
    assert not doorman.owner.ready.cancelled()


async def test_it_reads_from_another_server(
    library: str, doorman: Doorman, certificate: Path
) -> None:
    made = configuration(library, client=False)
    made.load_cert_chain(str(certificate / "cert.pem"), str(certificate / "key.pem"))
    tasks: set[asyncio.Future[None]] = set()

    def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def work() -> None:
            assert await reader.read() == b"get"
            writer.write(BODY)
            writer.write_eof()

        tasks.add(asyncio.ensure_future(work()))

    server = await importlib.import_module(f"{library}.asyncio").serve(
        "127.0.0.1", 0, configuration=made, stream_handler=answer
    )
    port = server._transport.get_extra_info("sockname")[1]
    owner = Owner()
    link = doorman.board.dial(
        client_configuration(alpn=ALPN, idle_timeout_s=30), ("127.0.0.1", port), owner
    )
    async with asyncio.timeout(60):
        await owner.ready
        stream = link.open_stream()
        await stream.grant(500_000)
        stream.follow_path()
        stream.write(b"get", end=True)
        body = b"".join([await stream.read_exactly(100_000) for _ in range(SIZE // 100_000)])
        rest = await stream.read_exactly(SIZE % 100_000)
        await stream.expect_end()
    assert hashlib.sha256(body + rest).digest() == DIGEST
    assert isinstance(link.quic, FastQuicConnection)
    assert link.quic.received_fast > SIZE // 1452 // 2
    link.forget(stream)
    link.close(ErrorCode.OK)
    server.close()
    await asyncio.gather(*tasks)
