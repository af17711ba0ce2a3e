"""No order of callbacks makes a controller raise, or its window and rate leave their bounds."""

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesync import limits
from edgesync.testing.link_model import SentPacket
from edgesync.transport.congestion import create_controller
from edgesync.transport.congestion.choice import SETTINGS

SIZE = 1200
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["send", "ack", "lose", "expire", "rtt", "end", "limited", "persist", "path", "resize"]
            + ["cap", "window", "choose"]
        ),
        st.integers(0, 200),
        st.sampled_from([0.0, 1e-9, 1e-4, 0.003, 0.02, 0.1, 0.7, 5.0, 4000.0]),
    ),
    max_size=80,
)


def step(
    path: Any, flight: list[SentPacket], kind: str, number: int, value: float, now: float
) -> None:
    some = flight[: number % 40]
    match kind:
        case "send":
            burst = [SentPacket(index, now, SIZE, 0) for index in range(number % 60)]
            flight.extend(burst)
            path.on_burst_sent(burst)
            path.pacer.sent(len(burst) * SIZE)
        case "ack":
            del flight[: len(some)]
            path.on_burst_acked(some, now)
        case "lose":
            del flight[: len(some)]
            path.on_packets_lost(now=now, packets=some)
        case "expire":
            del flight[: len(some)]
            path.on_packets_expired(packets=iter(some))
        case "rtt":
            path.on_rtt_measurement(now=now, rtt=value)
            path.pacer.update_rate(congestion_window=path.congestion_window, smoothed_rtt=value)
        case "end":
            path.on_ack_end(now)
        case "limited":
            path.on_app_limited()
        case "persist":
            path.on_persistent_congestion()
        case "path":
            path.on_path_change(now)
        case "resize":
            path.resize(1200 + number * 40)
        case "cap":
            path.set_rate_cap(value * 1000)
        case "window":
            path.set_window_cap(number * 1000)
        case "choose" if path.setting not in {"cubic", "reno"}:
            path.choose(["auto", "bbr", "lan", "background"][number % 4], now)


@pytest.mark.parametrize("setting", SETTINGS)
@settings(max_examples=25, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 1000))
def test_window_and_rate_stay_within_bounds(
    setting: str, steps: list[tuple[str, int, float]], seed: int
) -> None:
    path = create_controller(setting, max_datagram_size=SIZE, rng=random.Random(seed))
    flight: list[SentPacket] = []
    now = 1.0
    for kind, number, value in steps:
        now += value
        step(path, flight, kind, number, value, now)
        assert path.bytes_in_flight >= 0
        assert path.congestion_window >= 2 * SIZE or path.inner.window_cap_bytes
        status = path.status()
        assert math.isfinite(status.rate_bytes_s)
        assert status.rate_bytes_s >= 0.0
        if setting not in {"cubic", "reno"}:
            assert path.bytes_in_flight == sum(packet.sent_bytes for packet in flight)
            assert path.congestion_window <= max(limits.MAX_PATH_WINDOW_BYTES, 8 * 9200)
            assert status.rate_bytes_s <= limits.MAX_PATH_RATE_BYTES_S
        quota = path.pacer.quota(now)
        at = path.pacer.next_send(now, 10)
        assert quota >= 0
        assert at is None or at > now
        assert quota or at is not None


@settings(max_examples=20, deadline=None)
@given(
    early=st.floats(0.0, 0.999),
    bytes_each=st.sampled_from([1200, 9000]),
    rounds=st.integers(10, 200),
)
def test_acknowledging_early_shows_no_more_than_was_sent(
    early: float, bytes_each: int, rounds: int
) -> None:
    """A peer that acknowledges what has not arrived: the estimate stays at what left, whatever the ACKs claim."""
    path = create_controller("bbr", max_datagram_size=bytes_each, rng=random.Random(1))
    path.set_rate_cap(1_000_000)
    now = 1.0
    number = 0
    for _ in range(rounds):
        burst = []
        for _ in range(10):
            packet = SentPacket(number, now, bytes_each, 0)
            number += 1
            path.on_packet_sent(packet=packet)  # type: ignore[arg-type]
            burst.append(packet)
            now += bytes_each / 1_000_000
        at = now + 0.1 * (1.0 - early)
        path.on_burst_acked(burst, at)  # type: ignore[arg-type]
        path.on_rtt_measurement(now=at, rtt=at - burst[-1].sent_time)
        path.on_ack_end(at)
    assert path.inner._bandwidth <= 1.15 * 1_000_000
