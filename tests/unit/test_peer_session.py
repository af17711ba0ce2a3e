"""Who may say what, and when: both ends of a session joined in memory."""

import hashlib

import pytest

from edgesync.errors import (
    BadSignatureError,
    EdgeSyncError,
    ErrorCode,
    LimitExceededError,
    NotAuthorizedError,
    NotFoundError,
    PeerBusyError,
    PeerTimeoutError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from edgesync.identity import Identity, certificate_id, certificate_key, self_signed
from edgesync.ids import Digest, PeerIdentity, PieceId
from edgesync.peer.session import (
    Abort,
    BlobQuestion,
    Deliver,
    Established,
    LocalPeer,
    PieceQuestion,
    Send,
    Session,
    Side,
    State,
    code_of,
    error_from_code,
    opening_question,
    printable,
)
from edgesync.wire.messages import (
    Blob,
    Busy,
    Challenge,
    Close,
    Fetch,
    Have,
    Hello,
    Interested,
    Lease,
    LeaseRequest,
    Message,
    Missing,
    MissingBlob,
    PieceHeader,
    Proof,
    Request,
    Versions,
    Welcome,
)

MANIFEST = Digest("ab" * 32)
CLIENT = self_signed(Identity.generate(), "client")
SERVER = self_signed(Identity.generate(), "server")
GATEWAYS = {SERVER.key}


def judge(der: bytes) -> PeerIdentity:
    key = certificate_key(der)
    if key not in {CLIENT.key, SERVER.key}:
        raise NotAuthorizedError("not a member")
    return PeerIdentity("gateway" if key in GATEWAYS else "device", certificate_id(der), key)


def pair(*, busy_ms: int = 0, client: Identity = CLIENT) -> tuple[Session, Session]:
    left = Session(
        side=Side.CLIENT,
        me=LocalPeer(
            role="device",
            certificate=client.certificate_der,
            signer=client,
            judge=judge,
            listen_port=7443,
        ),
        server_certificate=SERVER.certificate_der,
        server_peer=judge(SERVER.certificate_der),
        started_at=0.0,
    )
    right = Session(
        side=Side.SERVER,
        me=LocalPeer(
            role="gateway",
            certificate=SERVER.certificate_der,
            signer=SERVER,
            judge=judge,
            root_version=3,
            timestamp_version=9,
        ),
        server_certificate=SERVER.certificate_der,
        nonce=bytes(range(32)),
        started_at=0.0,
        busy_ms=busy_ms,
        observed_address="198.51.100.7:4711",
    )
    return left, right


def messages_of(effects: list[object]) -> list[Message]:
    return [e.message for e in effects if isinstance(e, Send)]


def converse(left: Session, right: Session) -> tuple[list[object], list[object]]:
    """Run both to the end of the handshake; every effect of each."""
    seen: tuple[list[object], list[object]] = ([], [])
    queue = [(0, effect) for effect in left.start()]
    while queue:
        who, effect = queue.pop(0)
        seen[who].append(effect)
        if isinstance(effect, Send):
            other = right if who == 0 else left
            queue += [(1 - who, e) for e in other.handle(effect.message)]
    return seen


def opened() -> tuple[Session, Session]:
    left, right = pair()
    converse(left, right)
    assert left.state is right.state is State.OPEN
    return left, right


def aborted(effects: list[object]) -> EdgeSyncError:
    last = effects[-1]
    assert isinstance(last, Abort)
    return last.error


def test_the_handshake_tells_each_side_who_the_other_is() -> None:
    left, right = pair()
    mine, theirs = converse(left, right)
    told = next(e for e in mine if isinstance(e, Established))
    assert told.peer.key == SERVER.key
    assert (told.root_version, told.timestamp_version) == (3, 9)
    assert told.observed_address == "198.51.100.7:4711"
    told = next(e for e in theirs if isinstance(e, Established))
    assert told.peer.key == CLIENT.key
    assert told.listen_port == 7443
    assert told.certificate == CLIENT.certificate_der


def test_a_proof_of_another_key_is_refused() -> None:
    left, right = pair()
    challenge = messages_of(right.handle(messages_of(left.start())[0]))[0]
    proof = messages_of(left.handle(challenge))[0]
    assert isinstance(proof, Proof)
    forged = Proof(certificate=SERVER.certificate_der, signature=proof.signature)
    assert isinstance(aborted(right.handle(forged)), BadSignatureError)
    assert right.state is State.CLOSED
    assert right.handle(proof) == []


def test_a_proof_for_another_challenge_or_server_is_refused() -> None:
    left, right = pair()
    right.handle(messages_of(left.start())[0])
    proof = messages_of(left.handle(Challenge(protocol=1, nonce=bytes(32))))[0]
    assert isinstance(aborted(right.handle(proof)), BadSignatureError)


def test_a_stranger_with_a_good_signature_is_no_member() -> None:
    left, right = pair(client=self_signed(Identity.generate(), "stranger"))
    _, theirs = converse(left, right)
    end = theirs[-1]
    assert isinstance(end, Abort)
    assert end.code is ErrorCode.NOT_A_MEMBER
    assert not [e for e in theirs if isinstance(e, Established)]


@pytest.mark.parametrize(
    "message",
    [
        Proof(certificate=b"x", signature=bytes(64)),
        Welcome(),
        Interested(manifest=bytes(32)),
        Have(manifest=bytes(32), pieces=[]),
        Busy(retry_after_ms=1),
        Request(manifest=bytes(32), pieces=[bytes(32)], encodings=["zstd"]),
        Challenge(protocol=1, nonce=bytes(32)),
    ],
)
def test_nothing_but_hello_is_heard_first(message: Message) -> None:
    _, right = pair()
    assert isinstance(aborted(right.handle(message)), UnexpectedMessageError)


def test_unknown_protocols_are_refused() -> None:
    _, right = pair()
    assert isinstance(aborted(right.handle(Hello(protocols=[7, 8]))), VersionMismatchError)


def test_a_full_server_says_when_to_come_back() -> None:
    left, right = pair(busy_ms=5000)
    mine, theirs = converse(left, right)
    error = aborted(mine)
    assert isinstance(error, PeerBusyError)
    assert error.retry_after_s == 5.0
    assert isinstance(theirs[-1], Abort)
    assert theirs[-1].code is ErrorCode.BUSY


def test_a_handshake_has_five_seconds() -> None:
    _, right = pair()
    assert right.next_deadline() == 5.0
    assert right.tick(now=4.9) == []
    assert isinstance(aborted(right.tick(now=5.0)), PeerTimeoutError)
    _, right = opened()
    assert right.next_deadline() is None
    assert right.tick(now=100.0) == []


def test_leases_come_from_gateways_only() -> None:
    left, right = opened()
    lease = Lease(manifest=bytes(32), grants=[])
    assert left.handle(lease) == [Deliver(lease)]
    assert isinstance(aborted(right.handle(lease)), UnexpectedMessageError)
    left, right = opened()
    asked = LeaseRequest(manifest=bytes(32), count=1)
    assert right.handle(asked) == [Deliver(asked)]
    assert isinstance(aborted(left.handle(asked)), UnexpectedMessageError)


def test_an_open_session_delivers_and_closes() -> None:
    left, right = opened()
    news = Versions(root_version=1, timestamp_version=2)
    assert right.may_send(news)
    assert not right.may_send(Welcome())
    assert left.handle(news) == [Deliver(news)]
    assert isinstance(aborted(left.handle(Close(code=6, reason="gone"))), NotAuthorizedError)
    assert not left.may_send(news)


def test_a_second_hello_ends_an_open_session() -> None:
    _, right = opened()
    assert isinstance(aborted(right.handle(Hello(protocols=[1]))), UnexpectedMessageError)


def test_questions_take_each_answer_once() -> None:
    ids = [PieceId(hashlib.sha256(bytes([n])).digest()) for n in range(3)]
    question = PieceQuestion(MANIFEST, ids, ["zstd"], max_piece_bytes=100)
    header = PieceHeader(piece=ids[1], encoding="zstd", length=100)
    assert question.answer(header) == header
    with pytest.raises(LimitExceededError):
        question.answer(header)
    with pytest.raises(LimitExceededError):
        question.answer(PieceHeader(piece=bytes(32), encoding="zstd", length=1))
    with pytest.raises(LimitExceededError):
        question.answer(PieceHeader(piece=ids[0], encoding="zstd", length=101))
    with pytest.raises(UnexpectedMessageError):
        question.answer(PieceHeader(piece=ids[0], encoding="identity", length=1))
    with pytest.raises(UnexpectedMessageError):
        question.answer(Blob(length=1))
    question.answer(Missing(piece=ids[0], reason="busy"))
    question.answer(Missing(piece=ids[2], reason="gone"))
    assert question.waiting == 0


def test_our_own_bad_questions_are_our_mistake() -> None:
    with pytest.raises(ValueError):
        PieceQuestion(MANIFEST, [], ["zstd"], max_piece_bytes=1)
    with pytest.raises(ValueError):
        PieceQuestion(MANIFEST, [PieceId(bytes(32))] * 2, ["zstd"], max_piece_bytes=1)


def test_blobs() -> None:
    question = BlobQuestion("timestamp", max_bytes=10)
    assert question.answer(Blob(length=10)) == 10
    with pytest.raises(LimitExceededError):
        question.answer(Blob(length=11))
    with pytest.raises(NotFoundError):
        question.answer(MissingBlob(name="timestamp"))
    with pytest.raises(UnexpectedMessageError):
        question.answer(Welcome())


def test_what_opens_a_stream() -> None:
    assert opening_question(Fetch(name="timestamp")) == Fetch(name="timestamp")
    good = Request(manifest=bytes(32), pieces=[bytes(32)], encodings=["zstd"])
    assert opening_question(good) is good
    for bad in (
        None,
        Welcome(),
        Request(manifest=bytes(32), pieces=[bytes(32)] * 2, encodings=["zstd"]),
    ):
        with pytest.raises(UnexpectedMessageError):
            opening_question(bad)


@pytest.mark.parametrize("code", list(range(16)) + [99, 2**40])
def test_every_code_means_an_error_of_ours(code: int) -> None:
    error = error_from_code(code, "because\x1b[31m")
    assert isinstance(error, EdgeSyncError)
    assert "\x1b" not in str(error)
    assert isinstance(code_of(error), ErrorCode)


def test_remote_words_are_printable() -> None:
    assert printable("a\x00\nb" + "x" * 300) == "a??b" + "x" * 196
