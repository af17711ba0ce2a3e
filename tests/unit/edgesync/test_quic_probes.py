"""Datagrams of a wanted size: probes that arrive and that do not, and a size that changes in mid-transfer."""

import itertools
from typing import Any

import pytest

from edgesync.transport.fast.sending import FastQuicConnection
from tests.differential import Play, Story, tell

SIZES = (1200, 1280, 1452, 8900)


def settled_pair(
    window: int = 400_000, **changes: Any
) -> tuple[Play, FastQuicConnection, FastQuicConnection]:
    story = tell(0)
    quiet = Story(
        **{
            **vars(story),
            "loss": 0.0,
            "duplication": 0.0,
            "reordering": 0.0,
            "datagram": 1200,
            "window": window,
            "sends": [],
            "key_updates": {},
            "rebind_at": None,
            "change_id_at": None,
            **changes,
        }
    )
    play = Play(quiet, ("fast", "fast"))
    play.ping_at = 1e9
    advance(play, lambda: all(q._handshake_confirmed for q in play.sides.values()))
    advance(play, lambda: not play.wire)
    client, server = play.sides.values()
    return play, client, server


def advance(play: Play, until: Any, most: int = 20_000) -> None:
    for side in play.sides:
        play._transmit(side)
    for _ in range(most):
        if until():
            return
        timers = [q.get_timer() for q in play.sides.values() if q._network_paths]
        play.now = max(play.now + 1e-6, min([*timers, *(item[0] for item in play.wire[:1])]))
        play._arrive()
        for side, quic in play.sides.items():
            timer = quic.get_timer() if quic._network_paths else None
            if timer is not None and timer <= play.now:
                quic.handle_timer(play.now)
            play._events(side)
            play._transmit(side)
    raise AssertionError("it did not come to that")


@pytest.mark.parametrize("size", SIZES)
def test_a_probe_that_arrives(size: int) -> None:
    play, client, _ = settled_pair()
    told: list[tuple[int, bool]] = []
    client.probe_done = lambda size, arrived: told.append((size, arrived))
    window = client.controller.congestion_window
    client.send_probe(size)
    play._transmit("client")
    assert [len(item[3]) for item in play.wire] == [size]
    advance(play, lambda: told)
    assert told == [(size, True)]
    assert client.controller.bytes_in_flight == 0
    assert client.controller.congestion_window >= window


def test_a_probe_that_is_lost_is_no_congestion() -> None:
    play, client, _ = settled_pair()
    told: list[tuple[int, bool]] = []
    client.probe_done = lambda size, arrived: told.append((size, arrived))
    window = client.controller.congestion_window
    client.send_probe(8900)
    play._transmit("client")
    play.wire.clear()
    advance(play, lambda: told)
    assert told == [(8900, False)]
    assert client.controller.congestion_window >= window
    assert client.controller.bytes_in_flight >= 0


def test_the_size_changes_in_mid_transfer() -> None:
    play, client, server = settled_pair()
    body = bytes(range(256)) * 1000
    server.send_stream_data(1, body, end_stream=True)
    got = 0
    sizes: list[int] = []
    seen: set[int] = set()
    for size in (1452, 8900, 1200):
        server.set_datagram_size(size)
        sizes.append(size)
        goal = got + 60_000

        def reached(goal: int = goal) -> bool:
            seen.update(len(item[3]) for item in play.wire if item[2] == "client")
            reading = play.read.get(("client", 1))
            return reading is not None and reading.count >= goal

        advance(play, reached)
        got = play.read["client", 1].count
    advance(play, lambda: play.read["client", 1].end == "fin")
    assert play.read["client", 1].count == len(body)
    assert set(sizes) <= seen
    assert max(seen) == 8900
    del client


def test_a_window_smaller_than_a_datagram_is_no_dead_end() -> None:
    play, _, server = settled_pair()
    server.set_datagram_size(8900)
    server.controller.set_window_cap(2400)
    server.send_stream_data(1, bytes(50_000), end_stream=True)
    advance(play, lambda: ("client", 1) in play.read and play.read["client", 1].end == "fin")
    assert play.read["client", 1].count == 50_000


def test_a_silent_peer_is_probed_every_second() -> None:
    play, client, _ = settled_pair()
    client.send_stream_data(0, b"x" * 1000)
    sent: list[float] = []
    play.cut = True

    def note() -> bool:
        at = client._loss._time_of_last_sent_ack_eliciting_packet
        if not sent or sent[-1] != at:
            sent.append(at)
        return len(sent) > 8

    advance(play, note)
    pauses = [later - earlier for earlier, later in itertools.pairwise(sent)]
    assert max(pauses) <= 1.001
