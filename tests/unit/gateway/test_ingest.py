import json

import pytest

from edgesync.identity import Identity
from edgesync.io.mqtt import Incoming
from edgesync.wire import mqtt as wire
from edgesync.wire.topics import Kind, Topic
from gateway.ingest import Ingest
from gateway.service import devices

DIGEST = "d" * 64


@pytest.fixture
def device(register, add_device):
    identity = Identity.generate()
    add_device("cam-1", key=identity.key)
    return identity


@pytest.fixture
def ingest(register):
    return Ingest(register)


def state(identity, epoch=1, sequence=0, online=True, device="cam-1", **facts):
    message = wire.State(
        device=device, key=identity.key, epoch=epoch, sequence=sequence, online=online, **facts
    )
    return Incoming(Topic(Kind.STATE, "cam-1"), wire.seal_state(message, identity), retained=False)


def report(identity, sequence, status="in_progress", epoch=1, **facts):
    message = wire.Report(
        device="cam-1",
        key=identity.key,
        epoch=epoch,
        sequence=sequence,
        issued=5.0,
        kind="files",
        name="app",
        version="1",
        digest=DIGEST,
        assignment="a-1",
        status=status,
        **facts,
    )
    return Incoming(Topic(Kind.REPORT, "cam-1"), wire.seal(message, identity), retained=False)


def row(register):
    return register.one("SELECT * FROM devices WHERE id = 'cam-1'")


def held(version="1", state="in_progress", have=1):
    return wire.HeldBundle(
        kind="files",
        name="app",
        version=version,
        digest=DIGEST,
        state=state,
        pieces_have=have,
        pieces_total=9,
    )


def test_state_is_stored_and_replaced_whole(register, device, ingest):
    batch = ingest.handle(
        [
            state(
                device,
                agent="0.1",
                waiting="disk full",
                addresses=["10.0.0.5:7443"],
                bundles=[held(), held("2")],
            )
        ],
        utc_now=50.0,
    )
    assert list(batch.states) == ["cam-1"]
    assert (row(register)["online"], row(register)["last_seen"], row(register)["waiting"]) == (
        1,
        50.0,
        "disk full",
    )
    ingest.handle([state(device, sequence=1, bundles=[held("2", "succeeded", 9)])], utc_now=51.0)
    assert [(r["version"], r["state"]) for r in register.rows("SELECT * FROM device_bundles")] == [
        ("2", "succeeded")
    ]
    # One that left bundles out for want of room does not make the gateway forget them.
    ingest.handle([state(device, sequence=2, bundles=[held("3")], bundles_omitted=1)], utc_now=52.0)
    assert [
        r["version"] for r in register.rows("SELECT version FROM device_bundles ORDER BY version")
    ] == ["2", "3"]
    assert [e["kind"] for e in register.rows("SELECT kind FROM events")] == ["device.online"]


def test_results_a_device_lost_are_told_once(register, device, ingest):
    for sequence, lost in enumerate((0, 2, 2, 5, 1)):
        ingest.handle([state(device, sequence=sequence, reports_lost=lost)], utc_now=1.0)
    told = register.rows("SELECT data FROM events WHERE kind = 'device.reports_lost'")
    assert [json.loads(event["data"]) for event in told] == [{"lost": 2}, {"lost": 5}]
    assert row(register)["reports_lost"] == 1  # its outbox was made anew


def test_blocked_udp_is_known_until_it_gets_through(register, device, ingest):
    for sequence, blocked in enumerate((False, True, False)):
        ingest.handle([state(device, sequence=sequence, udp_blocked=blocked)], utc_now=1.0)
        assert bool(row(register)["udp_blocked"]) is blocked
        assert devices.show(register, "cam-1")["udp_blocked"] is blocked
    ingest.handle([state(device, sequence=9, udp_blocked=True)], utc_now=1.0)
    ingest.handle([state(device, sequence=10, online=False)], utc_now=1.0)
    assert row(register)["udp_blocked"]  # a will says nothing of it


def test_a_result_said_again_is_one_event(register, device, ingest):
    """A device that lost power between saying and noting says it again, under another number."""
    for sequence, status in enumerate(
        ("in_progress", "succeeded", "succeeded", "in_progress", "failed", "failed"), start=1
    ):
        ingest.handle([report(device, sequence, status)], utc_now=1.0)
    kinds = [event["kind"] for event in register.rows("SELECT kind FROM events ORDER BY id")]
    assert kinds == [
        "execution.in_progress",
        "execution.succeeded",
        "execution.in_progress",
        "execution.failed",
    ]


def test_older_words_and_ended_epochs_do_not_count(register, device, ingest):
    def online(*messages):
        ingest.handle(messages, utc_now=1.0)
        return bool(row(register)["online"])

    assert online(state(device, epoch=5, sequence=3))
    assert online(state(device, epoch=4, sequence=9, online=False))
    assert online(state(device, epoch=5, sequence=2, waiting="old"))
    assert row(register)["waiting"] == ""
    assert not online(state(device, epoch=5, sequence=0, online=False))
    assert not online(state(device, epoch=5, sequence=99))
    assert online(state(device, epoch=6))
    ingest.reset_liveness()
    # The broker's retained copy of the newest word brings a device back after a restart of the gateway.
    assert online(state(device, epoch=6))
    assert [e["kind"] for e in register.rows("SELECT kind FROM events")] == [
        "device.online",
        "device.offline",
        "device.online",
        "device.online",
    ]


def test_only_the_registered_key_counts(register, device, ingest):
    other = Identity.generate()
    ingest.handle(
        [
            state(other),
            Incoming(Topic(Kind.STATE, "cam-1"), b"rubbish", retained=True),
            Incoming(Topic(Kind.STATE, "cam-1"), b"", retained=True),
            Incoming(Topic(Kind.REPORT, "cam-1"), b"[" * 4000, retained=False),
            Incoming(Topic(Kind.STATE, "nobody"), state(device).payload, retained=False),
            Incoming(Topic(Kind.REPORT, "cam-1"), state(device).payload, retained=False),
            state(device, device="cam-2"),
        ],
        utc_now=1.0,
    )
    assert row(register)["online"] == 0
    assert register.rows("SELECT * FROM events") == []
    assert sum(ingest.dropped.values()) == 6


def test_a_report_is_acknowledged_as_often_as_it_comes_and_counted_once(register, device, ingest):
    first = report(device, 1, step="downloading")
    done = report(device, 2, "succeeded", bytes_from_peers=7)
    batch = ingest.handle([first, done, first], utc_now=1.0)
    assert batch.acks == {("cam-1", 1): [1, 2, 1]}
    assert ingest.handle([done], utc_now=2.0).acks == {("cam-1", 1): [2]}
    [execution] = register.rows("SELECT * FROM executions")
    assert (execution["status"], json.loads(execution["counters"])["bytes_from_peers"]) == (
        "succeeded",
        7,
    )
    assert [e["kind"] for e in register.rows("SELECT kind FROM events")] == [
        "execution.downloading",
        "execution.succeeded",
    ]


def test_a_report_that_comes_late_does_not_undo_a_newer_one(register, device, ingest):
    ingest.handle([report(device, 2, "succeeded")], utc_now=1.0)
    ingest.handle([report(device, 1, step="downloading")], utc_now=2.0)
    assert register.one("SELECT status FROM executions")["status"] == "succeeded"
    assert len(register.rows("SELECT * FROM events")) == 2


def test_a_member_gone_mad_cannot_fill_the_disk(register, device, ingest, monkeypatch):
    monkeypatch.setattr("gateway.ingest.REPORTS_PER_MINUTE", 20)
    monkeypatch.setattr("gateway.ingest.MAX_STORED_REPORTS", 10)
    batch = ingest.handle([report(device, n) for n in range(50)], utc_now=1.0)
    assert batch.acks[("cam-1", 1)] == list(range(20))
    assert register.one("SELECT COUNT(*) AS n FROM reports")["n"] <= 11
    assert ingest.dropped["too many reports"] == 30


def test_progress_moves_a_number(register, device, ingest):
    ingest.handle([state(device, bundles=[held()])], utc_now=1.0)
    progress = wire.Progress(
        device="cam-1",
        transfers=[wire.TransferProgress(digest=DIGEST, pieces_have=4, pieces_total=9)],
    )
    ingest.handle(
        [Incoming(Topic(Kind.PROGRESS, "cam-1"), wire.encode(progress), retained=False)],
        utc_now=2.0,
    )
    assert register.one("SELECT pieces_have FROM device_bundles")["pieces_have"] == 4
