"""What devices say, into the database: states, reports, progress; and which reports are to be acknowledged.

Runs in the writer thread. A message counts only when the key registered for the topic's device signed it and nothing
newer was heard; a message that fails is dropped and counted, never an error for the daemon. A report is stored in the
same transaction as the fact that it was, so it is acknowledged as often as it comes and counted once.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from edgesync import limits
from edgesync.errors import EdgeSyncError
from edgesync.ids import PeerKey
from edgesync.io.mqtt import Incoming
from edgesync.wire import mqtt as wire
from edgesync.wire.topics import Kind, Topic
from gateway.store import GatewayStore

logger = logging.getLogger(__name__)

ENDED: Final = 2**53
"""Stored as the sequence of an epoch whose last will came: nothing of that epoch counts any more."""
MAX_STORED_REPORTS: Final = 4 * limits.MAX_OUTBOX_REPORTS
"""Ids of reports kept per device; a device has at most MAX_OUTBOX_REPORTS unacknowledged ones to send again."""
REPORTS_PER_MINUTE: Final = 600
"""Per device: a member gone mad must not fill the disk with events. What is above it waits in its outbox."""
_COUNTERS: Final = (
    "payload_bytes",
    "bytes_from_gateway",
    "bytes_from_peers",
    "bytes_local",
    "bytes_import",
    "bytes_sent",
    "pieces_total",
    "pieces_have",
    "pieces_rejected",
    "resumes",
    "duration_s",
)


@dataclass
class Batch:
    """What came of one batch of messages."""

    acks: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """(device, epoch) → sequences that are stored now."""
    states: dict[str, wire.State] = field(default_factory=dict)
    """Device → its newest state, if it changed whether or where the device is to be reached."""


class Ingest:
    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self.dropped: Counter[str] = Counter()
        """By reason, since start."""
        self._minute = 0
        self._reports: Counter[str] = Counter()

    def handle(self, messages: Iterable[Incoming], *, utc_now: float) -> Batch:
        """Store a batch in one transaction."""
        batch = Batch()
        with self._store.atomic():
            for message in messages:
                try:
                    self._one(message, batch, utc_now)
                except EdgeSyncError as exc:
                    self.dropped[type(exc).__name__] += 1
                    logger.debug("dropped a message on %s: %s", message.topic, exc)
        return batch

    def reset_liveness(self) -> None:
        """Nobody is known to be there: called when the daemon starts and stops."""
        with self._store.atomic() as db:
            db.conn.execute("UPDATE devices SET online = 0 WHERE online = 1")

    def _one(self, message: Incoming, batch: Batch, utc_now: float) -> None:
        topic = message.topic
        if topic.kind not in {Kind.STATE, Kind.REPORT, Kind.PROGRESS}:
            return
        row = self._store.one(
            "SELECT * FROM devices WHERE id = ? AND state = 'accepted'", (topic.owner,)
        )
        if row is None:
            self.dropped["unknown device"] += 1
            return
        match topic.kind:
            case Kind.STATE:
                if message.payload:
                    self._state(topic, row, message.payload, batch, utc_now)
            case Kind.REPORT:
                self._report(topic, row, message.payload, batch, utc_now)
            case _:
                self._progress(wire.decode_progress(topic, message.payload), utc_now)

    # --- state ------------------------------------------------------------------------------------------------------
    def _state(
        self, topic: Topic, row: dict[str, Any], payload: bytes, batch: Batch, utc_now: float
    ) -> None:
        state: wire.State = wire.unseal(topic, payload, keys=(PeerKey(row["key"]),))
        if not _is_news(state, row):
            return
        store, device = self._store, state.device
        sequence = state.sequence if state.online else ENDED
        with store.atomic() as db:
            if not state.online:
                # A will was signed at CONNECT: what it says besides "gone" is old.
                db.conn.execute(
                    "UPDATE devices SET online = 0, state_epoch = ?, state_sequence = ? WHERE id = ?",
                    (state.epoch, sequence, device),
                )
            else:
                db.conn.execute(
                    "UPDATE devices SET online = 1, last_seen = ?, agent_version = ?, listen_port = ?, "
                    "local_addresses = ?, waiting = ?, root_version = ?, timestamp_version = ?, "
                    "assignment_sequence = ?, state_epoch = ?, state_sequence = ?, reports_lost = ?, "
                    "udp_blocked = ? WHERE id = ?",
                    (
                        utc_now,
                        state.agent,
                        state.listen_port,
                        json.dumps(state.addresses),
                        state.waiting,
                        state.root_version,
                        state.timestamp_version,
                        state.assignment_sequence,
                        state.epoch,
                        sequence,
                        state.reports_lost,
                        state.udp_blocked,
                        device,
                    ),
                )
                self._bundles(state, utc_now)
                if state.reports_lost > row["reports_lost"]:
                    store.emit(
                        f"device:{device}",
                        "device.reports_lost",
                        f"device:{device}",
                        {"lost": state.reports_lost},
                        utc_now=utc_now,
                    )
            if bool(row["online"]) != state.online:
                kind = "device.online" if state.online else "device.offline"
                store.emit(
                    f"device:{device}",
                    kind,
                    f"device:{device}",
                    {"agent": state.agent},
                    utc_now=utc_now,
                )
        if (
            bool(row["online"]) != state.online
            or json.loads(row["local_addresses"]) != state.addresses
            or row["state_epoch"] != state.epoch
        ):
            batch.states[device] = state

    def _bundles(self, state: wire.State, utc_now: float) -> None:
        """The newest state replaces what was known; what it left out for want of room stays."""
        told = {
            (bundle.name, bundle.version): (
                bundle.kind,
                bundle.digest,
                bundle.state,
                bundle.reason,
                bundle.pieces_have,
                bundle.pieces_total,
            )
            for bundle in state.bundles
        }
        known = {
            (row["name"], row["version"]): (
                row["kind"],
                row["digest"],
                row["state"],
                row["reason"],
                row["pieces_have"],
                row["pieces_total"],
            )
            for row in self._store.rows(
                "SELECT * FROM device_bundles WHERE device_id = ?", (state.device,)
            )
        }
        connection = self._store.db.conn
        for (name, version), facts in told.items():
            if known.get((name, version)) != facts:
                connection.execute(
                    "INSERT OR REPLACE INTO device_bundles (device_id, name, version, kind, digest, state, reason, "
                    "pieces_have, pieces_total, updated) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (state.device, name, version, *facts, utc_now),
                )
        if not state.bundles_omitted:
            for name, version in known.keys() - told.keys():
                connection.execute(
                    "DELETE FROM device_bundles WHERE device_id = ? AND name = ? AND version = ?",
                    (state.device, name, version),
                )

    # --- reports ----------------------------------------------------------------------------------------------------
    def _report(
        self, topic: Topic, row: dict[str, Any], payload: bytes, batch: Batch, utc_now: float
    ) -> None:
        report: wire.Report = wire.unseal(topic, payload, keys=(PeerKey(row["key"]),))
        device = report.device
        if int(utc_now // 60) != self._minute:
            self._minute = int(utc_now // 60)
            self._reports.clear()
        self._reports[device] += 1
        if self._reports[device] > REPORTS_PER_MINUTE:
            self.dropped["too many reports"] += 1
            return
        with self._store.atomic() as db:
            new = db.conn.execute(
                "INSERT OR IGNORE INTO reports (device_id, epoch, sequence) VALUES (?, ?, ?)",
                (device, report.epoch, report.sequence),
            ).rowcount
            if new:
                self._execution(report, utc_now)
                self._prune(device)
            db.conn.execute("UPDATE devices SET last_seen = ? WHERE id = ?", (utc_now, device))
        batch.acks.setdefault((device, report.epoch), []).append(report.sequence)

    def _execution(self, report: wire.Report, utc_now: float) -> None:
        counters = {name: getattr(report, name) for name in _COUNTERS}
        store = self._store
        key = (report.device, report.name, report.version, report.assignment)
        known = store.one(
            "SELECT epoch, sequence, status, step FROM executions "
            "WHERE device_id = ? AND name = ? AND version = ? AND assignment_id = ?",
            key,
        )
        # MQTT reorders: an older step that comes late is history, not the state of the execution.
        if known is None or (report.epoch, report.sequence) > (known["epoch"], known["sequence"]):
            store.db.conn.execute(
                "INSERT OR REPLACE INTO executions (device_id, name, version, assignment_id, kind, status, step, "
                "reason, issued, epoch, sequence, updated, counters) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    report.kind,
                    report.status,
                    report.step,
                    report.reason,
                    report.issued,
                    report.epoch,
                    report.sequence,
                    utc_now,
                    json.dumps(counters, separators=(",", ":")),
                ),
            )
        if known is not None and report.terminal and known["status"] == report.status:
            return  # a device that lost power between saying and noting it says it again
        told = msgspec.structs.asdict(report)
        for name in ("device", "key"):
            told.pop(name)
        store.emit(
            f"device:{report.device}",
            f"execution.{report.step or report.status}",
            f"device:{report.device}",
            told,
            utc_now=utc_now,
        )

    def _prune(self, device: str) -> None:
        count = self._store.one("SELECT COUNT(*) AS n FROM reports WHERE device_id = ?", (device,))
        assert count is not None
        if count["n"] > MAX_STORED_REPORTS:
            self._store.db.conn.execute(
                "DELETE FROM reports WHERE device_id = ? AND (epoch, sequence) IN (SELECT epoch, sequence FROM reports "
                "WHERE device_id = ? ORDER BY epoch, sequence LIMIT ?)",
                (device, device, MAX_STORED_REPORTS // 2),
            )

    # --- progress ---------------------------------------------------------------------------------------------------
    def _progress(self, progress: wire.Progress, utc_now: float) -> None:
        """For eyes only: it moves a number on a screen and decides nothing."""
        with self._store.atomic() as db:
            for transfer in progress.transfers:
                db.conn.execute(
                    "UPDATE device_bundles SET pieces_have = ?, pieces_total = ?, updated = ? "
                    "WHERE device_id = ? AND digest = ? AND state <> 'succeeded'",
                    (
                        transfer.pieces_have,
                        transfer.pieces_total,
                        utc_now,
                        progress.device,
                        transfer.digest,
                    ),
                )


def _is_news(state: wire.State, row: dict[str, Any]) -> bool:
    """``wire.supersedes`` on what the database keeps; the newest word may come twice after a restart of the gateway."""
    known = (row["state_epoch"], row["state_sequence"])
    if state.epoch != row["state_epoch"]:
        return bool(state.epoch > row["state_epoch"])
    if row["state_sequence"] >= ENDED:
        return False
    return not state.online or (state.epoch, state.sequence) >= known
