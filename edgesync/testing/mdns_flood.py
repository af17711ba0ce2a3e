"""An attack on mDNS: thousands of invented peers, in well-formed answers and in garbage, to whoever listens.

``python -m edgesync.testing.mdns_flood --interface 127.0.0.1 --records 10000 --seconds 60``. Every answer names a new
machine with a pointer, an address that is on-link, and a plausible text; a tenth of the packets is noise.
For tests on loopback and in network namespaces of their own.
"""

import argparse
import random
import socket
import struct
import sys
import time
from typing import Final

GROUP: Final = "224.0.0.251"
PORT: Final = 5353
SERVICE: Final = b"_edgesync._udp.local"
RECORDS_PER_PACKET: Final = 4
_A, _PTR, _TXT, _SRV = 1, 12, 16, 33
_TTL: Final = 4500


def _name(name: bytes) -> bytes:
    return b"".join(bytes((len(part),)) + part for part in name.split(b".")) + b"\0"


def _record(name: bytes, kind: int, data: bytes) -> bytes:
    return _name(name) + struct.pack(">HHIH", kind, 1, _TTL, len(data)) + data


def answer(rng: random.Random, *, host: str = "127.0.0.1") -> bytes:
    """One packet of four records about one invented peer."""
    label = b"fake-%012x" % rng.getrandbits(48)
    instance, machine = label + b"." + SERVICE, label + b".local"
    text = (b"v=1", b"id=" + label, b"fp=%016x" % rng.getrandbits(64), b"root=1", b"timestamp=9")
    records = [
        _record(SERVICE, _PTR, _name(instance)),
        _record(
            instance, _SRV, struct.pack(">HHH", 0, 0, rng.randrange(1, 65_536)) + _name(machine)
        ),
        _record(instance, _TXT, b"".join(bytes((len(entry),)) + entry for entry in text)),
        _record(machine, _A, socket.inet_aton(host)),
    ]
    return struct.pack(">HHHHHH", 0, 0x8400, 0, len(records), 0, 0) + b"".join(records)


def flood(
    *, interface: str, records: int, seconds: float, seed: int = 0, host: str = "127.0.0.1"
) -> int:
    """Send about ``records`` records, evenly over ``seconds``; returns how many packets went out."""
    rng = random.Random(seed)  # noqa: S311  # an attack need not be unpredictable
    packets = -(-records // RECORDS_PER_PACKET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(interface))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Answers that do not come from the mDNS port are not answers.
        sock.bind((interface, PORT))
        begun = time.monotonic()
        for number in range(packets):
            packet = (
                rng.randbytes(rng.randrange(1, 1400))
                if number % 10 == 9
                else answer(rng, host=host)
            )
            sock.sendto(packet, (GROUP, PORT))
            late = begun + seconds * (number + 1) / packets - time.monotonic()
            if late > 0:
                time.sleep(late)
    return packets


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Flood mDNS with invented peers.")
    parser.add_argument("--interface", default="127.0.0.1")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    sent = flood(
        interface=chosen.interface,
        records=chosen.records,
        seconds=chosen.seconds,
        seed=chosen.seed,
        host=chosen.interface,
    )
    sys.stdout.write(f"{sent} packets, about {sent * RECORDS_PER_PACKET} records\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
