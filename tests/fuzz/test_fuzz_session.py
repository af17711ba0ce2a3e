"""Random and mutated bytes against the codec, the session and the questions: nothing but our own errors comes out."""

import os
import random
import sys

import pytest

from edgesync.errors import EdgeSyncError
from edgesync.identity import Identity, certificate_id, certificate_key, self_signed
from edgesync.ids import Digest, PeerIdentity, PieceId
from edgesync.peer.session import (
    Abort,
    BlobQuestion,
    LocalPeer,
    PieceQuestion,
    Session,
    Side,
    opening_question,
)
from edgesync.wire import codec
from edgesync.wire.messages import Message
from tests.vectors.wire_messages import MESSAGES, B, C

RUNS = int(os.environ.get("EDGESYNC_FUZZ_RUNS", "20000"))
SEED = int(os.environ.get("EDGESYNC_FUZZ_SEED", "0")) or random.SystemRandom().randrange(2**32)
ME = self_signed(Identity.generate(), "me")
FRAMES = [codec.encode(message)[4:] for message in MESSAGES.values()]
INTERESTING = [
    0x00,
    0x7F,
    0x80,
    0x81,
    0x8F,
    0x90,
    0xC0,
    0xC1,
    0xC4,
    0xC6,
    0xCB,
    0xCF,
    0xD3,
    0xDB,
    0xDD,
    0xDF,
    0xFF,
]


def mutated(rng: random.Random) -> bytes:
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(1, 200))
    body = bytearray(rng.choice(FRAMES))
    for _ in range(rng.randrange(0, 4)):
        at = rng.randrange(len(body))
        match rng.randrange(6):
            case 0:
                body[at] ^= 1 << rng.randrange(8)
            case 1:
                body[at] = rng.choice(INTERESTING)
            case 2:
                del body[at : at + rng.randrange(1, 9)]
            case 3:
                body[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                other = rng.choice(FRAMES)
                cut = rng.randrange(len(other))
                body[at:] = other[cut:]
            case _:
                body[at:at] = bytes([rng.choice(INTERESTING)]) * rng.randrange(1, 60)
        if not body:
            body = bytearray(b"\x80")
    return bytes(body)


def session(side: Side) -> Session:
    who = PeerIdentity("device", "me", ME.key)
    return Session(
        side=side,
        me=LocalPeer(
            role="gateway",
            certificate=ME.certificate_der,
            signer=ME,
            judge=lambda der: PeerIdentity("device", certificate_id(der), certificate_key(der)),
        ),
        server_certificate=ME.certificate_der,
        server_peer=who if side is Side.CLIENT else None,
        nonce=bytes(32) if side is Side.SERVER else b"",
        started_at=0.0,
    )


def decoded(body: bytes) -> Message | None:
    try:
        return codec.decode(body)
    except EdgeSyncError:
        return None


@pytest.fixture(autouse=True)
def _say_the_seed() -> None:
    print(f"EDGESYNC_FUZZ_SEED={SEED} EDGESYNC_FUZZ_RUNS={RUNS}", file=sys.stderr)


def test_codec() -> None:
    rng = random.Random(SEED)
    understood = 0
    for _ in range(RUNS):
        message = decoded(mutated(rng))
        if message is not None:
            understood += 1
            again = codec.encode(message)
            assert codec.decode(again[4:]) == message
    assert understood > RUNS // 20, "the mutations are too wild to test anything behind the codec"


def test_frame_lengths() -> None:
    rng = random.Random(SEED)
    for _ in range(RUNS):
        prefix = rng.randbytes(4) if rng.random() < 0.5 else bytes(2) + rng.randbytes(2)
        try:
            assert 0 < codec.frame_length(prefix) <= 65_536
        except EdgeSyncError:
            continue


@pytest.mark.parametrize("side", list(Side))
def test_session(side: Side) -> None:
    rng = random.Random(SEED)
    good = list(MESSAGES.values())
    current = session(side)
    if side is Side.CLIENT:
        current.start()
    for _ in range(RUNS):
        message = rng.choice(good) if rng.random() < 0.3 else decoded(mutated(rng))
        if message is None:
            continue
        for effect in current.handle(message):
            if isinstance(effect, Abort):
                assert isinstance(effect.error, EdgeSyncError)
                current = session(side)
                if side is Side.CLIENT:
                    current.start()


def test_questions() -> None:
    rng = random.Random(SEED)
    for _ in range(RUNS // 4):
        pieces = PieceQuestion(
            Digest("aa" * 32), [PieceId(B), PieceId(C)], ["zstd"], max_piece_bytes=70_000
        )
        blob = BlobQuestion("root/2", max_bytes=2000)
        for _ in range(4):
            message = decoded(mutated(rng))
            if message is None:
                continue
            for ask in (pieces.answer, blob.answer, opening_question):
                try:
                    ask(message)
                except EdgeSyncError:
                    continue
