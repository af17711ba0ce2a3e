"""Where peers were reached, kept through restarts: a device that comes up without its gateway knows whom to dial.

It keeps keys and addresses in ``state.db`` and nothing else: an address is a hint, the handshake proves who is there.
It does not dial. Methods are synchronous and safe from any thread; none belongs on an event loop.
"""

from collections.abc import Mapping

from sqlite_utils import Database, Migrations

from device.state import StateDatabase
from edgesync.ids import PeerKey

KNOWN_PEERS = Migrations("known_peers")
Addresses = tuple[str, ...]
"""HOST:PORT each, the best first."""


@KNOWN_PEERS()
def m001_known_peers(db: Database) -> None:
    db.conn.execute(
        """create table known_peers (
            place integer primary key,
            key text not null unique,
            addresses text not null
        )"""
    )


class KnownPeers:
    def __init__(self, state: StateDatabase) -> None:
        """Raises StorageError: the table cannot be made."""
        self._state = state
        with state.lock:
            KNOWN_PEERS.apply(state.db)

    def load(self) -> dict[PeerKey, Addresses]:
        """The latest last."""
        with self._state.lock:
            rows = self._state.db.conn.execute(
                "select key, addresses from known_peers order by place"
            ).fetchall()
        return {PeerKey(key): tuple(addresses.split()) for key, addresses in rows}

    def save(self, peers: Mapping[PeerKey, Addresses]) -> None:
        """Keep these and no others. Raises StorageError."""
        with self._state.transaction() as connection:
            connection.execute("delete from known_peers")
            connection.executemany(
                "insert into known_peers (key, addresses) values (?, ?)",
                [(key, " ".join(addresses)) for key, addresses in peers.items()],
            )


__all__ = ["KnownPeers"]
