"""Reports this device has not been told are stored: kept through restarts, sent again until a signed Ack names them.

It keeps them in ``state.db``, numbers them, and forgets acknowledged ones. It does not sign, send or decide when to:
``device.agent`` does. Losing ``state.db`` loses unacknowledged reports, never anything that is installed; the state
message still says what is.

Invariants:

* a report is identified by (epoch, sequence); the epoch is drawn when the table is made and names it for
  good, sequences only grow inside it, so that no two reports ever share both;
* at most MAX_OUTBOX_REPORTS wait; what makes room is the oldest report of a step, and only when every one is a result
  the oldest of those, which is counted in ``lost`` for the state message to tell.

Methods are synchronous and safe from any thread; none belongs on an event loop.
"""

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from sqlite_utils import Database, Migrations

from device.state import StateDatabase
from edgesync import limits
from edgesync.wire.mqtt import Report, encode

OUTBOX = Migrations("outbox")
SALT_BITS: Final = 10
MAX_EPOCH_MS: Final = 2**42

_decoder = msgspec.json.Decoder(Report)


@OUTBOX()
def m001_outbox(db: Database) -> None:
    db.conn.execute(
        """create table outbox (
            sequence integer primary key,
            failed integer not null,
            terminal integer not null,
            report blob not null
        )"""
    )
    db.conn.execute("create table outbox_meta (key text primary key, value integer not null)")
    db.conn.execute(
        "insert into outbox_meta values ('epoch', ?), ('sequence', 0), ('lost', 0), ('connection', 0)",
        (_new_epoch(time.time_ns() // 1_000_000),),
    )


def _new_epoch(utc_ms: int) -> int:
    """Milliseconds first, so that a later outbox of the same device sorts later; then what no two share.

    The table is made anew when ``state.db`` is lost, perhaps with a clock at 1970 both times.
    """
    return (min(max(utc_ms, 1), MAX_EPOCH_MS) << SALT_BITS) | secrets.randbits(SALT_BITS)


@dataclass(frozen=True)
class OutboxSize:
    waiting: int
    lost: int
    """Results dropped for want of room since the table was made."""


class Outbox:
    def __init__(self, state: StateDatabase) -> None:
        """Raises StorageError: the tables cannot be made."""
        self._state = state
        with state.lock:
            OUTBOX.apply(state.db)
        self.epoch = self._meta("epoch")
        self.last_size = self.size()
        """As it was after the last change; costs nothing to look at."""

    def add(self, report: Report) -> Report:
        """Keep a report, under the epoch and sequence it gets here; returns it with both.

        Raises DiskFullError, StorageError: it is not kept.
        """
        with self._state.transaction() as connection:
            sequence = self._bump(connection, "sequence")
            kept = msgspec.structs.replace(report, epoch=self.epoch, sequence=sequence)
            connection.execute(
                "insert into outbox values (?, ?, ?, ?)",
                (
                    sequence,
                    kept.status in {"failed", "timed_out", "rejected"},
                    kept.terminal,
                    encode(kept),
                ),
            )
            (waiting,) = connection.execute("select count(*) from outbox").fetchone()
            if waiting > limits.MAX_OUTBOX_REPORTS:
                excess, terminal = connection.execute(
                    "select sequence, terminal from outbox order by terminal, sequence limit 1"
                ).fetchone()
                connection.execute("delete from outbox where sequence = ?", (excess,))
                if terminal:
                    self._bump(connection, "lost")
        self.last_size = self.size()
        return kept

    def pending(self, limit: int = 100) -> list[Report]:
        """What waits, failures first, then in order."""
        with self._state.lock:
            rows = self._state.db.conn.execute(
                "select report from outbox order by failed desc, sequence limit ?", (limit,)
            ).fetchall()
        return [_decoder.decode(row[0]) for row in rows]

    def ack(self, epoch: int, sequences: Iterable[int]) -> int:
        """Forget reports the gateway has stored; returns how many. Those of another epoch are not ours to forget."""
        if epoch != self.epoch:
            return 0
        with self._state.transaction() as connection:
            before = connection.total_changes
            connection.executemany(
                "delete from outbox where sequence = ?", [(sequence,) for sequence in sequences]
            )
            forgotten = connection.total_changes - before
        self.last_size = self.size()
        return forgotten

    def size(self) -> OutboxSize:
        with self._state.lock:
            (waiting,) = self._state.db.conn.execute("select count(*) from outbox").fetchone()
        return OutboxSize(waiting, self._meta("lost"))

    def next_connection_epoch(self, utc_now: float | None = None) -> int:
        """The epoch of the next connection's state and will: higher than any before, and than unix milliseconds.

        The clock helps where ``state.db`` was lost; where that is wrong too, the gateway's RESYNC tells the newest
        epoch it has seen (``raise_connection_epoch``).
        """
        now_ms = int((time.time() if utc_now is None else utc_now) * 1000)
        with self._state.transaction() as connection:
            epoch = max(self._meta("connection") + 1, min(max(now_ms, 1), 2**52))
            connection.execute(
                "update outbox_meta set value = ? where key = 'connection'", (epoch,)
            )
        return epoch

    def raise_connection_epoch(self, seen: int) -> None:
        """The gateway has seen this epoch of ours: the next one is above it."""
        with self._state.transaction() as connection:
            connection.execute(
                "update outbox_meta set value = max(value, ?) where key = 'connection'", (seen,)
            )

    def _meta(self, key: str) -> int:
        with self._state.lock:
            (value,) = self._state.db.conn.execute(
                "select value from outbox_meta where key = ?", (key,)
            ).fetchone()
        return int(value)

    def _bump(self, connection: Any, key: str) -> int:
        connection.execute("update outbox_meta set value = value + 1 where key = ?", (key,))
        return self._meta(key)
