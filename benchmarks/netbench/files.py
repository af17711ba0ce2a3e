"""Contenders with one server and no peers: curl and aria2 from nginx, and an rsync daemon."""

import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.netbench.rig import Rig
from benchmarks.netbench.transfer import Payload, Transfer, disk_bytes
from simulations.netlab.hosts import Child, await_that

HTTP_PORT = 8080
RSYNC_PORT = 8730


class Http:
    """A file over plain HTTP from nginx: no encryption, so one round trip and some cycles less than ours."""

    def __init__(self, key: str, label: str, *, tcp: str, connections: int = 0) -> None:
        """``connections``: aria2 with so many; 0: curl, followed by ``sha256sum``."""
        self.key = key
        self.label = label
        self.tcp = tcp
        self._connections = connections

    def missing(self) -> str | None:
        return needs("nginx", "aria2c" if self._connections else "curl")

    def version(self) -> str:
        client = "aria2c" if self._connections else "curl"
        return f"{first_line(client, '--version')}; {first_line('nginx', '-v')}"

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        config = rig.work / "nginx.conf"
        config.write_text(
            f"daemon off; user root; worker_processes 1; pid {rig.work}/nginx.pid; error_log stderr;\n"
            "events { worker_connections 256; }\n"
            "http { access_log off; sendfile on; "
            f"server {{ listen {HTTP_PORT}; root {payload.path.parent}; }} }}\n"
        )
        server = rig.spawn(rig.source, "nginx", ["nginx", "-c", str(config), "-p", str(rig.work)])
        await_listening(server, HTTP_PORT)
        url = f"http://{rig.source.address}:{HTTP_PORT}/{payload.path.name}"
        transfers = []
        rig.mark()
        for device in rig.devices:
            folder = rig.folder(device.name)
            target = folder / payload.path.name
            if self._connections:
                count = str(self._connections)
                argv = ["aria2c", "--quiet", "--file-allocation=none", f"--dir={folder}"]
                argv += [f"--split={count}", f"--max-connection-per-server={count}"]
                argv += ["--min-split-size=1M", "--no-conf=true", "--max-tries=0"]
                argv += [f"--checksum=sha-256={payload.sha256}", url]
            else:
                script = 'curl --silent --show-error --fail -o "$1" "$2" && echo "$3  $1" | sha256sum --check --quiet'
                argv = ["sh", "-c", script, "sh", str(target), url, payload.sha256]
            fetch = rig.spawn(device, f"fetch-{device.name}", argv)
            transfers.append(of_process(fetch, folder, target))
        return transfers[0].started() or 0.0, transfers


class Rsync:
    """An rsync daemon and its client; rsync checks the whole file itself."""

    key = "rsync"
    label = "rsync (daemon)"
    tcp = "cubic"

    def missing(self) -> str | None:
        return needs("rsync")

    def version(self) -> str:
        return first_line("rsync", "--version")

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        config = rig.work / "rsyncd.conf"
        config.write_text(
            f"use chroot = no\nuid = root\ngid = root\n[pub]\npath = {payload.path.parent}\n"
        )
        argv = ["rsync", "--daemon", "--no-detach", f"--config={config}", f"--port={RSYNC_PORT}"]
        server = rig.spawn(rig.source, "rsyncd", argv)
        await_listening(server, RSYNC_PORT)
        url = f"rsync://{rig.source.address}:{RSYNC_PORT}/pub/{payload.path.name}"
        transfers = []
        rig.mark()
        for device in rig.devices:
            folder = rig.folder(device.name)
            fetch = rig.spawn(device, f"fetch-{device.name}", ["rsync", url, f"{folder}/"])
            transfers.append(of_process(fetch, folder, folder / payload.path.name))
        return transfers[0].started() or 0.0, transfers


def of_process(fetch: Child, folder: Path, target: Path) -> Transfer:
    """A transfer that is one process: it begins with it and is verified when it ends with 0."""

    def verified() -> float | None:
        if fetch.poll():
            fetch.check()
        return fetch.ended_at

    return Transfer(
        device=fetch.host.name,
        started=lambda: fetch.started_at,
        verified=verified,
        done_bytes=lambda: disk_bytes(folder),
        target=target,
    )


def await_listening(server: Child, port: int) -> None:
    """Until a TCP socket listens on ``port`` in the server's host. Raises LabError: the server ended."""
    wanted = f":{port:04X}"

    def listening() -> bool:
        server.check()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1].endswith(wanted) and fields[3] == "0A":
                    return True
        return False

    await_that(f"{server.name} to listen", listening, timeout_s=30)


def needs(*programs: str) -> str | None:
    """A sentence about the programs that are not installed, or None."""
    absent = [name for name in programs if shutil.which(name) is None]
    if not absent:
        return None
    packages = {"aria2c": "aria2", "nginx": "nginx-light"}
    return f"not installed: apt-get install {' '.join(packages.get(p, p) for p in absent)}"


def first_line(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return re.split(r"  protocol| \(", lines[0])[0].replace("nginx version: ", "") if lines else ""
