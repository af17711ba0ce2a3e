"""One gateway and its devices as child processes, started and asked with the commands an operator types.

Nothing here knows how a daemon works inside. Every child dies with the fleet: ``close`` terminates, waits, then kills.
"""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from edgesync.errors import EdgeSyncError, WaitTimeoutError
from edgesync.io import control

COMMAND = [sys.executable, "-m", "edgesync"]
POLL_S = 0.1
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0


class CommandFailedError(EdgeSyncError):
    """A command of the demo did not end with 0; the sentence is the command's own."""


class Device:
    """One agent: its data directory, its process while it runs, and the highest memory any of its runs took."""

    def __init__(self, name: str, data: Path) -> None:
        self.name = name
        self.data = data
        self.process: subprocess.Popen[bytes] | None = None
        self.rss_peak_bytes = 0

    def status(self) -> dict[str, Any] | None:
        """What `edgesync agent status --json` prints, or None while the agent does not answer."""
        with contextlib.suppress(EdgeSyncError, OSError):
            self._note_memory()
            return control.ask(self.data, {"op": "status"})
        return None

    def bundle(self, name: str, version: str) -> dict[str, Any] | None:
        status = self.status()
        for bundle in (status or {}).get("bundles", []):
            if (bundle["name"], bundle["version"]) == (name, version):
                return cast("dict[str, Any]", bundle)
        return None

    def _note_memory(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(OSError), Path(f"/proc/{self.process.pid}/status").open() as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    self.rss_peak_bytes = max(self.rss_peak_bytes, int(line.split()[1]) * 1024)

    def kill(self) -> None:
        """SIGKILL, as a power switch would."""
        self._note_memory()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


class Fleet:
    def __init__(self, work: Path, *, log: Callable[[str], None] = lambda _line: None) -> None:
        self.work = work
        self.gateway_data = work / "gateway"
        self.devices: list[Device] = []
        self._gateway: subprocess.Popen[bytes] | None = None
        self._log = log
        self._ports = {
            "quic": free_port(socket.SOCK_DGRAM, socket.SOCK_STREAM),
            "mqtt": free_port(socket.SOCK_STREAM),
        }
        self._http = free_port(socket.SOCK_STREAM)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- commands ---------------------------------------------------------------------------------------------------
    def run(self, *arguments: str, stdin: str = "") -> str:
        """Run one command to its end and return its stdout. Raises CommandFailedError."""
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            env=_environment(),
            check=False,
        )
        if done.returncode != 0:
            sentence = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            raise CommandFailedError(f"`edgesync {' '.join(arguments)}` failed: {sentence[0]}")
        return done.stdout

    def ask(self, *arguments: str, stdin: str = "") -> dict[str, Any]:
        """Run a command that prints one JSON object."""
        return cast("dict[str, Any]", json.loads(self.run(*arguments, "--json", stdin=stdin)))

    # --- gateway ----------------------------------------------------------------------------------------------------
    def init_gateway(self) -> None:
        advertise = f"127.0.0.1:{self._ports['quic']}"
        self.run(
            "gateway", "init", "demo", "--advertise", advertise, "--data", str(self.gateway_data)
        )

    def start_gateway(self, *, upload_limit: int | None = None) -> None:
        """Start the daemon; ``upload_limit`` in bytes per second is its ordinary cap."""
        arguments = [
            *("gateway", "run", "--data", str(self.gateway_data)),
            *("--listen-quic", f"127.0.0.1:{self._ports['quic']}"),
            *("--listen-mqtt", f"127.0.0.1:{self._ports['mqtt']}"),
            *("--listen-http", f"127.0.0.1:{self._http}"),
        ]
        if upload_limit is not None:
            arguments += ["--upload-limit", str(upload_limit)]
        self._gateway = self._start("gateway", arguments)
        self.wait("the gateway to be ready", self._gateway_ready, timeout_s=START_TIMEOUT_S)

    def _gateway_ready(self) -> bool:
        if self._gateway is not None and self._gateway.poll() is not None:
            raise CommandFailedError(f"the gateway ended: {self._last_line('gateway')}")
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._http), 1) as sock,
        ):
            sock.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            return b" 200 " in sock.recv(64)
        return False

    def gateway_status(self) -> dict[str, Any]:
        return self.ask("gateway", "status", "--data", str(self.gateway_data))

    def gateway_bytes_out(self) -> int:
        """Piece bytes the gateway sent since it was made."""
        return int(self.gateway_status()["bytes_out"])

    @property
    def gateway_pid(self) -> int:
        assert self._gateway is not None
        return self._gateway.pid

    @property
    def gateway_quic_port(self) -> int:
        return self._ports["quic"]

    def kill_gateway(self) -> None:
        if self._gateway is not None:
            self._gateway.kill()
            self._gateway.wait()
            self._gateway = None

    def stop_gateway(self) -> None:
        if self._gateway is not None:
            _stop(self._gateway)
            self._gateway = None

    # --- devices ----------------------------------------------------------------------------------------------------
    def token(self) -> str:
        made = self.ask("token", "create", "--ttl", "10m", "--data", str(self.gateway_data))
        return str(made["token"])

    def join(self, name: str) -> Device:
        device = Device(name, self.work / name)
        arguments = ("agent", "join", "--token-file", "-", "--id", name, "--data", str(device.data))
        self.run(*arguments, stdin=self.token())
        self.devices.append(device)
        return device

    def start_device(self, device: Device, *, port: int = 0) -> None:
        """Start the agent; ``port`` is its QUIC port, 0 for any."""
        arguments = [
            *("agent", "run", "--data", str(device.data)),
            *("--interface", "127.0.0.1", "--listen-quic", f"127.0.0.1:{port}"),
        ]
        device.process = self._start(device.name, arguments)

    def wait_connected(self) -> None:
        def all_connected() -> bool:
            for device in self.devices:
                status = device.status()
                if device.process is not None and device.process.poll() is not None:
                    raise CommandFailedError(f"{device.name} ended: {self._last_line(device.name)}")
                if status is None or not status["gateway"]["connected"]:
                    return False
            return True

        self.wait("every agent to reach the gateway", all_connected, timeout_s=START_TIMEOUT_S)

    # --- waiting ----------------------------------------------------------------------------------------------------
    def wait(self, what: str, condition: Callable[[], bool], *, timeout_s: float) -> None:
        """Poll ``condition``. Raises WaitTimeoutError naming ``what``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise WaitTimeoutError(f"gave up after {timeout_s:.0f} s waiting for {what}")
            time.sleep(POLL_S)

    def close(self) -> None:
        for device in self.devices:
            if device.process is not None:
                device.status()
                _stop(device.process)
                device.process = None
        self.stop_gateway()

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        self._log(f"starting {name}")
        with self.log_file(name).open("ab") as log:
            return subprocess.Popen(
                [*COMMAND, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    def log_file(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def _last_line(self, name: str) -> str:
        lines = self.log_file(name).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"nothing in {self.log_file(name)}"


def free_port(*kinds: socket.SocketKind) -> int:
    """A port on loopback nobody has bound just now, in any of these kinds.

    Below those that systems give to outgoing connections: one of them must not have it when its owner comes back.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.ExitStack() as stack:
            try:
                for kind in kinds:
                    sock = stack.enter_context(socket.socket(socket.AF_INET, kind))
                    sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _environment() -> dict[str, str]:
    """The environment without EdgeSync's own variables: the demo must not touch a real installation.

    One setting is added: a person is watching, and five processes on one machine storm no broker.
    """
    own = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("EDGESYNC_") or key == "EDGESYNC_LOG"
    }
    return {"EDGESYNC_RECONNECT_MAX": "2s", **own}


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
