"""Reports wait until they are acknowledged, survive restarts, and never push a result out unseen."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from device.outbox import Outbox
from device.state import StateDatabase
from edgesync import limits
from edgesync.envelope import SigningKey
from edgesync.wire import mqtt

KEY = SigningKey.from_seed(b"d" * 32).key


def report(status: str = "in_progress", step: str = "downloading", name: str = "fw") -> mqtt.Report:
    return mqtt.Report(
        device="van-1",
        key=KEY,
        epoch=0,
        sequence=0,
        issued=1.0,
        kind="files",
        name=name,
        version="1",
        digest="ab" * 32,
        status=status,  # type: ignore[arg-type]
        step=step,  # type: ignore[arg-type]
    )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[StateDatabase]:
    database = StateDatabase.open(tmp_path / "state.db")
    yield database
    database.close()


def test_a_report_waits_until_exactly_it_is_acknowledged(database: StateDatabase) -> None:
    outbox = Outbox(database)
    first, second = outbox.add(report()), outbox.add(report("succeeded", ""))
    assert (first.epoch, first.sequence, second.sequence) == (outbox.epoch, 1, 2)
    assert outbox.pending() == [first, second]
    assert outbox.ack(outbox.epoch + 1, [1, 2]) == 0
    assert outbox.ack(outbox.epoch, [1, 77]) == 1
    assert outbox.pending() == [second]
    assert outbox.ack(outbox.epoch, [1, 2]) == 1
    assert outbox.size().waiting == 0


def test_failures_go_first_and_the_rest_in_order(database: StateDatabase) -> None:
    outbox = Outbox(database)
    for status in ("in_progress", "succeeded", "failed", "in_progress", "timed_out"):
        outbox.add(report(status, ""))
    assert [one.sequence for one in outbox.pending()] == [3, 5, 1, 2, 4]
    assert [one.sequence for one in outbox.pending(limit=2)] == [3, 5]


def test_a_restart_keeps_reports_and_never_reuses_a_number(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = StateDatabase.open(path)
    outbox = Outbox(database)
    kept = outbox.add(report("succeeded", ""))
    acknowledged = outbox.add(report())
    outbox.ack(outbox.epoch, [acknowledged.sequence])
    database.close()
    database = StateDatabase.open(path)
    again = Outbox(database)
    assert again.pending() == [kept]
    assert (again.add(report()).epoch, again.pending()[-1].sequence) == (kept.epoch, 3)
    database.close()
    path.unlink()
    database = StateDatabase.open(path)
    assert Outbox(database).epoch != kept.epoch
    database.close()


def test_the_oldest_steps_make_room_and_a_lost_result_is_told(
    database: StateDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_OUTBOX_REPORTS", 3)
    outbox = Outbox(database)
    outbox.add(report("failed", ""))
    outbox.add(report())
    outbox.add(report())
    outbox.add(report("succeeded", ""))
    assert [one.sequence for one in outbox.pending()] == [1, 3, 4]
    outbox.add(report("succeeded", ""))
    assert outbox.size().lost == 0
    outbox.add(report("succeeded", ""))
    assert [one.sequence for one in outbox.pending()] == [4, 5, 6]
    assert outbox.last_size == outbox.size() == type(outbox.size())(waiting=3, lost=1)
    outbox.ack(outbox.epoch, [4])
    assert outbox.last_size.waiting == 2
    assert Outbox(database).last_size == outbox.size()


def test_connection_epochs_only_grow(database: StateDatabase) -> None:
    outbox = Outbox(database)
    assert outbox.next_connection_epoch(utc_now=1_000.0) == 1_000_000
    assert outbox.next_connection_epoch(utc_now=0.0) == 1_000_001
    outbox.raise_connection_epoch(5)
    outbox.raise_connection_epoch(2_000_000)
    assert outbox.next_connection_epoch(utc_now=0.0) == 2_000_001
    assert outbox.next_connection_epoch(utc_now=1e13) == 2**52
    assert outbox.next_connection_epoch(utc_now=1e13) == 2**52 + 1
