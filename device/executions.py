"""What became of each assigned or asked-for bundle, so that `agent status` can say it while the agent does not run.

Rows in ``state.db``: losing them costs history, not safety. What may follow what is decided in ``device.core.install``.
"""

import time
from dataclasses import asdict, dataclass, fields

from sqlite_utils import Database, Migrations

from device.state import StateDatabase
from edgesync.ids import BundleName, Digest, Version

EXECUTIONS = Migrations("executions")
MAX_ENDED = 64
"""Ended executions kept; older ones are dropped."""


@EXECUTIONS()
def create(db: Database) -> None:
    db.table("executions").create(
        {
            "digest": str,
            "name": str,
            "version": str,
            "kind": str,
            "assignment_id": str,
            "status": str,
            "step": str,
            "reason": str,
            "started": float,
            "updated": float,
            "payload_bytes": int,
            "pieces_total": int,
            "pieces_have": int,
        },
        pk="digest",
    )


@dataclass
class Execution:
    digest: Digest
    name: BundleName
    version: Version
    kind: str
    assignment_id: str
    """Empty for a bundle somebody asked for with `get`."""
    status: str
    step: str = ""
    reason: str = ""
    started: float = 0.0
    """Unix seconds."""
    updated: float = 0.0
    payload_bytes: int = 0
    pieces_total: int = 0
    pieces_have: int = 0

    @property
    def ended(self) -> bool:
        return self.status not in {"queued", "in_progress"}


_COLUMNS = tuple(field.name for field in fields(Execution))


class Executions:
    """Table access; every call is a short transaction, none belongs on an event loop."""

    def __init__(self, state: StateDatabase) -> None:
        self._state = state
        with state.lock:
            EXECUTIONS.apply(state.db)

    def all(self) -> list[Execution]:
        return read(self._state)

    def put(self, execution: Execution) -> None:
        execution.updated = time.time()
        marks = ", ".join("?" * len(_COLUMNS))
        with self._state.transaction() as connection:
            connection.execute(
                f"insert or replace into executions ({', '.join(_COLUMNS)}) values ({marks})",  # noqa: S608 - constants
                tuple(asdict(execution).values()),
            )
            connection.execute(
                "delete from executions where status not in ('queued', 'in_progress') and digest not in "
                "(select digest from executions order by updated desc limit ?)",
                (MAX_ENDED,),
            )

    def forget(self, digest: Digest) -> None:
        with self._state.transaction() as connection:
            connection.execute("delete from executions where digest = ?", (digest,))


def read(state: StateDatabase) -> list[Execution]:
    """Every row, oldest first; none where the table was never made."""
    with state.lock:
        if "executions" not in state.db.table_names():
            return []
        rows = state.db.conn.execute(
            f"select {', '.join(_COLUMNS)} from executions order by started, name"  # noqa: S608 - constants
        ).fetchall()
    return [Execution(*row) for row in rows]
