"""The links the contenders are measured on.

A thin link joins the source's network to a site; the devices of the site share a LAN. Loss is in both directions.
"""

from dataclasses import dataclass

MBIT = 1e6


@dataclass(frozen=True)
class Link:
    key: str
    what: str
    """For a heading."""
    rate_bit_s: float
    """At IP level."""
    rtt_s: float
    loss: float = 0.0
    """Share of packets lost, each way."""
    burst: float = 0.0
    """Mean length of a run of losses; 0: each packet by itself."""
    queue_bdp: float = 1.0
    """Queue before the thin link, in products of rate and round trip."""
    devices: int = 1
    size_share: float = 1.0
    """Of ``--size``."""
    bar: float | None = None
    """Goodput of EdgeSync (BBR) over what the link lets through that the project set itself."""
    only: tuple[str, ...] = ()
    """Contenders that make sense here; empty: all that run on one device."""

    @property
    def queue_bytes(self) -> int:
        """At least what a rate of 1 Gbit/s needs against late timers where there is no delay to fill."""
        if self.rtt_s == 0:
            return 2_000_000
        return max(10_000, int(self.queue_bdp * self.rate_bit_s * self.rtt_s / 8))

    @property
    def patience_bit_s(self) -> float:
        """What impatience is measured by: without an impairment the processes are the limit, not the link."""
        return self.usable_bit_s if self.rtt_s else 20 * MBIT

    @property
    def usable_bit_s(self) -> float:
        """What gets through at IP level."""
        return self.rate_bit_s * (1 - self.loss)


OF_SITES = frozenset({"edgesync", "libtorrent-super"})
"""Contenders that differ from another only where devices have neighbours."""
SITE = (
    "edgesync",
    "libtorrent",
    "libtorrent-super",
    "syncthing-tcp",
    "curl-bbr",
)
LINKS = {
    link.key: link
    for link in (
        Link("loss-1", "20 Mbit/s, 100 ms RTT, 1 % loss", 20 * MBIT, 0.1, 0.01, bar=0.88),
        Link("loss-2", "20 Mbit/s, 100 ms RTT, 2 % loss", 20 * MBIT, 0.1, 0.02, bar=0.86),
        Link("loss-5", "20 Mbit/s, 100 ms RTT, 5 % loss", 20 * MBIT, 0.1, 0.05, bar=0.82),
        *(
            Link(
                f"bursty-{percent}",
                f"20 Mbit/s, 100 ms RTT, {percent} % loss in bursts of 3",
                20 * MBIT,
                0.1,
                percent / 100,
                burst=3,
                bar=0.80,
            )
            for percent in (1, 2, 5)
        ),
        Link("satellite", "20 Mbit/s, 600 ms RTT, 2 % loss", 20 * MBIT, 0.6, 0.02, bar=0.75),
        Link("fast-1", "100 Mbit/s, 100 ms RTT, 1 % loss", 100 * MBIT, 0.1, 0.01),
        Link(
            "fast-0",
            "the same 100 Mbit/s without delay and loss",
            100 * MBIT,
            0.0,
            queue_bdp=0.0,
            only=("edgesync-bbr", "edgesync-cubic", "curl-bbr"),
        ),
        Link(
            "unimpaired",
            "the forwarder without any impairment, what the processes can do",
            1000 * MBIT,
            0.0,
            queue_bdp=0.0,
            only=("edgesync-bbr", "edgesync-cubic", "curl-bbr"),
        ),
        Link(
            "site",
            "a site of 4 devices behind 10 Mbit/s, 80 ms RTT, 0.5 % loss",
            10 * MBIT,
            0.08,
            0.005,
            devices=4,
            size_share=0.3,
            only=SITE,
        ),
    )
}
