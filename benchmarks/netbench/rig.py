"""A laboratory for one run: a source, its sites, the processes of a contender, and what they cost.

It knows no contender. Everything started here is stopped by ``close``, in good order first.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from benchmarks.netbench.links import Link
from simulations.netlab.forwarder import Impairment
from simulations.netlab.hosts import Child, Host, cpu_seconds
from simulations.netlab.lab import Lab

Carried = tuple[int, int]
"""Bytes at IP level: towards the devices, and from them."""


class Rig:
    """One source and its sites for one run, and a folder for what their processes write."""

    def __init__(
        self,
        lab: Lab,
        source: Host,
        sites: Sequence[Sequence[Host]],
        work: Path,
        *,
        links: Sequence[Link],
    ) -> None:
        """``links``: of the laboratory's sites, in order."""
        self.source = source
        self.sites = [list(site) for site in sites]
        self.work = work
        self._lab = lab
        self._links = links
        self._wan_before = self._counters()
        self._wan_after: list[Carried] | None = None
        self._cpu_before: dict[str, float] = {}
        self._machine_before = self._machine()
        self._machine_after: tuple[float, float, float] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for child in reversed(self.children):
            child.stop()

    @property
    def children(self) -> list[Child]:
        """Every process so far, the source's first."""
        return [child for host in (self.source, *self.devices) for child in host.children]

    @property
    def devices(self) -> list[Host]:
        return [host for site in self.sites for host in site]

    # --- the network ------------------------------------------------------------------------------------------------
    def set_tcp(self, algorithm: str) -> None:
        """Linux' congestion control for every TCP connection that starts from now on."""
        self._lab.set_tcp(algorithm)

    def set_rate(self, bit_s: float) -> None:
        """Of every thin link from now on; its queue stays the same share of rate times round trip."""
        for site, link in zip(self._lab.sites, self._links, strict=True):
            queue = dataclasses.replace(link, rate_bit_s=bit_s).queue_bytes
            site.link.set(rate=bit_s, queue=queue)

    def forwarder_pids(self) -> list[int]:
        return [site.link.pid for site in self._lab.sites]

    def _counters(self) -> list[Carried]:
        both = [site.link.counters() for site in self._lab.sites]
        return [(there.out_bytes, back.out_bytes) for there, back in both]

    # --- counting ---------------------------------------------------------------------------------------------------
    def mark(self) -> None:
        """The operator's command comes now: link bytes and processor time count from here on."""
        self._wan_before, self._wan_after = self._counters(), None
        self._machine_before, self._machine_after = self._machine(), None
        self._cpu_before = {child.name: child.cpu_s() for child in self.children}

    def stop_counting(self) -> None:
        """All is done: what closing connections costs does not count."""
        self._wan_after, self._machine_after = self._counters(), self._machine()

    def others_busy(self) -> float:
        """Share of the machine's cores that nothing of this run used, from ``mark`` to ``stop_counting``.

        The kernel's own work for packets is in it. Ask after ``close``, when all children's time is known.
        """
        after = self._machine_after or self._machine()
        took, busy, forwarded = (a - b for a, b in zip(after, self._machine_before, strict=True))
        ours = forwarded + sum(self.cpu_s().values())
        return round(max(0.0, busy - ours) / (took * (os.cpu_count() or 1)), 3)

    def _machine(self) -> tuple[float, float, float]:
        """Now; busy seconds of all cores; those of this laboratory's forwarders."""
        fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(cpu_seconds(pid) for pid in self.forwarder_pids())

    def wan_bytes(self) -> list[Carried]:
        """Carried by each thin link since ``mark``."""
        now = self._wan_after or self._counters()
        return [(n[0] - b[0], n[1] - b[1]) for n, b in zip(now, self._wan_before, strict=True)]

    def cpu_s(self) -> dict[str, float]:
        """Processor seconds of each child since ``mark``, by name; complete only after ``close``."""
        return {
            child.name: round(child.cpu_s() - self._cpu_before.get(child.name, 0.0), 2)
            for child in self.children
        }

    # --- processes --------------------------------------------------------------------------------------------------
    def folder(self, name: str) -> Path:
        path = self.work / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def spawn(
        self, host: Host, name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None
    ) -> Child:
        return host.start(name, argv, log=self.work / f"{name}.log", env=env)


@contextmanager
def behind(links: Sequence[Link], work: Path) -> Iterator[Rig]:
    """A source, and behind each link a site with its devices."""
    with Lab() as lab:
        for number, link in enumerate(links, 1):
            way = Impairment(
                rate=link.rate_bit_s,
                delay=link.rtt_s / 2,
                loss=link.loss,
                burst=link.burst or 1.0,
                queue=link.queue_bytes,
            )
            lab.add_site(f"site{number}", devices=link.devices, there=way)
        sites = [site.devices for site in lab.sites]
        yield Rig(lab, lab.source, sites, work, links=links)


@contextmanager
def on_a_lan(work: Path) -> Iterator[Rig]:
    """A source and a device on one bridge, without any impairment."""
    with Lab() as lab:
        site = lab.add_site("lan", devices=2)
        source, device = site.devices
        yield Rig(lab, source, [[device]], work, links=[Link("lan", "a LAN", 0.0, 0.0)])
