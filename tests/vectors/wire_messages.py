"""The messages the ``.hex`` files of this folder hold, by file name."""

from edgesync.wire import messages as m

A, B, C = b"\xaa" * 32, b"\xbb" * 32, b"\xcc" * 32

MESSAGES: dict[str, m.Message] = {
    "hello": m.Hello(protocols=[1], agent="edgesync 0.1.0"),
    "challenge": m.Challenge(protocol=1, nonce=A, agent="edgesync 0.1.0"),
    "proof": m.Proof(certificate=b"\x30\x03\x02\x01\x00", signature=b"\x5a" * 64, listen_port=7443),
    "welcome": m.Welcome(root_version=1, timestamp_version=42, observed_address="192.0.2.7:7443"),
    "proof_background": m.Proof(
        certificate=b"\x30\x03\x02\x01\x00",
        signature=b"\x5a" * 64,
        listen_port=0,
        background=True,
    ),
    "welcome_background": m.Welcome(background=True),
    "interested": m.Interested(manifest=A),
    "bitfield": m.BitfieldMessage(manifest=A, bits=b"\xf0\x80", epoch=7, durable=True),
    "have": m.Have(manifest=A, pieces=[0, 127, 128, 99_999], durable=True, fetched_from=[B]),
    "lost": m.Lost(manifest=A, pieces=[3]),
    "lease_request": m.LeaseRequest(manifest=A, count=2, unavailable=[9]),
    "lease": m.Lease(
        manifest=A,
        grants=[m.Grant(4, 0, -1), m.Grant(5, -1, 0)],
        sources=[m.PeerAddress(key=B, id="pi-kitchen-1f2e", addresses=["192.0.2.9:40123"])],
        deadline_ms=4000,
        retry_after_ms=0,
    ),
    "lease_reason": m.Lease(
        manifest=A, grants=[], retry_after_ms=30_000, reason="the budget is spent"
    ),
    "versions": m.Versions(root_version=2, timestamp_version=300),
    "busy": m.Busy(retry_after_ms=5000),
    "close": m.Close(code=6, reason="no longer a member"),
    "request": m.Request(manifest=A, pieces=[B, C], encodings=["identity", "zstd"]),
    "piece_header": m.PieceHeader(piece=B, encoding="zstd", length=65_536),
    "missing": m.Missing(piece=C, reason="gone"),
    "fetch": m.Fetch(name="root/2"),
    "blob": m.Blob(length=1234),
    "missing_blob": m.MissingBlob(name="root/2"),
    "join": m.Join(
        token_id="k3v9x2ab",
        secret=b"\x11" * 16,
        public_key=B,
        signature=b"\x5a" * 64,
        device_id="pi-kitchen-1f2e",
        hardware="rpi4",
        agent="edgesync 0.1.0",
    ),
    "joined": m.Joined(
        state="accepted",
        device_id="pi-kitchen-1f2e",
        certificate=b"\x30\x03\x02\x01\x00",
        gateway_id="hub",
        region="eu",
        labels={"site": "kitchen"},
        hardware="rpi4",
        gateway_quic=["hub.example:7443"],
        brokers=["mqtts://hub.example:8883"],
        root_version=1,
    ),
    "join_refused": m.JoinRefused(reason="expired", text="the token ended an hour ago"),
}
