"""Reading the event log: what happened, in order, from any point on, at most once.

A reader keeps the last id it has dealt with and asks for what came after: ids only grow and are never given twice, so
it misses none and doubles none, across its own restarts and the gateway's.
"""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from edgesync.selectors import Selector
from gateway.store import GatewayStore

BATCH: Final = 500
POLL_S: Final = 0.25


def since(store: GatewayStore, after: int, *, limit: int = BATCH) -> list[dict[str, Any]]:
    """Events with an id above ``after``, oldest first."""
    rows = store.rows("SELECT * FROM events WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
    return [{**row, "data": json.loads(row["data"])} for row in rows]


def last_id(store: GatewayStore) -> int:
    row = store.one("SELECT COALESCE(MAX(id), 0) AS id FROM events")
    assert row is not None
    return int(row["id"])


def matches(selector: Selector, event: dict[str, Any]) -> bool:
    """A selector sees ``kind``, ``actor``, ``subject`` and ``type`` (the subject's, before the colon) as labels."""
    subject = str(event["subject"])
    kind, _, name = subject.partition(":")
    labels = {
        "kind": event["kind"],
        "actor": event["actor"],
        "subject": subject,
        "type": kind,
        kind: name,
    }
    labels.update(
        {key: str(value) for key, value in event["data"].items() if isinstance(value, (str, int))}
    )
    return selector.matches(labels)


def read(
    store: GatewayStore,
    *,
    after: int = 0,
    follow: bool = False,
    selector: Selector | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """Every event after ``after`` that ``selector`` matches; with ``follow``, those still to come, for ever."""
    chosen = selector or Selector()
    while True:
        version = store.data_version()
        while batch := since(store, after):
            for event in batch:
                if matches(chosen, event):
                    yield event
            after = int(batch[-1]["id"])
        if not follow:
            return
        while store.data_version() == version:
            wait(POLL_S)
