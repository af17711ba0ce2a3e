"""Is the laboratory what it says? Each impairment asked for, and what ping and iperf3 saw.

The tolerance of each row is stated; a row outside it makes the command fail. Needs root, ping and iperf3.
"""

import itertools
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from simulations.netlab.forwarder import Impairment
from simulations.netlab.hosts import Host, LabError, cpu_seconds
from simulations.netlab.lab import Lab, Site

MBIT = 1e6
_RTT = re.compile(r"time=([\d.]+) ms")
_SEQUENCE = re.compile(r"icmp_seq=(\d+)")


@dataclass(frozen=True)
class Row:
    what: str
    asked: float
    measured: float
    tolerance: float
    """Share of what was asked (absolute where 0 was asked)."""

    @property
    def holds(self) -> bool:
        off = abs(self.measured - self.asked)
        return off <= (self.tolerance * self.asked if self.asked else self.tolerance)


@contextmanager
def linked(there: Impairment, back: Impairment | None = None) -> Iterator[tuple[Lab, Site, Host]]:
    with Lab(seed=7) as lab:
        site = lab.add_site("site", devices=1, there=there, back=back)
        yield lab, site, site.devices[0]


def ping(
    host: Host, target: str, *, count: int, interval: float = 0.01, size: int = 56
) -> list[tuple[int, float]]:
    """(sequence number, milliseconds) of each answer, in the order they came."""
    done = subprocess.run(
        host.inside(
            [
                "ping",
                "-n",
                "-c",
                str(count),
                "-i",
                str(interval),
                "-s",
                str(size),
                "-W",
                "3",
                target,
            ]
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise LabError(f"ping: {done.stderr.strip() or done.stdout.strip()}")
    found = []
    for line in done.stdout.splitlines():
        rtt, sequence = _RTT.search(line), _SEQUENCE.search(line)
        if rtt and sequence:
            found.append((int(sequence[1]), float(rtt[1])))
    return found


def iperf(server: Host, client: Host, *arguments: str) -> dict[str, Any]:
    """The client's report, as iperf3 prints it; the client sends to the server."""
    listening = subprocess.Popen(
        server.inside(["iperf3", "--server", "--one-off"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        for _ in range(100):
            if ":5201" in server.call("ss", "-ltn"):
                break
            time.sleep(0.05)
        report: dict[str, Any] = json.loads(
            client.call("iperf3", "--json", "--client", server.address, *arguments)
        )
    finally:
        listening.kill()
        listening.communicate()
    if "error" in report:
        raise LabError(f"iperf3: {report['error']}")
    return report


def flood(
    lab: Lab, device: Host, rate: float, *, seconds: float = 3, size: int = 1400
) -> dict[str, Any]:
    """UDP from the source to the device at ``rate`` bits per second of payload; the receiver's sum."""
    arguments = ("--udp", "--bitrate", f"{rate:.0f}", "--length", str(size), "--time", str(seconds))
    summary: dict[str, Any] = iperf(device, lab.source, *arguments)["end"]["sum"]
    return summary


def delay() -> Iterator[Row]:
    with linked(Impairment(delay=0.05), Impairment(delay=0.02)) as (lab, _site, device):
        times = [rtt for _, rtt in ping(lab.source, device.address, count=100)]
        yield Row("delay of 50 ms there, 20 ms back: RTT, ms", 70, statistics.median(times), 0.02)


def jitter() -> Iterator[Row]:
    with linked(Impairment(delay=0.05, jitter=0.02), Impairment()) as (lab, _site, device):
        times = [rtt for _, rtt in ping(lab.source, device.address, count=1000, interval=0.02)]
        yield Row("jitter of 20 ms: range of RTT, ms", 40, max(times) - min(times), 0.15)
        yield Row("the same: mean RTT, ms", 50, statistics.mean(times), 0.1)


def rate() -> Iterator[Row]:
    for asked in (1 * MBIT, 20 * MBIT, 100 * MBIT):
        with linked(Impairment(rate=asked, delay=0.01, queue=64_000)) as (lab, site, device):
            before = site.link.counters()[0]
            flood(lab, device, 1.8 * asked, size=1400)
            sent = site.link.counters()[0].out_bytes - before.out_bytes
            # the queue goes on for a moment after the sender stopped
            seconds = 3 + 64_000 * 8 / asked
            yield Row(
                f"rate of {asked / MBIT:.0f} Mbit/s: IP bytes carried, Mbit/s",
                asked / MBIT,
                sent * 8 / seconds / MBIT,
                0.04,
            )


def loss() -> Iterator[Row]:
    for share, burst in ((0.01, 1.0), (0.05, 1.0), (0.02, 3.0)):
        with linked(Impairment(loss=share, burst=burst), Impairment()) as (lab, site, device):
            flood(lab, device, 40 * MBIT, seconds=4)
            seen = site.link.counters()[0]
            name = "random" if burst == 1 else f"in bursts of {burst:.0f}"
            yield Row(
                f"loss of {share:.0%}, {name}: share lost",
                share,
                seen.lost / seen.in_packets,
                0.20,
            )


def bursts() -> Iterator[Row]:
    with linked(Impairment(loss=0.05, burst=4), Impairment()) as (lab, _site, device):
        came = {
            sequence for sequence, _ in ping(lab.source, device.address, count=4000, interval=0.002)
        }
        runs, length = [], 0
        for sequence in range(1, 4001):
            if sequence in came:
                if length:
                    runs.append(length)
                length = 0
            else:
                length += 1
        yield Row("bursts of 4: mean packets lost in a row", 4, statistics.mean(runs), 0.35)


def reordering() -> Iterator[Row]:
    late = Impairment(delay=0.01, reorder=0.1, reorder_by=0.045)
    with linked(late, Impairment()) as (lab, _site, device):
        order = [
            sequence for sequence, _ in ping(lab.source, device.address, count=1000, interval=0.01)
        ]
        overtaken = sum(1 for a, b in itertools.pairwise(order) if b < a)
        yield Row("reordering of 10 %: share overtaken", 0.1, overtaken / len(order), 0.3)


def queue() -> Iterator[Row]:
    with linked(Impairment(rate=10 * MBIT, queue=125_000)) as (lab, _site, device):
        pings: list[float] = []
        with subprocess.Popen(
            lab.source.inside(["ping", "-n", "-i", "0.05", "-c", "60", device.address]),
            stdout=subprocess.PIPE,
            text=True,
        ) as pinging:
            flood(lab, device, 20 * MBIT, seconds=3)
            out, _ = pinging.communicate()
        pings = [float(found[1]) for found in _RTT.finditer(out)]
        yield Row("queue of 125 kB at 10 Mbit/s: highest RTT, ms", 100, max(pings), 0.08)


def large_packets() -> Iterator[Row]:
    with linked(Impairment(mtu=1300), Impairment()) as (lab, _site, device):
        yield Row(
            "packets of 1300 bytes through an MTU of 1300: share",
            1,
            len(ping(lab.source, device.address, count=20, size=1272)) / 20,
            0.0,
        )
        yield Row(
            "packets of 1301 bytes: share",
            0,
            len(ping(lab.source, device.address, count=20, size=1273)) / 20,
            0.0,
        )


def outage() -> Iterator[Row]:
    with linked(Impairment(delay=0.005)) as (lab, site, device):
        site.link.set(down=1)
        yield Row(
            "answers while the link is down", 0, len(ping(lab.source, device.address, count=20)), 0
        )
        site.link.set(down=0)
        yield Row("answers after it", 20, len(ping(lab.source, device.address, count=20)), 0)


def capacity() -> Iterator[Row]:
    """Both directions at once at 100 Mbit/s and 20,000 packets/s each: what the forwarder itself loses and costs."""
    with linked(Impairment(rate=200 * MBIT, delay=0.01, queue=1_000_000)) as (lab, site, device):
        before = cpu_seconds(site.link.pid)
        with subprocess.Popen(
            device.inside(["iperf3", "--server", "--one-off"]), stdout=subprocess.DEVNULL
        ):
            time.sleep(0.5)
            arguments = ("--udp", "--bidir", "--bitrate", "100M", "--length", "597", "--time", "4")
            lab.source.call("iperf3", "--client", device.address, *arguments)
        there, back = site.link.counters()
        for name, counters in (("there", there), ("back", back)):
            yield Row(
                f"both ways at once, {name}: packets/s",
                100 * MBIT / 8 / 597,
                counters.out_packets / 4,
                0.1,
            )
        yield Row(
            "the same: share of packets dropped",
            0,
            (there.overflowed + back.overflowed) / (there.in_packets + back.in_packets),
            0.001,
        )
        yield Row(
            "the same: the forwarder's share of a core, at most",
            0.0,
            (cpu_seconds(site.link.pid) - before) / 4,
            0.8,
        )


CHECKS: tuple[Callable[[], Iterator[Row]], ...] = (
    delay,
    jitter,
    rate,
    loss,
    bursts,
    reordering,
    queue,
    large_packets,
    outage,
    capacity,
)


def verify() -> bool:
    """Print a row for each impairment; False when one is off."""
    good = True
    print(f"{'':2}{'impairment':62}{'asked':>10}{'measured':>12}{'tolerance':>11}")
    for check in CHECKS:
        for row in check():
            good = good and row.holds
            tolerance = f"{row.tolerance:.0%}" if row.asked else f"{row.tolerance:g}"
            mark = " " if row.holds else "!"
            print(
                f"{mark:2}{row.what:62}{row.asked:>10.4g}{row.measured:>12.4g}{tolerance:>11}",
                flush=True,
            )
    return good
