"""A laboratory: a source, a wide-area network, and sites behind impaired links.

    source ── wan ══ link ══ router ── LAN (a bridge: multicast works) ── devices
                 ══ link ══ router ── …

The double lines are forwarder processes; in its direction ``there`` a link carries what goes to the site. With ``nat``
the router hides its LAN behind its own address. ``close`` removes everything; what a killed run left is removed when
the next one begins.
"""

import itertools
import os
from dataclasses import dataclass
from typing import Final, Self

from simulations.netlab.forwarder import Counters, Forwarder, Impairment
from simulations.netlab.hosts import (
    PREFIX,
    Host,
    LabError,
    make_host,
    need_root,
    remove_left_behind,
    remove_namespace,
)

SOURCE_ADDRESS: Final = "10.77.0.2"
MAX_SITES: Final = 50
MAX_DEVICES: Final = 200
_RUNS = itertools.count()


@dataclass
class Site:
    """One LAN behind one link."""

    name: str
    number: int
    router: Host
    link: Forwarder
    devices: list[Host]
    nat: bool
    moved: int = 0

    @property
    def subnet(self) -> str:
        return f"10.78.{self.number}"


class Lab:
    """Raises LabError: not root, no compiler, a tool is missing."""

    def __init__(self, *, seed: int = 1) -> None:
        need_root()
        remove_left_behind()
        self._run = f"{PREFIX}{os.getpid()}-{next(_RUNS)}"
        self._seed = seed
        self._namespaces: list[str] = []
        self.sites: list[Site] = []
        try:
            self.wan = self._host("wan")
            self.wan.call("sysctl", "-qw", "net.ipv4.ip_forward=1")
            self.source = self._host("source")
            self._join(self.source, "e0", self.wan, "source")
            self.wan.ip("addr", "add", "10.77.0.1/24", "dev", "source")
            self._address(self.source, f"{SOURCE_ADDRESS}/24", via="10.77.0.1")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for site in self.sites:
            site.link.close()
        for namespace in reversed(self._namespaces):
            remove_namespace(namespace)
        self._namespaces.clear()

    # --- building

    def add_site(
        self,
        name: str,
        *,
        devices: int | list[str],
        there: Impairment | None = None,
        back: Impairment | None = None,
        mtu: int = 1500,
        nat: bool = False,
    ) -> Site:
        """A LAN of devices behind a link; ``back`` is as ``there`` if not given, ``mtu`` is the routers'."""
        number = len(self.sites) + 1
        names = (
            [f"{name}-{n}" for n in range(1, devices + 1)] if isinstance(devices, int) else devices
        )
        if number > MAX_SITES or len(names) > MAX_DEVICES:
            raise LabError(f"a laboratory has at most {MAX_SITES} sites of {MAX_DEVICES} devices")
        router = self._host(f"{name}-router")
        router.call("sysctl", "-qw", "net.ipv4.ip_forward=1")
        link = Forwarder(
            self.wan, f"site{number}", router, "wan", seed=self._seed * MAX_SITES + number
        )
        site = Site(name, number, router, link, [], nat)
        self.sites.append(site)
        link.set(there or Impairment(), back or there or Impairment())
        net = f"10.79.{number}"
        for host, device, address in ((self.wan, f"site{number}", 1), (router, "wan", 2)):
            host.ip("addr", "add", f"{net}.{address}/24", "dev", device)
            host.ip("link", "set", device, "mtu", str(mtu), "up")
        router.ip("route", "add", "default", "via", f"{net}.1")
        router.address = f"{net}.2"
        router.ip("link", "add", "lan", "type", "bridge")
        router.ip("addr", "add", f"{site.subnet}.1/24", "dev", "lan")
        router.ip("link", "set", "lan", "up")
        if nat:
            self._hide(router)
        else:
            self.wan.ip("route", "add", f"{site.subnet}.0/24", "via", f"{net}.2")
        for position, device_name in enumerate(names):
            host = self._host(device_name)
            port = f"d{position}"
            self._join(host, "e0", router, port)
            router.ip("link", "set", port, "master", "lan")
            self._address(host, f"{site.subnet}.{10 + position}/24", via=f"{site.subnet}.1")
            site.devices.append(host)
        return site

    def _host(self, name: str) -> Host:
        namespace = f"{self._run}-{len(self._namespaces)}"
        self._namespaces.append(namespace)
        return make_host(name, namespace)

    @staticmethod
    def _join(one: Host, device: str, two: Host, other: str) -> None:
        """A cable between two hosts."""
        one.ip(
            *("link", "add", device, "type", "veth"),
            *("peer", "name", other, "netns", two.namespace),
        )
        one.ip("link", "set", device, "up")
        two.ip("link", "set", other, "up")
        one.interface = device

    @staticmethod
    def _address(host: Host, address: str, *, via: str) -> None:
        host.ip("addr", "add", address, "dev", host.interface)
        host.ip("route", "replace", "default", "via", via)
        host.address = address.split("/", maxsplit=1)[0]

    @staticmethod
    def _hide(router: Host) -> None:
        """Raises LabError: nft is not installed."""
        router.call("nft", "add table ip nat")
        router.call("nft", "add chain ip nat post { type nat hook postrouting priority 100; }")
        router.call("nft", 'add rule ip nat post oifname "wan" masquerade fully-random')

    # --- faults

    def move(self, host: Host) -> str:
        """The device gets another address of its LAN, as after a change of network; returns it."""
        site = self.site_of(host)
        site.moved += 1
        before = host.address
        number = 200 + site.moved % 50
        host.ip("addr", "del", f"{before}/24", "dev", host.interface)
        self._address(host, f"{site.subnet}.{number}/24", via=f"{site.subnet}.1")
        return host.address

    def rebind(self, site: Site) -> None:
        """The router forgets which of its ports stands for which device; what they send next gets another.

        Raises LabError: the site has no NAT, or conntrack is not installed.
        """
        if not site.nat:
            raise LabError(f"site {site.name} has no NAT to rebind")
        site.router.call("conntrack", "-F")

    def site_of(self, host: Host) -> Site:
        for site in self.sites:
            if host in site.devices:
                return site
        raise LabError(f"{host.name} is at no site")

    @property
    def devices(self) -> dict[str, list[Host]]:
        """By the name of their site."""
        return {site.name: site.devices for site in self.sites}

    @property
    def hosts(self) -> list[Host]:
        return [self.source, *(host for site in self.sites for host in site.devices)]

    def set_tcp(self, algorithm: str) -> None:
        """Linux' congestion control for TCP connections that start from now on, by an attribute of each route.

        (A namespace may not take another default than those the machine allows.)  Raises LabError: not in this kernel.
        """
        for host in self.hosts:
            for route in host.ip("route", "show").splitlines():
                plain = route.partition(" congctl ")[0].split()
                host.ip("route", "change", *plain, "congctl", algorithm)


def totals(counters: Counters) -> str:
    """What happened to one direction's packets, for a table."""
    parts = [f"{counters.out_bytes / 1e6:.1f} MB"]
    for name in ("lost", "overflowed", "blocked", "too_big", "policed", "while_down"):
        count = getattr(counters, name)
        if count:
            parts.append(f"{count} {name.replace('_', ' ')}")
    return ", ".join(parts)
