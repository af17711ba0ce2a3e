"""Tables of the register: devices, tokens, assignments, the event log and the daemon's own row.

Tables of the content store and of the metadata repository stand beside the modules that own them. A migration commits
together with its record; a released one is never edited, a change is a new one.
"""

from sqlite_utils import Database, Migrations

migrations = Migrations("gateway")


@migrations()
def m001_register(db: Database) -> None:
    for statement in (
        # AUTOINCREMENT: an id is never given twice, so a consumer that remembers one misses nothing.
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            ts REAL NOT NULL,
            actor TEXT NOT NULL,
            kind TEXT NOT NULL,
            subject TEXT NOT NULL,
            data TEXT NOT NULL)""",
        "CREATE INDEX events_subject ON events (subject, id)",
        """CREATE TRIGGER events_no_update BEFORE UPDATE ON events
            BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
        """CREATE TRIGGER events_no_delete BEFORE DELETE ON events
            BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
        # One row, id 1: the fleet this gateway belongs to and who it is.
        """CREATE TABLE fleet (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            name TEXT NOT NULL,
            fleet_id TEXT NOT NULL,
            region TEXT NOT NULL,
            gateway_id TEXT NOT NULL,
            gateway_key TEXT NOT NULL,
            created REAL NOT NULL)""",
        """CREATE TABLE tokens (
            id TEXT PRIMARY KEY,
            secret_hash BLOB NOT NULL,
            created REAL NOT NULL,
            expires REAL NOT NULL,
            uses INTEGER NOT NULL,
            site TEXT,
            labels TEXT NOT NULL,
            hardware TEXT,
            id_pattern TEXT,
            auto_accept INTEGER NOT NULL,
            revoked REAL)""",
        # Who used a token: the same key asking again gets the same answer.
        """CREATE TABLE token_uses (
            token_id TEXT NOT NULL REFERENCES tokens (id),
            key TEXT NOT NULL,
            device_id TEXT NOT NULL,
            ts REAL NOT NULL,
            PRIMARY KEY (token_id, key))""",
        """CREATE TABLE devices (
            id TEXT PRIMARY KEY,
            key TEXT NOT NULL UNIQUE,
            region TEXT NOT NULL,
            labels TEXT NOT NULL,
            hardware TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('accepted', 'pending', 'rejected')),
            certificate BLOB,
            token_id TEXT,
            joined REAL NOT NULL,
            agent_version TEXT NOT NULL DEFAULT '',
            online INTEGER NOT NULL DEFAULT 0,
            last_seen REAL,
            address TEXT NOT NULL DEFAULT '',
            listen_port INTEGER NOT NULL DEFAULT 0,
            local_addresses TEXT NOT NULL DEFAULT '[]',
            waiting TEXT NOT NULL DEFAULT '',
            root_version INTEGER NOT NULL DEFAULT 0,
            timestamp_version INTEGER NOT NULL DEFAULT 0,
            assignment_sequence INTEGER NOT NULL DEFAULT 0,
            state_epoch INTEGER NOT NULL DEFAULT 0,
            state_sequence INTEGER NOT NULL DEFAULT 0,
            cmd_sequence INTEGER NOT NULL DEFAULT 0)""",
        # What a device said last of each bundle it holds or works on; replaced whole by its next state.
        """CREATE TABLE device_bundles (
            device_id TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            version TEXT NOT NULL,
            digest TEXT NOT NULL,
            state TEXT NOT NULL,
            reason TEXT NOT NULL,
            pieces_have INTEGER NOT NULL,
            pieces_total INTEGER NOT NULL,
            updated REAL NOT NULL,
            PRIMARY KEY (device_id, name, version))""",
        # Reports are sent until acknowledged: one that came before is acknowledged again, not counted again.
        """CREATE TABLE reports (
            device_id TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
            epoch INTEGER NOT NULL,
            sequence INTEGER NOT NULL,
            PRIMARY KEY (device_id, epoch, sequence)) WITHOUT ROWID""",
        # One device's way through one assignment, as its signed reports tell it.
        """CREATE TABLE executions (
            device_id TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            version TEXT NOT NULL,
            assignment_id TEXT NOT NULL,
            status TEXT NOT NULL,
            step TEXT NOT NULL,
            reason TEXT NOT NULL,
            issued REAL NOT NULL,
            epoch INTEGER NOT NULL,
            sequence INTEGER NOT NULL,
            updated REAL NOT NULL,
            counters TEXT NOT NULL,
            PRIMARY KEY (device_id, name, version, assignment_id))""",
        """CREATE TABLE assignments (
            device_id TEXT NOT NULL REFERENCES devices (id) ON DELETE CASCADE,
            kind TEXT NOT NULL,
            name TEXT NOT NULL,
            version TEXT NOT NULL,
            target_hash TEXT NOT NULL,
            target_length INTEGER NOT NULL,
            assignment_id TEXT NOT NULL,
            action TEXT NOT NULL,
            not_before REAL,
            created REAL NOT NULL,
            PRIMARY KEY (device_id, name))""",
        """CREATE TABLE assignment_sets (
            device_id TEXT PRIMARY KEY REFERENCES devices (id) ON DELETE CASCADE,
            sequence INTEGER NOT NULL,
            issued REAL NOT NULL,
            expires REAL NOT NULL,
            envelope BLOB NOT NULL)""",
        # Standing rules of assign --follow: a device that joins later obeys them too.
        """CREATE TABLE follow_rules (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL,
            version TEXT,
            selector TEXT NOT NULL,
            action TEXT NOT NULL,
            created REAL NOT NULL)""",
        # Piece bytes as carried, since the gateway was made; added to each second.
        """CREATE TABLE site_bytes (
            site TEXT PRIMARY KEY,
            bytes_out INTEGER NOT NULL) WITHOUT ROWID""",
        # What the running daemon says of itself, rewritten each second.
        """CREATE TABLE runtime (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            pid INTEGER NOT NULL,
            started REAL NOT NULL,
            updated REAL NOT NULL,
            data TEXT NOT NULL)""",
    ):
        db.conn.execute(statement)


@migrations()
def m002_caps(db: Database) -> None:
    for statement in (
        # Rate caps an operator set; one row in caps_state numbers the changes.
        """CREATE TABLE caps (
            scope TEXT NOT NULL CHECK (scope IN ('gateway', 'site', 'device')),
            target TEXT NOT NULL,
            upload TEXT NOT NULL,
            download TEXT NOT NULL,
            zone TEXT NOT NULL,
            until REAL,
            created REAL NOT NULL,
            PRIMARY KEY (scope, target)) WITHOUT ROWID""",
        "CREATE TABLE caps_state (id INTEGER PRIMARY KEY CHECK (id = 1), sequence INTEGER NOT NULL)",
    ):
        db.conn.execute(statement)


@migrations()
def m003_reports_lost(db: Database) -> None:
    # Results a device dropped from its full outbox, as its state says: what the events here cannot tell.
    db.conn.execute("ALTER TABLE devices ADD COLUMN reports_lost INTEGER NOT NULL DEFAULT 0")


@migrations()
def m004_budgets(db: Database) -> None:
    for statement in (
        # Bytes for each calendar month that an operator allows between this gateway and a site.
        """CREATE TABLE budgets (
            site TEXT PRIMARY KEY,
            limit_bytes INTEGER NOT NULL CHECK (limit_bytes > 0),
            zone TEXT NOT NULL,
            created REAL NOT NULL) WITHOUT ROWID""",
        # What each site's months have spent, as edgesync.budget writes it; added to while it moves.
        "CREATE TABLE budget_ledgers (site TEXT PRIMARY KEY, ledger TEXT NOT NULL) WITHOUT ROWID",
    ):
        db.conn.execute(statement)


@migrations()
def m005_presence_epoch(db: Database) -> None:
    # Every epoch below it may have been said: presence must never fall behind, whatever the clock says.
    db.conn.execute(
        "CREATE TABLE presence_epoch (id INTEGER PRIMARY KEY CHECK (id = 1), next INTEGER NOT NULL)"
    )


@migrations()
def m006_udp_blocked(db: Database) -> None:
    # Whether the device said last that UDP from it to its gateway gets no answer.
    db.conn.execute("ALTER TABLE devices ADD COLUMN udp_blocked INTEGER NOT NULL DEFAULT 0")
