import pytest

from edgesync import assignment, selectors
from edgesync.errors import (
    ConflictError,
    NotFoundError,
    RolloutFailedError,
    UsageError,
    WaitTimeoutError,
)
from edgesync.storage.datadir import DataDir
from gateway import certificates, fleet
from gateway.service import assignments, setup
from gateway.store import GatewayStore

NOW = 1.7e9


@pytest.fixture
def register(tmp_path):
    setup.init(
        tmp_path / "gw", name="acme", advertise=["gw"], region="eu", threshold=(1, 1), utc_now=NOW
    )
    with GatewayStore.open(DataDir.open(tmp_path / "gw", "gateway")) as store:
        repository = setup.repository(store)
        for version, hardware in (("1", ()), ("2", ())):
            repository.publish(
                "files", "app", version, f"{version}" * 64, 100, hardware=hardware, utc_now=NOW
            )
        repository.publish(
            "firmware", "fw", "1", "a" * 64, 200, hardware=("pi4", "pi5"), utc_now=NOW
        )
        yield store


def read_set(store, device_id, floor=0):
    row = store.one("SELECT * FROM assignment_sets WHERE device_id = ?", (device_id,))
    key = store.one("SELECT key FROM devices WHERE id = ?", (device_id,))["key"]
    return assignment.verify(
        row["envelope"],
        keys=(certificates.load_assign_key(store.datadir.online).key,),
        fleet=fleet.load(store).fleet_id,
        device_id=device_id,
        device_key=key,
        floor_sequence=floor,
        utc_now=NOW,
    )


def names(found):
    return [(entry.name, entry.version) for entry in found.entries]


def test_assign_signs_one_set_per_device(register, add_device):
    add_device("cam-1")
    add_device("cam-2")
    add_device("cam-3", state="pending")
    made = assignments.assign(register, "app", None, everything=True, utc_now=NOW)
    assert (made.version, made.devices, made.changed) == (
        "2",
        ["cam-1", "cam-2"],
        ["cam-1", "cam-2"],
    )
    first = read_set(register, "cam-1")
    assert names(first) == [("app", "2")]
    assert (first.entries[0].target_hash, first.entries[0].target_length) == ("2" * 64, 100)
    assert (first.sequence, first.expires) == (int(NOW * 1000), NOW + assignment.LIFETIME_S)
    # The same again changes nothing and keeps the assignment's id.
    again = assignments.assign(register, "app", "2", everything=True, utc_now=NOW + 1)
    assert (again.devices, again.changed) == (["cam-1", "cam-2"], [])
    assert read_set(register, "cam-1") == first
    # Another version replaces it, even when the clock went back.
    assignments.assign(register, "app", "1", ids=["cam-1"], utc_now=NOW - 500)
    second = read_set(register, "cam-1")
    assert (names(second), second.sequence) == ([("app", "1")], first.sequence + 1)
    assert names(read_set(register, "cam-2")) == [("app", "2")]


def test_hardware_must_fit(register, add_device):
    add_device("cam-1", hardware="pi4")
    add_device("cam-2", hardware="x86")
    add_device("cam-3")
    made = assignments.assign(register, "fw", "1", everything=True, utc_now=NOW)
    assert made.devices == ["cam-1"]
    assert made.skipped == [
        ("cam-2", "the bundle is for pi4, pi5, it has x86"),
        ("cam-3", "the bundle is for pi4, pi5, it has no hardware type"),
    ]
    with pytest.raises(ConflictError, match="does not fit cam-2"):
        assignments.assign(register, "fw", "1", ids=["cam-1", "cam-2"], utc_now=NOW)


def test_a_selection_of_nobody_is_said(register, add_device):
    add_device("cam-1", hardware="x86")
    with pytest.raises(NotFoundError, match=r"no accepted device matches.*cam-1"):
        assignments.assign(register, "fw", "1", everything=True, utc_now=NOW)
    nobody = selectors.parse("site=nowhere")
    with pytest.raises(NotFoundError, match="no accepted device matches"):
        assignments.assign(register, "app", "1", selector=nobody, utc_now=NOW)
    made = assignments.assign(register, "fw", "1", everything=True, follow=True, utc_now=NOW)
    assert made.devices == []


def test_what_is_not_there(register, add_device):
    add_device("cam-1")
    with pytest.raises(NotFoundError, match="nothing@1 is not published"):
        assignments.assign(register, "nothing", "1", everything=True, utc_now=NOW)
    with pytest.raises(NotFoundError, match="no device 'cam-9'"):
        assignments.assign(register, "app", "1", ids=["cam-9"], utc_now=NOW)
    with pytest.raises(UsageError):
        assignments.assign(register, "app", "1", utc_now=NOW)
    with pytest.raises(NotFoundError, match="assigned to no device"):
        assignments.unassign(register, "app", None, everything=True, utc_now=NOW)
    assert register.rows("SELECT * FROM assignment_sets") == []


def test_unassign_is_a_higher_set_without_it(register, add_device):
    add_device("cam-1", hardware="pi4")
    assignments.assign(register, "app", "1", everything=True, utc_now=NOW)
    assignments.assign(register, "fw", "1", everything=True, utc_now=NOW)
    before = read_set(register, "cam-1")
    with pytest.raises(NotFoundError, match="app@2 is assigned to no device"):
        assignments.unassign(register, "app", "2", ids=["cam-1"], utc_now=NOW)
    assert assignments.unassign(register, "app", None, ids=["cam-1"], utc_now=NOW) == ["cam-1"]
    after = read_set(register, "cam-1", floor=before.sequence + 1)
    assert names(after) == [("fw", "1")]


def test_standing_rules_reach_devices_that_join_later(register, add_device):
    assignments.assign(
        register,
        "app",
        "1",
        selector=selectors.parse("site=lab"),
        selector_text="site=lab",
        follow=True,
        utc_now=NOW,
    )
    assignments.assign(register, "fw", None, everything=True, follow=True, utc_now=NOW)
    add_device("cam-1", labels='{"site": "lab"}', hardware="pi4")
    add_device("cam-2", labels='{"site": "roof"}')
    assert assignments.follow(register, ["cam-1", "cam-2"], utc_now=NOW) == 2
    assert names(read_set(register, "cam-1")) == [("app", "1"), ("fw", "1")]
    # A device no rule meets gets an empty set: it knows that it was not forgotten.
    assert names(read_set(register, "cam-2")) == []
    # What an operator gave a device under that name stays.
    assignments.assign(register, "app", "2", ids=["cam-2"], utc_now=NOW)
    register.db.conn.execute("UPDATE devices SET labels = '{\"site\": \"lab\"}' WHERE id = 'cam-2'")
    register.db.conn.commit()
    assert assignments.follow(register, ["cam-2"], utc_now=NOW) == 0
    assert names(read_set(register, "cam-2")) == [("app", "2")]
    # Saying a rule again replaces it; --all ends those of the bundle.
    assignments.assign(
        register,
        "app",
        "2",
        selector=selectors.parse("site=lab"),
        selector_text="site=lab",
        follow=True,
        utc_now=NOW,
    )
    assert [(r["name"], r["version"]) for r in assignments.rules(register)] == [
        ("fw", "1"),
        ("app", "2"),
    ]
    assignments.unassign(register, "app", None, everything=True, utc_now=NOW)
    assert [rule["name"] for rule in assignments.rules(register)] == ["fw"]


def test_sets_are_renewed_at_half_life(register, add_device):
    add_device("cam-1")
    assignments.assign(register, "app", "1", everything=True, utc_now=NOW)
    before = read_set(register, "cam-1")
    assert assignments.renew(register, utc_now=NOW + assignment.LIFETIME_S / 2 - 1) == 0
    assert assignments.renew(register, utc_now=NOW + assignment.LIFETIME_S / 2) == 1
    after = read_set(register, "cam-1")
    assert after.sequence > before.sequence
    assert after.expires > before.expires
    assert after.entries == before.entries


def test_a_set_has_room_for_so_many(register, add_device, monkeypatch):
    monkeypatch.setattr("edgesync.limits.MAX_ASSIGNMENT_ENTRIES", 1)
    add_device("cam-1", hardware="pi4")
    assignments.assign(register, "app", "1", everything=True, utc_now=NOW)
    with pytest.raises(ConflictError, match="would have 2 bundles"):
        assignments.assign(register, "fw", "1", everything=True, utc_now=NOW)
    assert names(read_set(register, "cam-1")) == [("app", "1")]
    assert len(register.rows("SELECT * FROM assignments")) == 1


def test_wait_follows_what_it_assigned(register, add_device):
    """The same name and version may come to mean other bytes, and the same bytes another assignment."""
    for name in ("cam-1", "cam-2", "cam-3"):
        add_device(name)

    def holds(device_id, digest):
        register.db.conn.execute(
            "INSERT INTO device_bundles (device_id, name, version, kind, digest, state, reason, pieces_have, "
            "pieces_total, updated) VALUES (?, 'app', '1', 'files', ?, 'succeeded', '', 1, 1, 0)",
            (device_id, digest),
        )
        register.db.conn.commit()

    made = assignments.assign(register, "app", "1", everything=True, utc_now=NOW)
    holds("cam-1", "9" * 64)  # other bytes under this name, from before
    holds("cam-2", "1" * 64)
    with pytest.raises(WaitTimeoutError, match="2 of 3 devices do not have app@1"):
        assignments.wait(register, made, timeout_s=0)
    assignments.unassign(register, "app", None, ids=["cam-3"], utc_now=NOW + 1)
    assignments.assign(register, "app", "1", ids=["cam-3"], utc_now=NOW + 2)
    register.db.conn.execute("UPDATE device_bundles SET digest = ?", ("1" * 64,))
    register.db.conn.commit()
    outcome = assignments.wait(register, made, timeout_s=None)
    assert outcome == {"succeeded": ["cam-1", "cam-2"], "failed": [], "superseded": ["cam-3"]}
    # Assigned again: who has it already keeps the older assignment and counts.
    holds("cam-3", "1" * 64)
    again = assignments.assign(register, "app", "1", everything=True, utc_now=NOW + 3)
    assert again.changed == []
    assert assignments.wait(register, again, timeout_s=0)["succeeded"] == again.devices


def test_wait(register, add_device):
    for name in ("cam-1", "cam-2", "cam-3"):
        add_device(name)
    made = assignments.assign(register, "app", "1", everything=True, utc_now=NOW)
    seen = []

    def execution(device_id, status):
        register.db.conn.execute(
            "INSERT INTO executions VALUES (?, 'files', 'app', '1', ?, ?, '', '', 0, 0, 0, 0, '{}')",
            (device_id, made.assignment_id, status),
        )
        register.db.conn.commit()

    steps = iter(
        [
            lambda: execution("cam-1", "succeeded"),
            lambda: assignments.assign(register, "app", "2", ids=["cam-2"], utc_now=NOW),
            lambda: execution("cam-3", "failed"),
        ]
    )
    outcome = assignments.wait(
        register,
        made,
        timeout_s=None,
        progress=lambda done, total: seen.append((done, total)),
        sleep=lambda _s: next(steps)(),
    )
    assert outcome == {"succeeded": ["cam-1"], "failed": ["cam-3"], "superseded": ["cam-2"]}
    assert seen[0] == (0, 3)
    with pytest.raises(RolloutFailedError, match=r"app@1 failed on 1 of 3 devices: cam-3"):
        assignments.judge(made, outcome)
    assignments.judge(made, None)
    ticks = iter(range(100))
    other = assignments.assign(register, "app", "2", everything=True, utc_now=NOW)
    with pytest.raises(WaitTimeoutError, match="3 of 3 devices do not have app@2 after 5 s"):
        assignments.wait(
            register, other, timeout_s=5, sleep=lambda _s: None, clock=lambda: float(next(ticks))
        )
