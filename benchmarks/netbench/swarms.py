"""Contenders whose receivers also give: libtorrent and Syncthing, without discovery, relays or port mapping."""

import contextlib
import datetime as dt
import functools
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from benchmarks.netbench.files import first_line, needs
from benchmarks.netbench.rig import Rig
from benchmarks.netbench.transfer import Payload, Transfer, disk_bytes
from simulations.netlab.hosts import Child, Host, LabError, await_that

LIBTORRENT = "libtorrent==2.1.1"
SYNCTHING_PORT = 22000
API_KEY = "benchmark"
FOLDER = "bench"
START_TIMEOUT_S = 90.0


class Libtorrent:
    """libtorrent with its defaults (uTP and TCP); ``super_seeding``: the source gives each piece once at first."""

    tcp = "cubic"

    def __init__(self, key: str, label: str, *, cache: Path, super_seeding: bool = False) -> None:
        """``cache``: a folder for a virtual environment, made once with pip."""
        self.key = key
        self.label = label
        self._venv = cache / "venv"
        self._role = "super" if super_seeding else "seed"

    @property
    def _python(self) -> str:
        return str(self._venv / "bin" / "python")

    def missing(self) -> str | None:
        if not Path(self._python).exists():
            venv.create(self._venv, with_pip=True)
        probe = [self._python, "-c", "import libtorrent"]
        if subprocess.run(probe, check=False, capture_output=True).returncode:
            pip = [self._python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run([*pip, LIBTORRENT], check=False, capture_output=True, text=True)
            if done.returncode:
                return f"pip could not install {LIBTORRENT} for Python {sys.version_info[0]}.{sys.version_info[1]}"
        return None

    def version(self) -> str:
        return "libtorrent " + first_line(
            self._python, "-c", "import libtorrent; print(libtorrent.__version__)"
        )

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        torrent = rig.work / "payload.torrent"
        program = [self._python, str(Path(__file__).with_name("torrent_peer.py"))]
        rig.source.call(*program, "make", str(payload.path), str(torrent))
        seed_status = rig.work / "seed.json"
        seed = [self._role, str(torrent), str(payload.path.parent), rig.source.address]
        seeder = rig.spawn(rig.source, "seeder", [*program, *seed, str(seed_status)])
        _await_file(seed_status, seeder)
        peers, transfers = [], []
        rig.mark()
        for device in rig.devices:
            others = [h.address for h in (rig.source, *rig.devices) if h is not device]
            folder, status = rig.folder(device.name), rig.work / f"{device.name}.json"
            argv = [*program, "leech", str(torrent), str(folder), device.address, str(status)]
            peers.append(rig.spawn(device, f"peer-{device.name}", [*argv, *others]))
            transfers.append(_of_status(peers[-1], status, folder / payload.path.name))
        return peers[0].started_at, transfers


def _await_file(path: Path, child: Child) -> None:
    def there() -> bool:
        child.check()
        return path.exists()

    await_that(f"{child.name} to start", there, timeout_s=START_TIMEOUT_S)


def _of_status(child: Child, path: Path, target: Path) -> Transfer:
    def fact(name: str) -> Any:
        child.check()
        return json.loads(path.read_text())[name] if path.exists() else None

    return Transfer(
        device=child.host.name,
        started=lambda: fact("started"),
        verified=lambda: fact("finished"),
        done_bytes=lambda: fact("done") or 0,
        target=target,
    )


class Syncthing:
    """Syncthing over one transport, each device told the others' addresses; compression off, which favours it here."""

    tcp = "cubic"

    def __init__(self, key: str, label: str, *, transport: str) -> None:
        """``transport``: tcp or quic."""
        self.key = key
        self.label = label
        self._transport = transport

    def missing(self) -> str | None:
        return needs("syncthing")

    def version(self) -> str:
        return " ".join(first_line("syncthing", "--version").split()[:2])

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        hosts = [rig.source, *rig.devices]
        ids = {host.name: self._generate(rig, host) for host in hosts}
        nodes: dict[str, _Node] = {}
        for host in hosts:
            home = rig.folder(f"st-{host.name}")
            folder = rig.folder(host.name)
            (folder / ".stfolder").mkdir()
            (home / "config.xml").write_text(
                self._config(rig, host, hosts, ids, is_source=host is rig.source)
            )
            argv = ["syncthing", "serve", f"--home={home}", "--no-browser", "--no-restart"]
            child = rig.spawn(
                host,
                f"syncthing-{host.name}",
                [*argv, "--no-upgrade", "--skip-port-probing"],
                env={"STNORESTART": "1", "STNOUPGRADE": "1", "HOME": str(home)},
            )
            nodes[host.name] = _Node(child, home / "gui.sock", folder / payload.path.name)
        for host in hosts:
            node = nodes[host.name]
            await_that(f"{node.child.name} to answer", node.answers, timeout_s=START_TIMEOUT_S)
            node.events()  # from the first question on, events are kept
        for host in hosts:
            node, want = nodes[host.name], len(hosts) - 1
            await_that(
                f"{node.child.name} to reach the others over {self._transport}",
                functools.partial(node.has_met, want, self._transport),
                timeout_s=START_TIMEOUT_S,
            )
        inside = rig.folder(rig.source.name) / payload.path.name
        shutil.copyfile(payload.path, inside)
        rig.mark()
        asked_at = time.time()
        nodes[rig.source.name].ask("POST", f"/rest/db/scan?folder={FOLDER}")
        return asked_at, [nodes[device.name].transfer() for device in rig.devices]

    def _generate(self, rig: Rig, host: Host) -> str:
        home = rig.folder(f"st-{host.name}")
        argv = ["syncthing", "generate", f"--home={home}", "--no-default-folder"]
        host.call(*argv, "--skip-port-probing", env={"HOME": str(home)})
        found = re.search(r'<device id="([A-Z0-9-]+)"', (home / "config.xml").read_text())
        if found is None:
            raise LabError(f"no device id in {home / 'config.xml'}")
        return found[1]

    def _config(
        self, rig: Rig, host: Host, hosts: list[Host], ids: dict[str, str], *, is_source: bool
    ) -> str:
        members = "".join(f'<device id="{ids[h.name]}"/>' for h in hosts)
        # Of each pair one dials: two that dial at the same moment close each other's connection, again and again.
        devices = "".join(
            f'<device id="{ids[h.name]}" name="{h.name}" compression="never">'
            + (
                f"<address>{self._transport}://{h.address}:{SYNCTHING_PORT}</address></device>"
                if number < hosts.index(host)
                else "</device>"
            )
            for number, h in enumerate(hosts)
        )
        kind = "sendonly" if is_source else "receiveonly"
        options = {
            "listenAddress": f"{self._transport}://{host.address}:{SYNCTHING_PORT}",
            "globalAnnounceEnabled": "false",
            "localAnnounceEnabled": "false",
            "relaysEnabled": "false",
            "natEnabled": "false",
            "reconnectionIntervalS": "2",
            "startBrowser": "false",
            "urAccepted": "-1",
            "autoUpgradeIntervalH": "0",
            "crashReportingEnabled": "false",
            "setLowPriority": "false",
            "limitBandwidthInLan": "false",
        }
        home = rig.folder(f"st-{host.name}")
        return (
            '<configuration version="36">'
            f'<folder id="{FOLDER}" path="{rig.folder(host.name)}" type="{kind}" '
            f'fsWatcherEnabled="false" rescanIntervalS="0">{members}</folder>{devices}'
            f'<gui enabled="true" tls="false"><address>{home}/gui.sock</address>'
            f"<apikey>{API_KEY}</apikey></gui><options>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in options.items())
            + "</options></configuration>"
        )


class _Node:
    """One Syncthing, asked over its Unix socket, which is reached from any namespace."""

    def __init__(self, child: Child, gui: Path, target: Path) -> None:
        self.child = child
        self._gui = gui
        self._target = target

    def ask(self, method: str, path: str) -> Any:
        self.child.check()
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        try:
            connection.sock.connect(str(self._gui))
            connection.request(method, path, headers={"X-API-Key": API_KEY})
            body = connection.getresponse().read()
        finally:
            connection.close()
        return json.loads(body) if body.strip() else None

    def answers(self) -> bool:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            return bool(self.ask("GET", "/rest/system/ping") == {"ping": "pong"})
        return False

    def has_met(self, count: int, transport: str) -> bool:
        return self.connections(transport) >= count

    def connections(self, transport: str) -> int:
        found = self.ask("GET", "/rest/system/connections")["connections"].values()
        return sum(c["connected"] and c["type"].startswith(transport) for c in found)

    def events(self) -> list[dict[str, Any]]:
        path = "/rest/events?events=ItemStarted,ItemFinished&since=0&timeout=1"
        return self.ask("GET", path) or []

    def transfer(self) -> Transfer:
        def at(kind: str) -> float | None:
            if kind == "ItemFinished" and not self._target.exists():
                return None
            for event in self.events():
                if event["type"] == kind and event["data"].get("item") == self._target.name:
                    if event["data"].get("error"):
                        raise LabError(f"{self.child.name}: {event['data']['error']}")
                    return _unix(event["time"])
            return None

        return Transfer(
            device=self.child.host.name,
            started=lambda: at("ItemStarted"),
            verified=lambda: at("ItemFinished"),
            done_bytes=lambda: disk_bytes(self._target.parent),
            target=self._target,
        )


def _unix(text: str) -> float:
    """RFC 3339 with nanoseconds, which Python reads to microseconds only."""
    return dt.datetime.fromisoformat(
        re.sub(r"\.(\d{6})\d*", r".\1", text.replace("Z", "+00:00"))
    ).timestamp()
