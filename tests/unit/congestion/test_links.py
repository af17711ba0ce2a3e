"""What the controllers make of links: floors on goodput, bounds on queues, time to recover, shares.

Floors are under what is reached by a few per cent: they catch a regression, the figures are in ADR 0020.
"""

import random
from dataclasses import replace

import pytest

from edgesync.testing.link_model import Flow, LinkConfig, LinkModel, jain, megabits
from edgesync.transport.congestion.bbr import BbrController
from edgesync.transport.congestion.choice import make

SIZE = 1400
LOSSY = LinkConfig(megabits(20), 0.05, 250_000)
SEED = 3


def flows(
    link: LinkConfig, *names: str, seconds: float, apart_s: float = 0.0, **options: float
) -> tuple[LinkModel, list[Flow]]:
    model = LinkModel(link, seed=SEED)
    made = [
        Flow(
            model,
            make(name, max_datagram_size=SIZE, rng=random.Random(SEED * 100 + index)),
            start=index * apart_s,
            **options,  # type: ignore[arg-type]
        )
        for index, name in enumerate(names)
    ]
    model.run(seconds)
    return model, made


def share(flow: Flow, link: LinkConfig, start: float, end: float) -> float:
    """Of what the link can carry after its loss."""
    return flow.goodput(start, end) / (link.rate_bytes_s * (1 - link.loss))


@pytest.mark.parametrize(
    ("link", "seconds", "floor"),
    [
        pytest.param(LOSSY, 15, 0.94, id="clean"),
        pytest.param(replace(LOSSY, loss=0.01), 15, 0.93, id="1%"),
        pytest.param(replace(LOSSY, loss=0.02), 15, 0.92, id="2%"),
        pytest.param(replace(LOSSY, loss=0.05), 15, 0.90, id="5%"),
        pytest.param(replace(LOSSY, loss=0.10), 15, 0.83, id="10%"),
        pytest.param(replace(LOSSY, loss=0.02, loss_burst=3), 15, 0.92, id="2% in bursts"),
        pytest.param(replace(LOSSY, loss=0.05, loss_burst=5), 15, 0.90, id="5% in bursts"),
        pytest.param(replace(LOSSY, loss=0.02, ack_loss=0.1), 15, 0.90, id="lost ACKs"),
        pytest.param(replace(LOSSY, queue_bytes=25_000), 15, 0.90, id="10 ms queue"),
        pytest.param(replace(LOSSY, queue_bytes=1_000_000), 15, 0.94, id="4 BDP queue"),
        pytest.param(replace(LOSSY, jitter_s=0.03), 15, 0.85, id="jitter"),
        pytest.param(replace(LOSSY, reorder=0.05, reorder_s=0.001), 15, 0.90, id="reordering"),
        pytest.param(LinkConfig(megabits(20), 0.3, 1_500_000, loss=0.02), 44, 0.88, id="satellite"),
        pytest.param(LinkConfig(megabits(1), 0.05, 32_000, loss=0.01), 30, 0.93, id="1 Mbit/s"),
        pytest.param(
            LinkConfig(megabits(0.064), 1.0, 32_000, loss=0.02), 120, 0.70, id="64 kbit/s, 2 s"
        ),
        pytest.param(LinkConfig(megabits(100), 0.0005, 128_000), 2, 0.95, id="LAN"),
    ],
)
def test_goodput_from_the_first_packet_on(link: LinkConfig, seconds: float, floor: float) -> None:
    _, (flow,) = flows(link, "bbr", seconds=seconds)
    assert share(flow, link, 0, seconds) >= floor


@pytest.mark.parametrize("loss", [0.0, 0.02])
def test_alone_it_keeps_the_queue_short(loss: float) -> None:
    link = replace(LOSSY, queue_bytes=1_000_000, loss=loss)
    _, (flow,) = flows(link, "bbr", seconds=15)
    assert flow.delay(5, 15) <= 0.115


def test_a_policer_is_filled_without_wasting_much() -> None:
    link = replace(LOSSY, policer_bytes_s=megabits(8), policer_burst_bytes=60_000)
    _, (flow,) = flows(link, "bbr", seconds=20)
    assert flow.goodput(5, 20) >= 0.9 * megabits(8)
    assert flow.lost_packets <= 0.15 * flow.sent_packets


@pytest.mark.parametrize(
    ("to", "within_s"), [(megabits(5), 4.0), (megabits(40), 4.0), (megabits(80), 9.0)]
)
def test_the_rate_of_the_link_changes(to: float, within_s: float) -> None:
    model = LinkModel(LOSSY, seed=SEED)
    flow = Flow(model, make("bbr", max_datagram_size=SIZE, rng=random.Random(SEED)))
    model.change(6.0, rate_bytes_s=to)
    model.run(6.0 + within_s + 4.0)
    settled = 6.0 + within_s
    assert flow.goodput(settled, settled + 4.0) >= 0.85 * to
    if to < LOSSY.rate_bytes_s:
        # what the slower link holds of the old window has drained
        assert flow.delay(settled + 2.0, settled + 4.0) <= 0.2


@pytest.mark.parametrize("name", ["bbr", "background", "cubic", "lan"])
def test_after_an_outage_it_moves_within_the_probe_interval(name: str) -> None:
    model = LinkModel(LOSSY, seed=SEED)
    flow = Flow(model, make(name, max_datagram_size=SIZE, rng=random.Random(SEED)))
    model.outage(5.0, 5.0)
    model.run(16.0)
    first = min(at for at, _ in flow.delivered if at > 10.0)
    assert first <= 11.1
    if name == "bbr":
        assert flow.goodput(12.0, 16.0) >= 0.9 * LOSSY.rate_bytes_s


def test_what_the_application_holds_back_does_not_shrink_the_estimate() -> None:
    model = LinkModel(LOSSY, seed=SEED)
    controller = BbrController(max_datagram_size=SIZE, rng=random.Random(SEED))
    flow = Flow(model, controller)
    model.run(5)
    before = controller._bandwidth
    flow.demand = 50_000.0
    flow.start = model.now - flow._next_chunk * SIZE / flow.demand
    model.run(25)
    assert controller._bandwidth >= 0.9 * before


@pytest.mark.parametrize("queue", [1, 4])
def test_beside_cubic_neither_starves(queue: int) -> None:
    link = replace(LOSSY, queue_bytes=queue * 250_000)
    _, (ours, cubic) = flows(link, "bbr", "cubic", seconds=40)
    assert share(cubic, link, 10, 40) >= 0.2
    assert share(ours, link, 10, 40) >= 0.2


@pytest.mark.parametrize("loss", [0.01, 0.02, 0.05])
def test_a_path_with_random_loss_is_not_handed_to_cubics_window(loss: float) -> None:
    # delays that wander for seconds are what a busy machine at either end looks like
    link = replace(LOSSY, loss=loss)
    model = LinkModel(link, seed=SEED)
    controller = BbrController(max_datagram_size=SIZE, rng=random.Random(SEED))
    flow = Flow(model, controller)
    chance = random.Random(SEED)
    at = 1.0
    while at < 30.0:
        model.change(at, delay_s=chance.choice([0.05, 0.07, 0.09, 0.12]))
        at += chance.uniform(0.1, 1.5)
    states = set()
    for tenth in range(300):
        model.run(tenth / 10)
        states.add(controller.status().state)
    assert "sharing" not in states
    assert share(flow, link, 0, 30) >= 0.85


@pytest.mark.parametrize("queue", [1, 4])
def test_two_share_evenly(queue: int) -> None:
    link = replace(LOSSY, queue_bytes=queue * 250_000)
    _, made = flows(link, "bbr", "bbr", seconds=40, apart_s=2.0)
    assert jain([flow.goodput(10, 40) for flow in made]) >= 0.9
    assert sum(share(flow, link, 10, 40) for flow in made) >= 0.9


@pytest.mark.parametrize("queue", [1, 4])
def test_the_background_class_leaves_the_link_to_others(queue: int) -> None:
    link = replace(LOSSY, queue_bytes=queue * 250_000)
    _, (cubic, _) = flows(link, "cubic", "background", seconds=30, apart_s=1.0)
    assert share(cubic, link, 5, 30) >= 0.9
    _, (alone,) = flows(link, "background", seconds=20)
    assert share(alone, link, 5, 20) >= 0.8


def test_the_background_class_comes_back_when_the_other_ends() -> None:
    model = LinkModel(LOSSY, seed=SEED)
    Flow(model, make("cubic", max_datagram_size=SIZE, rng=random.Random(1)), size_bytes=20_000_000)
    ours = Flow(model, make("background", max_datagram_size=SIZE, rng=random.Random(2)))
    model.run(40)
    assert share(ours, LOSSY, 25, 40) >= 0.7


def test_loss_that_persists_closes_the_valve_and_its_end_opens_it() -> None:
    model = LinkModel(LOSSY, seed=SEED)
    controller = BbrController(max_datagram_size=SIZE, rng=random.Random(SEED))
    flow = Flow(model, controller)
    model.change(4.0, loss=0.35)
    model.change(12.0, loss=0.0)
    model.run(12.0)
    assert controller.status().yielding
    assert flow.goodput(9, 12) <= 0.5 * LOSSY.rate_bytes_s
    model.run(20.0)
    assert not controller.status().yielding
    assert flow.goodput(17, 20) >= 0.9 * LOSSY.rate_bytes_s


def test_a_shared_cap_holds_for_all_and_is_shared() -> None:
    from edgesync.transport.congestion import RateLimiter

    model = LinkModel(LOSSY, seed=SEED)
    site = RateLimiter(500_000)
    made = []
    for index in range(3):
        controller = make("bbr", max_datagram_size=SIZE, rng=random.Random(index))
        controller.pacer.set_limiters((site,))
        made.append(Flow(model, controller))
    model.run(20)
    moved = [flow.goodput(5, 20) for flow in made]
    assert 0.9 * 500_000 <= sum(moved) <= 1.05 * 500_000
    assert jain(moved) >= 0.95


def test_the_same_seed_gives_the_same_packets() -> None:
    link = replace(LOSSY, loss=0.03, jitter_s=0.01)
    _, (one,) = flows(link, "bbr", seconds=3)
    _, (other,) = flows(link, "bbr", seconds=3)
    assert one.delivered == other.delivered
