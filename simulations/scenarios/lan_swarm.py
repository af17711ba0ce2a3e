"""How fast one bundle reaches N devices of one LAN, and how many copies leave the gateway.

The bound is Kumar and Ross's: max(F/us, F/dmin, N F / (us + sum ui)). Devices may join late, be killed and resume,
lie, stall or send garbage; the gateway may be slow, or die once every piece has two holders.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgesync.ids import PeerKey
from simulations import invariants
from simulations.actors import Content, Device, Gateway, Liar, Poisoner, Staller
from simulations.kernel import Kernel
from simulations.network import Link, Network

MBIT = 125_000.0


@dataclass(frozen=True, slots=True)
class Plan:
    devices: int = 8
    pieces: int = 256
    piece_bytes: int = 65_536
    device_bytes_s: float = 20 * MBIT
    gateway_bytes_s: float = 20 * MBIT
    delay_s: float = 0.001
    loss: float = 0.0
    late: Sequence[float] = ()
    """Start times of the last devices, seconds."""
    kills: Sequence[tuple[int, float, float]] = ()
    """(device, killed at, started again at)."""
    gateway_dies_at_replication: int | None = None
    liars: int = 0
    stallers: int = 0
    poisoners: int = 0
    slow: Sequence[float] = ()
    """Uplinks of the first devices as a share of the others'."""
    degree: int = 16
    """Peers each device finds by itself."""
    until_s: float = 3_600.0


@dataclass(frozen=True, slots=True)
class Outcome:
    finished: int
    devices: int
    makespan_s: float
    median_s: float
    bound_s: float
    gateway_copies: float
    duplicates: float
    worst_share: float
    """Highest received / wire bytes of an honest device."""
    steps: int
    fingerprint: str
    seconds: tuple[float, ...] = field(default=())

    def __str__(self) -> str:
        return (
            f"{self.finished}/{self.devices} finished, last {self.makespan_s / self.bound_s:.2f}x,"
            f" median {self.median_s / self.bound_s:.2f}x of the bound ({self.bound_s:.1f} s);"
            f" gateway {self.gateway_copies:.3f} copies; duplicates {self.duplicates:.2%};"
            f" most received {self.worst_share:.3f}x; {self.steps} steps"
        )


def run(plan: Plan, seed: int) -> Outcome:
    kernel = Kernel(seed)
    network = Network(kernel)
    rng = kernel.rng("content")
    content = Content(
        tuple(
            max(1024, int(rng.expovariate(1 / (plan.piece_bytes * 0.75)) + plan.piece_bytes * 0.25))
            for _ in range(plan.pieces)
        )
    )
    network.attach("gateway", Link(plan.gateway_bytes_s, plan.gateway_bytes_s, plan.delay_s))
    gateway = Gateway(kernel, network, content)
    devices: list[Device] = []
    kinds: list[type[Device]] = [Device] * plan.devices
    kinds += [Liar] * plan.liars + [Staller] * plan.stallers + [Poisoner] * plan.poisoners
    uplinks: list[float] = []
    for number, kind in enumerate(kinds):
        share = plan.slow[number] if number < len(plan.slow) else 1.0
        link = Link(plan.device_bytes_s * share, plan.device_bytes_s, plan.delay_s, plan.loss)
        name = PeerKey(f"d{number:02}")
        network.attach(name, link)
        network.cut(name)
        device = kind(name, kernel, network, content, gateway)
        devices.append(device)
        if device.honest:
            uplinks.append(link.up_bytes_s)

    def start(device: Device) -> None:
        device.start()
        others = [other for other in devices if other is not device and other.alive]
        kernel.rng(f"degree {device.key} {kernel.now}").shuffle(others)
        for position, other in enumerate(others[: plan.degree]):
            kernel.after(0.05 + 0.02 * position, lambda other=other: device.join(other))  # type: ignore[misc]

    starts = [0.001 * number for number in range(len(devices))]
    for number in range(plan.devices, len(devices)):
        # Hostile members were there first.
        starts[number] = 0.0
    for position, late in enumerate(plan.late):
        starts[plan.devices - len(plan.late) + position] = late
    for device, at in zip(devices, starts, strict=True):
        kernel.at(at, lambda device=device: start(device))  # type: ignore[misc]
    for number, killed_at, again_at in plan.kills:
        kernel.at(killed_at, devices[number].kill)
        kernel.at(again_at, lambda device=devices[number]: start(device))  # type: ignore[misc]

    if plan.gateway_dies_at_replication is not None:
        wanted = plan.gateway_dies_at_replication

        def watch() -> None:
            replication = gateway.scheduler.min_site_replication(now=kernel.now)
            if replication is not None and replication >= wanted:
                gateway.kill()
                for device in devices:
                    if device.alive:
                        kernel.after(2.0, device.gateway_lost)
            else:
                kernel.after(0.25, watch)

        kernel.after(0.25, watch)

    honest = [device for device in devices if device.honest]
    kernel.run(
        until=plan.until_s,
        done=lambda: all(device.finished_at is not None for device in honest),
    )
    invariants.check(devices, content)
    size = content.wire_bytes
    bound = max(
        size / plan.gateway_bytes_s,
        size / plan.device_bytes_s,
        len(honest) * size / (plan.gateway_bytes_s + sum(uplinks)),
    )
    times = [
        (device.finished_at - start_at) if device.finished_at is not None else plan.until_s
        for device, start_at in zip(devices, starts, strict=True)
        if device.honest
    ]
    return Outcome(
        finished=sum(device.finished_at is not None for device in honest),
        devices=len(honest),
        makespan_s=max(times),
        median_s=statistics.median(times),
        bound_s=bound,
        gateway_copies=gateway.bytes_out / size,
        duplicates=sum(device.bytes_duplicate for device in honest) / (size * len(honest)),
        worst_share=max((d.bytes_gateway + d.bytes_peers) / size for d in honest),
        steps=kernel.steps,
        fingerprint=kernel.fingerprint,
        seconds=tuple(times),
    )


PLANS: dict[str, Plan] = {
    "clean-8": Plan(),
    "clean-16": Plan(devices=16),
    "demo-5": Plan(devices=5, pieces=1000, device_bytes_s=400 * MBIT, gateway_bytes_s=400 * MBIT),
    "throttled-4": Plan(devices=4, device_bytes_s=400 * MBIT, gateway_bytes_s=16 * MBIT),
    "late": Plan(devices=6, late=(5.0, 30.0)),
    "kills": Plan(
        devices=5, kills=((0, 2.0, 4.0), (0, 6.0, 7.0), (1, 5.0, 6.0)), device_bytes_s=40 * MBIT
    ),
    "gateway-dies": Plan(devices=5, gateway_dies_at_replication=2),
    "liar": Plan(devices=6, liars=1),
    "liar-alone": Plan(devices=1, liars=1),
    "staller": Plan(devices=6, stallers=1),
    "poisoner": Plan(devices=6, poisoners=1),
    "slow-uplinks": Plan(devices=8, slow=(0.1, 0.25, 0.25)),
    "lossy": Plan(devices=8, loss=0.02, delay_s=0.02),
    "sparse": Plan(devices=16, degree=3),
}
