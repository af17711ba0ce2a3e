"""The ALPN names of real ClientHellos, in any cut, and hostile ones."""

import contextlib
import random
import ssl
import time

import pytest

from edgesync.errors import LimitExceededError, MalformedMessageError, ProtocolError
from edgesync.transport.client_hello import offered_protocols


def hello(*protocols: str) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="gateway.example").do_handshake()
    return outgoing.read()


def test_what_openssl_offers_is_read_in_any_cut() -> None:
    data = hello("edgesync/1", "mqtt")
    assert offered_protocols(data) == [b"edgesync/1", b"mqtt"]
    assert all(offered_protocols(data[:size]) is None for size in range(len(data)))
    assert offered_protocols(hello()) == []


def test_what_is_no_client_hello() -> None:
    with pytest.raises(MalformedMessageError):
        offered_protocols(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(LimitExceededError):
        offered_protocols(bytes.fromhex("16030140ff"))


def test_noise_gives_names_or_an_error_of_ours() -> None:
    seed = time.time_ns()
    print(f"seed {seed}")
    rng = random.Random(seed)
    good = hello("edgesync/1")
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(ProtocolError):
            offered_protocols(bytes(data))
