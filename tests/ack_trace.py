"""Traces of what a connection told its controller, and what the controller decided: recorded and replayed.

``python -m tests.ack_trace`` records those that are missing in ``tests/vectors/congestion`` from the link model. A
trace that exists is never written again: it holds a controller to the decisions it made then. A change that is meant to
decide otherwise removes the file, records it anew and says why.

One JSON array a line: ["sent", now, number, bytes], ["acked", now, [numbers]], ["rtt", now, rtt], ["lost", now,
[numbers]], ["expired", now, [numbers]], ["persistent", now], ["limited", now], ["end", now, window, rate, state].
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgesync.testing.link_model import Flow, LinkConfig, LinkModel, SentPacket, megabits
from edgesync.transport.congestion.base import CongestionController
from edgesync.transport.congestion.choice import make

VECTORS = Path(__file__).with_name("vectors") / "congestion"
SIZE = 1200
SEED = 7


def trace_controller(name: str) -> CongestionController:
    return make(name, max_datagram_size=SIZE, rng=random.Random(SEED))


def decision(controller: CongestionController) -> list[Any]:
    status = controller.status()
    return [controller.congestion_window, round(status.rate_bytes_s, 3), status.state]


def replay(name: str, lines: Iterable[str]) -> list[tuple[int, list[Any], list[Any]]]:
    """Line number, recorded and present decision of every ACK at which the two differ."""
    controller = trace_controller(name)
    packets: dict[int, SentPacket] = {}
    differing = []
    for number, line in enumerate(lines, 1):
        kind, now, *rest = json.loads(line)
        match kind:
            case "sent":
                packets[rest[0]] = SentPacket(rest[0], now, rest[1], 0)
                controller.on_packet_sent(packet=packets[rest[0]])
            case "acked":
                for key in rest[0]:
                    controller.on_packet_acked(now=now, packet=packets.pop(key))
            case "rtt":
                controller.on_rtt_measurement(now=now, rtt=rest[0])
            case "lost":
                controller.on_packets_lost(now=now, packets=[packets.pop(key) for key in rest[0]])
            case "expired":
                controller.on_packets_expired(packets=[packets.pop(key) for key in rest[0]])
            case "persistent":
                controller.on_persistent_congestion()
            case "limited":
                controller.on_app_limited()
            case "end":
                controller.on_ack_end(now)
                if decision(controller) != rest:
                    differing.append((number, rest, decision(controller)))
    return differing


def recorder(name: str, model: LinkModel, lines: list[str]) -> CongestionController:
    """A controller that writes down what it is told."""
    controller = trace_controller(name)
    acked: list[int] = []

    def write(*fields: Any) -> None:
        if acked and fields[0] != "acked":
            numbers, acked[:] = list(acked), []
            write("acked", fields[1], numbers)
        lines.append(json.dumps(fields, separators=(",", ":")))

    def wrap(method: str, note: Any) -> None:
        original = getattr(controller, method)

        def told(*args: Any, **kwargs: Any) -> None:
            note(*args, **kwargs)
            original(*args, **kwargs)
            if method == "on_ack_end":
                write("end", model.now, *decision(controller))

        setattr(controller, method, told)

    wrap(
        "on_packet_sent",
        lambda packet: write("sent", model.now, packet.packet_number, packet.sent_bytes),
    )
    wrap("on_packet_acked", lambda now, packet: acked.append(packet.packet_number))
    wrap("on_rtt_measurement", lambda now, rtt: write("rtt", now, rtt))
    wrap(
        "on_packets_lost",
        lambda now, packets: write("lost", now, [p.packet_number for p in packets]),
    )
    wrap(
        "on_packets_expired",
        lambda packets: write("expired", model.now, [p.packet_number for p in packets]),
    )
    wrap("on_persistent_congestion", lambda: write("persistent", model.now))
    wrap("on_app_limited", lambda: write("limited", model.now))
    wrap("on_ack_end", lambda now: acked and write("flush", now))
    return controller


def record(
    name: str, config: LinkConfig, seconds: float, *, demand: float = 0.0, outage: bool = False
) -> list[str]:
    model = LinkModel(config, seed=SEED)
    lines: list[str] = []
    Flow(model, recorder(name, model, lines), datagram_bytes=SIZE, demand_bytes_s=demand)
    if outage:
        model.outage(2.0, 3.0)
    model.run(seconds)
    return [line for line in lines if not line.startswith('["flush"')]


TRACES: dict[str, tuple[str, LinkConfig, float, dict[str, Any]]] = {
    "bbr-lossy": ("bbr", LinkConfig(megabits(2), 0.04, 20_000, loss=0.03), 8.0, {}),
    "bbr-outage": ("bbr", LinkConfig(megabits(1), 0.05, 20_000), 9.0, {"outage": True}),
    "bbr-limited": ("bbr", LinkConfig(megabits(4), 0.02, 20_000), 6.0, {"demand": 60_000.0}),
    "bbr-policer": (
        "bbr",
        LinkConfig(
            megabits(4), 0.03, 40_000, policer_bytes_s=megabits(1), policer_burst_bytes=30_000
        ),
        8.0,
        {},
    ),
    "background-clean": ("background", LinkConfig(megabits(1), 0.03, 30_000), 8.0, {}),
    "lan-overflow": ("lan", LinkConfig(megabits(4), 0.001, 15_000), 3.0, {}),
}


def main() -> None:
    VECTORS.mkdir(parents=True, exist_ok=True)
    for title, (name, config, seconds, options) in TRACES.items():
        path = VECTORS / f"{title}.jsonl"
        if not path.exists():
            path.write_text("\n".join(record(name, config, seconds, **options)) + "\n")
            print(path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
