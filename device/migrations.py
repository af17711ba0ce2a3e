"""The tables of the agent's ``state.db``, one migration a change; each commits together with its own record.

Only ever added to. Everything in here can be rebuilt from disk: what must not be lost lives in ``trust.db``.
"""

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

STATE = Migrations("device-state")


@STATE()
def m001_bundles(db: Database) -> None:
    db.conn.execute("create table meta (key text primary key, value text not null) without rowid")
    db.conn.execute(
        """create table bundles (
            digest text primary key,
            name text not null,
            version text not null,
            kind text not null,
            access text not null,
            release_counter integer not null,
            payload_bytes integer not null,
            unique_bytes integer not null,
            piece_count integer not null,
            state text not null check (state in ('staged', 'held')),
            unchecked integer not null default 0,
            bytes_from_gateway integer not null default 0,
            bytes_from_peers integer not null default 0,
            bytes_local integer not null default 0,
            bytes_import integer not null default 0,
            bytes_sent integer not null default 0,
            pieces_rejected integer not null default 0,
            resumes integer not null default 0
        ) without rowid"""
    )
    # Apart from the row above: a bitfield of 100,000 pieces would be rewritten with every counter.
    db.conn.execute(
        """create table bits (
            digest text primary key,
            bits blob not null,
            checksum blob not null,
            flush integer not null
        ) without rowid"""
    )
    db.conn.execute(
        """create table flushes (
            digest text not null,
            flush integer not null,
            pieces blob not null,
            primary key (digest, flush)
        ) without rowid"""
    )
    db.conn.execute(
        "create table active (name text primary key, digest text not null) without rowid"
    )
    db.conn.execute(
        """create table activating (
            name text primary key,
            old text,
            new text not null,
            switch integer not null
        ) without rowid"""
    )
