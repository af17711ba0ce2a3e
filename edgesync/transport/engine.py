"""Which QUIC connection class this process uses, and what it should tell the operator about it.

The short cuts of ``edgesync.transport.fast`` lean on private names of aioquic. If they do not fit the installed one,
connections fall back to stock code in our bounds: slower, but right. The bounds themselves are checked by
``edgesync.transport.quic``, which refuses to be imported where they would not hold.
"""

from typing import Final

from aioquic.quic.connection import QuicConnection
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream

from edgesync import limits
from edgesync.transport.quic import BoundedQuicConnection, client_configuration
from edgesync.wire.messages import ALPN

_NAMES: Final = {
    "connection": (
        "_ack_delay",
        "_crypto_streams",
        "_cryptos",
        "_datagrams_pending",
        "_handshake_done_pending",
        "_idle_timeout",
        "_local_ack_delay_exponent",
        "_max_datagram_size",
        "_on_ack_delivery",
        "_packet_number",
        "_pacing_at",
        "_peer_cid",
        "_ping_pending",
        "_probe_pending",
        "_quic_logger",
        "_remote_max_data",
        "_remote_max_data_used",
        "_remote_preferred_address",
        "_retire_connection_ids",
        "_send_probe",
        "_spin_bit",
        "_streams_blocked_pending",
        "_streams_queue",
    ),
    "recovery": (
        "_cc",
        "_detect_loss",
        "_get_loss_space",
        "_in_persistent_congestion",
        "_on_packets_lost",
        "_pacer",
        "_pto_count",
        "_rtt_first_sample_time",
        "_rtt_initialized",
        "_rtt_latest",
        "_rtt_min",
        "_rtt_smoothed",
        "_rtt_variance",
        "_time_of_last_sent_ack_eliciting_packet",
    ),
    "sender": (
        "_buffer",
        "_buffer_fin",
        "_buffer_start",
        "_pending",
        "_pending_eof",
        "buffer_is_empty",
        "highest_offset",
    ),
    "receiver": ("_buffer_start", "_final_size", "highest_offset"),
    "window": ("_lower", "_received", "_size"),
    "keys": ("_update_key_requested", "key_phase", "recv", "send"),
    "space": (
        "ack_at",
        "ack_queue",
        "expected_packet_number",
        "sent_packets",
        "loss_time",
        "is_application_data",
    ),
}


def misfits() -> list[str]:
    """Names the short cuts use that the installed aioquic lacks."""
    connection = QuicConnection(
        configuration=client_configuration(alpn=ALPN, idle_timeout_s=limits.QUIC_IDLE_TIMEOUT_S)
    )
    stream, space = QuicStream(stream_id=0), QuicPacketSpace()
    pair = CryptoPair()
    pair.setup_initial(cid=bytes(8), is_client=True, version=1)
    parts: dict[str, object] = {
        "connection": connection,
        "recovery": connection._loss,  # noqa: SLF001
        "sender": stream.sender,
        "receiver": stream.receiver,
        "window": space.received_packets,
        "keys": pair,
        "space": space,
        "aead": pair.send.aead,
        "cipher": getattr(pair.send.aead, "_aead", None),
        "protection": pair.send.hp,
    }
    names = {
        **_NAMES,
        "aead": ("_aead", "_iv"),
        "cipher": ("encrypt", "decrypt"),
        "protection": ("_encryptor", "_is_chacha20", "apply"),
    }
    return [
        f"{part}.{name}"
        for part, wanted in names.items()
        for name in wanted
        if not hasattr(parts[part], name)
    ]


def _choose() -> tuple[type[BoundedQuicConnection], list[str]]:
    missing = misfits()
    if not missing:
        try:
            from edgesync.transport.fast.sending import FastQuicConnection
        except ImportError as exc:
            missing = [str(exc)]
        else:
            return FastQuicConnection, []
    sentence = (
        "the installed aioquic does not fit the fast path"
        f" (lacks {', '.join(missing[:3])}): transfers take about five times the processor time;"
        " install the version in requirements.lock"
    )
    return BoundedQuicConnection, [sentence]


Connection, _warnings = _choose()


def transport_warnings() -> list[str]:
    """What about this process's transport the operator should know; one sentence each."""
    return list(_warnings)
