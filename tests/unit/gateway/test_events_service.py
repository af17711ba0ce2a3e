from edgesync.selectors import parse
from gateway.service import events
from gateway.store import GatewayStore


def test_a_reader_that_restarts_misses_none_and_doubles_none(register):
    for number in range(events.BATCH + 20):
        register.emit("operator", "token.created", f"token:{number}")
    seen = []
    after = 0
    for stop in (3, 500, 10_000):
        for count, event in enumerate(events.read(register, after=after)):
            seen.append(event["id"])
            after = event["id"]
            if count == stop:
                break
    assert seen == list(range(1, events.BATCH + 21))
    assert events.last_id(register) == seen[-1]


def test_follow_sees_what_another_process_commits(register):
    with GatewayStore.open(register.datadir) as other:
        pending = iter(["device:a", "device:b"])

        def wait(_seconds):
            other.emit("gateway", "device.joined", next(pending))

        reader = events.read(register, follow=True, wait=wait)
        assert [next(reader)["subject"], next(reader)["subject"]] == ["device:a", "device:b"]


def test_selector(register):
    register.emit("device:cam-1", "device.joined", "device:cam-1", {"token": "x"})
    register.emit("operator", "token.created", "token:x")

    def subjects(text):
        return [event["subject"] for event in events.read(register, selector=parse(text))]

    assert subjects("kind=token.created") == ["token:x"]
    assert subjects("type=device") == ["device:cam-1"]
    assert subjects("device=cam-1") == ["device:cam-1"]
    assert subjects("actor=operator,type=token") == ["token:x"]
    assert subjects("token") == ["device:cam-1", "token:x"]
