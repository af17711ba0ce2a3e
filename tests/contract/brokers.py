"""The brokers the contract suite runs on, as processes of their own, and a fleet of certificates to talk to them."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from edgesync.errors import NotAuthorizedError
from edgesync.identity import (
    CertificateAuthority,
    Identity,
    certificate_id,
    certificate_key,
    check_issued,
    self_signed,
)
from edgesync.ids import GatewayId, PeerIdentity
from edgesync.io.mqtt import LinkConfig, MqttLink, Will
from edgesync.wire import topics
from gateway.broker import EmbeddedBroker
from gateway.broker_config import BrokerSite, mosquitto_acl, mosquitto_conf

GATEWAY = GatewayId("gw-eu1")
MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
FAST = LinkConfig(min_backoff_s=0.05, max_backoff_s=0.3, keepalive_s=30, publish_timeout_s=5)


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Wait for a state another task or process brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the awaited state did not come"
        await asyncio.sleep(0.01)


class Fleet:
    """One region: its CA, its gateway, and devices made when asked for."""

    def __init__(self) -> None:
        self.ca = CertificateAuthority.create("eu")
        self.rogue = CertificateAuthority.create("eu")
        self.gateway = self_signed(Identity.generate(), GATEWAY)

    def device(self, name: str, ca: CertificateAuthority | None = None) -> Identity:
        identity = Identity.generate(name)
        return identity.with_certificate((ca or self.ca).issue(identity.public_raw, name))

    def judge(self, der: bytes) -> PeerIdentity:
        return judge(der, self.gateway, self.ca.certificate_der)

    def authorities(self) -> list[bytes]:
        return [self.ca.certificate_der, self.gateway.certificate_der]


def judge(der: bytes, gateway: Identity, ca: bytes) -> PeerIdentity:
    key = certificate_key(der)
    if key == gateway.key:
        return PeerIdentity("gateway", GATEWAY, key)
    check_issued(der, ca)
    if certificate_id(der) == GATEWAY:
        raise NotAuthorizedError("a device with a gateway's name")
    return PeerIdentity("device", certificate_id(der), key)


class BrokerProcess:
    """One broker in a process of its own, on a port that stays the same over restarts."""

    def __init__(self, kind: str, fleet: Fleet, directory: Path) -> None:
        self.kind = kind
        self.fleet = fleet
        self.directory = directory
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"mqtts://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._command = getattr(self, f"_{kind}")()

    def _embedded(self) -> list[str]:
        spec = self.directory / "embedded.json"
        spec.write_text(
            json.dumps(
                {
                    "port": self.port,
                    "key": self.fleet.gateway.key_pem().decode(),
                    "certificate": self.fleet.gateway.certificate_pem().decode(),
                    "ca": self.fleet.ca.certificate_der.hex(),
                }
            )
        )
        return [sys.executable, "-m", "tests.contract.brokers", str(spec)]

    def _mosquitto(self) -> list[str]:
        at = self.directory
        site = BrokerSite(
            gateway=GATEWAY,
            port=self.port,
            bind="127.0.0.1",
            authorities=str(at / "clients.pem"),
            certificate=str(at / "broker.crt"),
            key=str(at / "broker.key"),
            acl=str(at / "acl"),
            persistence=None,
        )
        gateway = self.fleet.gateway
        (at / "clients.pem").write_bytes(
            self.fleet.ca.certificate_pem() + gateway.certificate_pem()
        )
        (at / "broker.crt").write_bytes(gateway.certificate_pem())
        (at / "broker.key").write_bytes(gateway.key_pem())
        (at / "acl").write_text(mosquitto_acl(site))
        (at / "acl").chmod(0o600)
        conf = mosquitto_conf(site)
        if os.geteuid() == 0:
            conf += "user root\n"  # else it drops to an account that cannot read the test's folder
        (at / "mosquitto.conf").write_text(conf)
        return [MOSQUITTO, "-c", str(at / "mosquitto.conf")]

    async def start(self) -> None:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220  a millisecond, in a test
                self._command, stdout=log, stderr=log, cwd=Path(__file__).parents[2]
            )
        await until(self._listens, timeout_s=20)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text()
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def link(
        self,
        identity: Identity,
        *,
        will: Will | None = None,
        subscriptions: list[tuple[str, int]] | None = None,
        on_connect: Callable[[], Awaitable[None]] | None = None,
        config: LinkConfig = FAST,
    ) -> MqttLink:
        if subscriptions is None:
            is_gateway = identity.key == self.fleet.gateway.key
            subscriptions = (
                topics.gateway_filters()
                if is_gateway
                else topics.device_filters(identity.name, GATEWAY)  # type: ignore[arg-type]
            )
        wanted = subscriptions
        return MqttLink(
            client_id=identity.name,
            brokers=lambda: [self.url],
            identity=identity,
            allowed_keys=lambda: {self.fleet.gateway.key},
            subscriptions=lambda: wanted,
            will=lambda: will,
            on_connect=on_connect,
            config=config,
        )


async def _run_embedded(told: dict[str, Any]) -> None:
    gateway = Identity.from_pem(told["key"].encode(), told["certificate"].encode())
    ca = bytes.fromhex(told["ca"])
    broker = EmbeddedBroker(
        identity=gateway,
        authorities=lambda: [ca, gateway.certificate_der],
        judge=lambda der: judge(der, gateway, ca),
        unproven_timeout_s=2.0,
    )
    await broker.open("127.0.0.1", told["port"])
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_run_embedded(json.loads(Path(sys.argv[1]).read_text())))
