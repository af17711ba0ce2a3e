"""An endpoint of its own process, so that what attacks cost it can be measured.

::

    python -m edgesync.testing.victim gateway|device

prints one JSON line ``{"port", "pid", "key_pem", "certificate_pem"}`` (an identity of its fleet to attack with) and
serves pseudo-random pieces until its standard input ends.
"""

import asyncio
import hashlib
import json
import os
import sys

from edgesync.ids import PieceId
from edgesync.testing.transport import TestFleet
from edgesync.transport.endpoint import EndpointConfig


async def _main(role: str) -> None:
    async with TestFleet() as fleet:
        peer = await (
            fleet.gateway("victim", EndpointConfig(role="gateway", accept_joins=True, tcp=True))
            if role == "gateway"
            else fleet.device("victim")
        )
        for number in range(256):
            peer.shelf[PieceId(hashlib.sha256(b"%d" % number).digest())] = bytes(262_144)
        member = fleet.member("mallory")
        told = {
            "port": peer.endpoint.port,
            "pid": os.getpid(),
            "key_pem": member.key_pem().decode(),
            "certificate_pem": member.certificate_pem().decode(),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
