"""Every bound on what a peer, a broker, a file or an operator can make this program hold, with the reason.

Sizes are bytes, times are seconds. A bound is applied before the thing it bounds is allocated, parsed or verified.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- content -------------------------------------------------------------------------------------------------------
MAX_PIECES: Final = 100_000
"""Pieces in a manifest: bounds bitfields to 12.5 KB and piece tables to a few MB on a small device."""
MAX_FILES: Final = 100_000
"""Files, folders and symlinks together: bounds what a device walks, opens and remembers."""
MAX_MANIFEST_BYTES: Final = 16 * MIB
MAX_PIECE_BYTES: Final = 64 * MIB
"""Largest plain piece: what a receiver must be willing to hold while it hashes."""
MAX_OCCURRENCES: Final = 1_000_000
"""Places the pieces of one manifest stand at in its files: a device indexes each of them (12 bytes)."""
MIN_PIECE_AVERAGE_BYTES: Final = 64 * KIB
MAX_PATH_BYTES: Final = 4096
MAX_COMPONENT_BYTES: Final = 255
MAX_SYMLINK_BYTES: Final = 4096
MAX_SYMLINK_STEPS: Final = 2_000_000
"""Path components walked to see where a bundle's symlinks lead: links through links cost more than they weigh."""
MAX_IGNORE_FILE_BYTES: Final = 1 * MIB
"""An ``.edgesyncignore``: each of its lines is tried on each path."""
MAX_ZSTD_WINDOW_LOG: Final = 21
"""A frame that wants a larger window is refused: the decoder would allocate it."""

# --- trust metadata ------------------------------------------------------------------------------------------------
MAX_ROOT_BYTES: Final = 64 * KIB
MAX_TIMESTAMP_BYTES: Final = 16 * KIB
MAX_SNAPSHOT_BYTES: Final = 256 * KIB
MAX_TARGETS_BYTES: Final = 5 * MIB
"""python-tuf parses before it verifies; a file above its cap is never parsed."""
MAX_ROOT_ROTATIONS: Final = 256
MAX_DELEGATED_ROLES: Final = 64
MAX_ASSIGNMENT_SET_BYTES: Final = 64 * KIB
MAX_ASSIGNMENT_ENTRIES: Final = 64
MAX_ENVELOPE_BYTES: Final = 128 * KIB
MAX_CERTIFICATE_BYTES: Final = 2 * KIB
MAX_REGIONS_BYTES: Final = 256 * KIB
MAX_REGIONS: Final = 256
MAX_GATEWAYS_PER_REGION: Final = 16
MAX_BUNDLE_HARDWARE: Final = 64
MAX_CLOCK_AHEAD_S: Final = 400 * 86_400
"""A system clock further ahead of the signed floor than this is not believed."""

# --- QUIC ----------------------------------------------------------------------------------------------------------
MAX_FRAME_BYTES: Final = 64 * KIB
"""Largest length-prefixed message; piece bodies follow outside it."""
UNPROVEN_WINDOW_BYTES: Final = 16 * KIB
"""All a stranger may send before it has proved which member it is."""
UNPROVEN_TIMEOUT_S: Final = 5.0
"""A stranger that holds a place and proves nothing; one at the end of a long path gets more while few are here."""
MAX_HANDSHAKE_S: Final = 30.0
"""Longest handshake, whatever round-trip time the other side makes the path look like and however often it speaks."""
MAX_SILENCE_S: Final = 60.0
"""Longest silence on a path, however long its round trips: a peer that delays its ACKs is held no longer."""
MAX_DATAGRAM_BYTES: Final = 8952
"""Longest UDP payload tried on a path (jumbo frames): a batch of longer ones would need buffers for nothing."""
MAX_PATH_WINDOW_BYTES: Final = 16 * MIB
"""Most bytes in flight on a path: a peer that acknowledges what it has not received raises the window no further."""
MAX_PATH_RATE_BYTES_S: Final = 1_250_000_000.0
"""Highest rate a path is believed to carry (10 Gbit/s), however early or bunched its ACKs come."""
MAX_REORDERED_PACKETS: Final = 256
"""Most packets one may be late by before it counts as lost, and how far back losses are remembered: a peer that
acknowledges late on purpose delays loss detection, and fills memory, no further."""
MAX_UNPROVEN_CONNECTIONS: Final = 32
MAX_UNPROVEN_PER_ADDRESS: Final = 4
RETRY_FROM_UNPROVEN: Final = 8
"""From this many unproven connections on, a client must show it receives at its address (QUIC Retry)."""
MAX_PIECES_PER_REQUEST: Final = 256
MAX_REQUESTS_PER_CONNECTION: Final = 8
"""Streams one peer may have open towards us at a time."""
MAX_CONNECTIONS: Final = 256
"""Proven connections of a device."""
MAX_GATEWAY_CONNECTIONS: Final = 1000
REASSEMBLY_BUDGET_BYTES: Final = 64 * MIB
"""Received, not yet consumed bytes over all connections together."""
MAX_CONTROL_FRAME_BYTES: Final = 32 * KIB
"""A frame on a control stream, and one that answers a question: the largest honest ones (HAVE, LEASE) need 21 KiB."""
MAX_QUESTION_FRAME_BYTES: Final = 16 * KIB
"""The frame that opens a request stream: 256 piece ids need 9 KiB."""
MEMBER_WINDOW_BYTES: Final = 48 * KIB
"""Unread bytes a proven peer may have towards us beyond the answers we asked it for."""
MEMBER_STREAM_WINDOW_BYTES: Final = 16 * KIB
UNASKED_ANSWER_BYTES: Final = 1 * KIB
"""What may come on a stream of ours before its own window is told: little, so that a capped receiver holds its cap."""
DEFAULT_MAX_PIECE_BYTES: Final = 4 * MIB
"""A request whose manifest is not known yet accepts pieces up to this; its window is two of them."""
MAX_CRYPTO_BYTES: Final = 16 * KIB
"""TLS bytes a peer may send in one packet space, counted from the first: a far offset costs nothing."""
MAX_CONNECTIONS_PER_KEY: Final = 4
"""More of one member close its oldest: a device that was killed comes back before its last session timed out."""
QUIC_IDLE_TIMEOUT_S: Final = 30.0
STALL_TIMEOUT_S: Final = 15.0
"""A stream on which nothing moves for so long is given up; anything that moves starts it again."""
MAX_TURN_S: Final = 300.0
"""A stream may wait so long while others of its connection move: on a slow path they take turns."""
SEND_BACKLOG_BYTES: Final = 256 * KIB
"""Bytes not sent yet that a stream's writer may leave before it waits, besides the piece it is writing."""
MAX_SEND_AHEAD_BYTES: Final = 8 * MIB
"""Bytes of a stream that may be kept for want of an acknowledgement: a peer that withholds it costs no more."""
TOTAL_SEND_AHEAD_BYTES: Final = 64 * MIB
"""The same over all connections, shared by those that send: a gateway with a thousand devices stays small."""
FIRST_ANSWER_WINDOW_BYTES: Final = 512 * KIB
"""How far ahead of the reader an answer may be at first; it follows the path's bandwidth and delay from there."""
MAX_ANSWER_WINDOW_BYTES: Final = 8 * MIB
"""Four times what 20 Mbit/s hold at 800 ms; a peer that leaves gaps makes us hold as much, within the budget."""
MAX_UNWRITTEN_BYTES: Final = 2 * MIB
"""Bytes of pieces of one bundle that wait for the disk before those that bring more wait: a slow disk costs no more."""
LAN_WINDOW_BYTES: Final = 2 * MIB
"""Bytes in flight towards all peers on short paths together: more overflows a receiver's socket, not the path."""
MIN_LAN_WINDOW_BYTES: Final = 256 * KIB
"""A connection's part of it, however many there are: enough for 1 Gbit/s at 2 ms."""
MAX_CLIENT_HELLO_BYTES: Final = 4 * KIB
"""A ClientHello on the TLS port: looked at in the kernel's buffer before anything is decided, so it must be short."""
MAX_MUX_DATA_BYTES: Final = 16 * KIB - 8
"""Stream bytes in one frame over TLS: with its header it fills one TLS record."""
MAX_MUX_REASON_BYTES: Final = 200
MAX_MUX_ANSWERS: Final = 256
"""Control frames that wait to be sent: a peer that provokes them and does not read loses the connection."""
TLS_SEND_BYTES: Final = 64 * KIB
"""Encrypted bytes of a connection that wait for the socket before its streams do."""
MAX_PROXY_ANSWER_BYTES: Final = 8 * KIB
"""What an HTTP proxy may answer to CONNECT."""
MAX_LEASE_PIECES: Final = 256
MAX_MANIFESTS_PER_CONNECTION: Final = 16
"""Manifests one peer may announce bitfields for."""

# --- MQTT ----------------------------------------------------------------------------------------------------------
MAX_MQTT_CONNECT_BYTES: Final = 4 * KIB
MAX_MQTT_PACKET_BYTES: Final = 128 * KIB
SOFT_MQTT_PAYLOAD_BYTES: Final = 64 * KIB
"""Manifests and metadata up to this ride on MQTT, larger ones are fetched by digest over QUIC."""
MAX_STATE_BYTES: Final = 16 * KIB
MAX_REPORT_BYTES: Final = 4 * KIB
MAX_PROGRESS_BYTES: Final = 1 * KIB
MAX_OUTBOX_REPORTS: Final = 1000
MAX_TOPIC_BYTES: Final = 256
MAX_PRESENCE_BYTES: Final = 4 * KIB
MAX_COMMAND_BYTES: Final = 8 * KIB
MAX_STATE_BUNDLES: Final = 48
"""Bundles one state names; a device that holds more says how many it left out."""
MAX_PEERS_TOLD: Final = 32
MAX_ACKED_REPORTS: Final = 256
MIN_REPORT_INTERVAL_S: Final = 1
MAX_REPORT_INTERVAL_S: Final = 3600
MAX_COMMAND_LIFETIME_S: Final = 30 * 86_400
MAX_CAPS: Final = 64
"""Ceilings one gateway announces: each device walks them once a minute at most."""
MAX_BUDGETS: Final = 1024
"""Sites with a budget: the daemon weighs each of them once a second for status."""
MAX_CAPS_BYTES: Final = 48 * KIB
MAX_CAP_TEXT_CHARS: Final = 160
MIN_CAP_BYTES_S: Final = 8_000
"""A lower cap is taken for this one: whoever stole a gateway's key slows its devices down and never stops them."""
MAX_MQTT_QUEUED_MESSAGES: Final = 1000
MAX_MQTT_QUEUED_BYTES: Final = 4 * MIB
"""What waits for one slow reader, on either side of a broker."""
MAX_MQTT_SUBSCRIPTIONS: Final = 32
MAX_MQTT_CLIENTS: Final = 2000
MAX_MQTT_UNPROVEN: Final = 64
"""Connections that have not finished TLS and CONNECT."""
MAX_MQTT_UNPROVEN_PER_ADDRESS: Final = 32
MQTT_UNPROVEN_TIMEOUT_S: Final = 20.0
"""TCP, TLS and CONNECT take three round trips, and a lost packet costs seconds on a path with two of round trip."""
MAX_RELAY_UNPROVEN: Final = 32
"""MQTT relays whose broker has not answered often enough: a bare ClientHello buys a whole one, two sockets."""
MAX_RELAY_UNPROVEN_PER_ADDRESS: Final = 4
"""One source that opens relays and stays silent leaves places for others."""
MAX_RELAY_UNPROVEN_KNOWN: Final = 64
"""The same for sources from which the broker has let a client in lately: strangers elsewhere take none of theirs."""
MAX_RELAY_UNPROVEN_PER_KNOWN_ADDRESS: Final = 16
"""A site behind one address comes back as one; a stranger there, or who passed for proven, leaves places for others."""
MAX_RELAY_KNOWN_ADDRESSES: Final = 1024
"""Of them, whose place in memory is all that a source gains; the one heard of longest ago is forgotten first."""
RELAY_KNOWN_S: Final = 86_400.0
"""So long a source is known after the broker last answered a client of it: an outage does not make it a stranger."""
RELAY_UNPROVEN_TIMEOUT_S: Final = 10.0
"""Such a relay ends then, silent or not: a stranger that trickles holds it no longer."""
RELAY_PROVEN_ANSWERS: Final = 3
"""Answers of the broker to what came since its last: two (a HelloRetryRequest, its handshake) need no certificate."""
RELAY_STAYED_S: Final = 5.0
"""Whom the broker keeps so long after them is a member: a stranger's third is the alert with which it is sent away."""
MAX_MQTT_KEEPALIVE_S: Final = 600
MAX_MQTT_PACKETS_S: Final = 100
MAX_MQTT_PACKET_BURST: Final = 1000
"""Packets one device may send at once and in the long run; above it the embedded broker reads more slowly."""
MAX_MQTT_RETAINED: Final = 20_000

# --- discovery -----------------------------------------------------------------------------------------------------
MAX_PEER_CANDIDATES: Final = 64
MIN_DIAL_INTERVAL_S: Final = 1.0
MAX_TXT_BYTES: Final = 400

# --- durability ----------------------------------------------------------------------------------------------------
FLUSH_BYTES: Final = 8 * MIB
FLUSH_INTERVAL_S: Final = 2.0
RESERVE_BYTES: Final = 16 * MIB
"""Freed to record that the disk is full."""
DISK_SLACK_BYTES: Final = 64 * MIB

# --- operator ------------------------------------------------------------------------------------------------------
MAX_LABELS: Final = 64
MAX_LABEL_BYTES: Final = 63
