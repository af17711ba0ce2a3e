"""An external broker that keeps nothing is killed and restarted while devices transfer and report: real processes."""

import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from edgesync.demo import source
from edgesync.demo.fleet import Fleet, free_port
from edgesync.demo.run import assign, publish, wait_delivered
from gateway.broker_config import BrokerSite, mosquitto_acl, mosquitto_conf
from tests.acceptance import inputs
from tests.contract.brokers import MOSQUITTO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
]
DEVICES = 2
VERSIONS = 3
RATE = 2_000_000


class Mosquitto:
    """Configured as the gateway would, but without persistence: what it knew dies with it."""

    def __init__(self, fleet: Fleet, folder: Path, port: int) -> None:
        folder.mkdir()
        data = fleet.gateway_data
        with contextlib.closing(sqlite3.connect(data / "gateway.db")) as db:
            (gateway,) = db.execute("select gateway_id from fleet").fetchone()
        site = BrokerSite(
            gateway=gateway,
            port=port,
            bind="127.0.0.1",
            authorities=str(folder / "clients.pem"),
            certificate=str(data / "identity.crt"),
            key=str(data / "identity.key"),
            acl=str(folder / "acl"),
            persistence=None,
        )
        (folder / "clients.pem").write_bytes(
            (data / "ca" / "ca.crt").read_bytes() + (data / "identity.crt").read_bytes()
        )
        (folder / "acl").write_text(mosquitto_acl(site))
        (folder / "acl").chmod(0o600)
        conf = mosquitto_conf(site)
        if os.geteuid() == 0:
            conf += "user root\n"  # else it drops to an account that cannot read this folder
        (folder / "mosquitto.conf").write_text(conf)
        self._folder = folder
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [MOSQUITTO, "-c", str(self._folder / "mosquitto.conf")], stdout=log, stderr=log
            )

    def listens(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def rows(path: Path, query: str, *values: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
        return db.execute(query, values).fetchall()


class Embedded:
    """The gateway's own broker dies with it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def start(self) -> None:
        self._fleet.start_gateway(upload_limit=RATE)

    def kill(self) -> None:
        self._fleet.kill_gateway()


@pytest.mark.parametrize("kind", ["mosquitto", "embedded"])
def test_no_report_is_lost_or_doubled(tmp_path: Path, kind: str) -> None:
    if kind == "mosquitto" and not Path(MOSQUITTO).exists():
        pytest.skip("mosquitto is not installed")
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(100_000))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    port = free_port(socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(Fleet(tmp_path))
        fleet.init_gateway()
        broker: Mosquitto | Embedded = Embedded(fleet)
        if kind == "mosquitto":
            with (fleet.gateway_data / "gateway.toml").open("a") as settings:
                settings.write(f'\nbroker = "mqtts://127.0.0.1:{port}"\n')
            broker = Mosquitto(fleet, tmp_path / "broker", port)
            stack.callback(broker.kill)
            broker.start()
            fleet.wait("the broker", broker.listens, timeout_s=20)
        fleet.start_gateway(upload_limit=RATE)
        for number in range(1, DEVICES + 1):
            fleet.start_device(fleet.join(f"device-{number}"))
        fleet.wait_connected()
        for number in range(1, VERSIONS + 1):
            tree = inputs.incompressible(
                tmp_path / f"tree-{number}", 3_000_000, seed=seed + number, files=3
            )
            publish(fleet, tree, str(number))
            assign(fleet, str(number))
            # Not a wait for a state: the kill may fall anywhere into the transfer.
            time.sleep(rng.uniform(0.0, 1.5))
            broker.kill()
            time.sleep(rng.uniform(0.0, 1.5))
            broker.start()
            wait_delivered(fleet, str(number))
            for device in fleet.devices:
                current = device.data / "bundles/demo/current"
                assert source.first_difference(source.describe(tree), current) is None
        fleet.wait(
            "the last report to be acknowledged",
            lambda: (
                not any(
                    rows(device.data / "state.db", "select 1 from outbox limit 1")
                    for device in fleet.devices
                )
            ),
            timeout_s=40,
        )
        for device in fleet.devices:
            meta = dict(rows(device.data / "state.db", "select key, value from outbox_meta"))
            told = [
                json.loads(str(data))
                for (data,) in rows(
                    fleet.gateway_data / "gateway.db",
                    "select data from events where actor = ? and kind like 'execution.%'",
                    f"device:{device.name}",
                )
            ]
            numbers = sorted(
                report["sequence"] for report in told if report["epoch"] == meta["epoch"]
            )
            assert numbers == list(range(1, int(str(meta["sequence"])) + 1))
            warned = [
                line
                for line in fleet.log_file(device.name).read_text().splitlines()
                if " WARNING " in line or " ERROR " in line
            ]
            assert not warned
