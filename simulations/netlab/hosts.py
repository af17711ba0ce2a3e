"""Machines of a laboratory: network namespaces, the processes in them, and what each of those cost.

Invariants: a namespace is named after the run that made it (``nl<pid>-…``), so that what a killed run left behind can
be told from what a living one uses; a process started here is stopped with its host.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PREFIX: Final = "nl"
STOP_TIMEOUT_S: Final = 15.0
_TICK_HZ: Final = os.sysconf("SC_CLK_TCK")


_C_LIBRARY: Final = ctypes.CDLL(None)
_PR_SET_PDEATHSIG: Final = 1


def _die_with_parent() -> None:
    """In the new process, before it becomes the command: a laboratory that is killed takes its processes along."""
    _C_LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class LabError(Exception):
    """The laboratory could not do what it was asked; the sentence says what and why."""


def run(
    *argv: str,
    stdin: str = "",
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    inside: "Host | None" = None,
) -> str:
    """A command to its end, and what it printed. Raises LabError: it failed, or took too long."""
    said = f"`{' '.join(argv)}`" + (f" in {inside.name}" if inside is not None else "")
    try:
        done = subprocess.run(
            argv if inside is None else inside.inside(argv),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=env,
            check=False,
        )
    except FileNotFoundError as exc:
        raise LabError(f"`{exc.filename}` is not installed") from exc
    except subprocess.TimeoutExpired as exc:
        raise LabError(f"{said} took more than {timeout_s:.0f} s") from exc
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise LabError(f"{said}: {lines[-1] if lines else f'exit {done.returncode}'}")
    return done.stdout


def await_that(what: str, condition: Callable[[], bool], *, timeout_s: float) -> None:
    """Poll until it is true. Raises LabError naming ``what``."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise LabError(f"gave up after {timeout_s:.0f} s waiting for {what}")
        time.sleep(0.1)


def need_root() -> None:
    """Raises LabError: this process may not make namespaces."""
    if os.geteuid() != 0:
        raise LabError("the laboratory makes network namespaces: run it as root")


@dataclass
class Host:
    """One machine: a namespace, and the address others reach it by."""

    name: str
    namespace: str
    address: str = ""
    interface: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    """For every command in it."""
    children: list["Child"] = field(default_factory=list, repr=False, compare=False)
    """Every process ``start`` made, in order; ended ones too."""

    def inside(self, argv: Sequence[str]) -> list[str]:
        """The command, run in this host; ``ip netns exec`` becomes it, so the process id is the command's."""
        return ["ip", "netns", "exec", self.namespace, *argv]

    def call(
        self,
        *argv: str,
        stdin: str = "",
        timeout_s: float = 120.0,
        env: Mapping[str, str] | None = None,
    ) -> str:
        """As ``run``, in this host and without this machine's own settings. Raises LabError."""
        environment = clean_environment() | self.environment | dict(env or {})
        return run(*argv, stdin=stdin, timeout_s=timeout_s, env=environment, inside=self)

    def start(
        self, name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None
    ) -> "Child":
        child = Child(self, name, argv, log=log, env=env or {})
        self.children.append(child)
        return child

    def ip(self, *arguments: str) -> str:
        return run("ip", "-n", self.namespace, *arguments)


def make_host(name: str, namespace: str) -> Host:
    """A new namespace with its loopback up."""
    run("ip", "netns", "add", namespace)
    host = Host(name, namespace)
    host.ip("link", "set", "lo", "up")
    # Buffers a long fat path needs: without them TCP, not the path, is measured.
    for key in ("tcp_rmem", "tcp_wmem"):
        host.call("sysctl", "-qw", f"net.ipv4.{key}=4096 131072 33554432")
    return host


def remove_namespace(namespace: str) -> None:
    """Kill what still runs in it and delete it; nothing happens if it is gone."""
    with contextlib.suppress(LabError):
        for pid in run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        run("ip", "netns", "del", namespace)


def remove_left_behind(*, everything: bool = False) -> list[str]:
    """Delete namespaces of runs that are no more; ``everything``: of living ones too. Returns their names."""
    removed = []
    for line in run("ip", "netns", "list").splitlines():
        name = line.split()[0]
        owner, dash, _ = name.removeprefix(PREFIX).partition("-")
        if not name.startswith(PREFIX) or not dash or not owner.isdigit():
            continue
        if everything or not is_alive(int(owner)):
            remove_namespace(name)
            removed.append(name)
    return removed


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    with contextlib.suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state not in {"Z", "X"}
    return False


def clean_environment() -> dict[str, str]:
    """The environment without a real installation's settings, and without proxies."""
    dropped = ("EDGESYNC_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    return {k: v for k, v in os.environ.items() if not k.upper().startswith(dropped)}


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a running process and its ended children; 0 when it is gone."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(value) for value in stat[11:15]) / _TICK_HZ
    return 0.0


class Child:
    """One process in a host, with its processor time (its waited-for children's too, once it has ended)."""

    def __init__(
        self, host: Host, name: str, argv: Sequence[str], *, log: Path, env: Mapping[str, str]
    ) -> None:
        self.host = host
        self.name = name
        self.log = log
        self.exit_code: int | None = None
        self.started_at = time.time()
        self.ended_at: float | None = None
        """Both in Unix seconds; the end when it was first seen."""
        self._cpu_s = 0.0
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                host.inside(argv),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=clean_environment() | host.environment | dict(env),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call into the C library, no lock
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code once it has ended; collects what it used."""
        if self.exit_code is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.exit_code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.ended_at = time.time()
                self._cpu_s = usage.ru_utime + usage.ru_stime
        return self.exit_code

    def check(self) -> None:
        """Raises LabError: it has ended."""
        if self.poll() is not None:
            raise LabError(f"{self.name} ended with {self.exit_code}: {self.last_line()}")

    def cpu_s(self) -> float:
        """User and system seconds so far."""
        return cpu_seconds(self.pid) if self.poll() is None else self._cpu_s

    def received_bytes(self) -> int:
        """What came in on its host's interface, link headers counted.

        Raises OSError: the process is gone, or has not entered its host's namespace yet.
        """
        for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
            name, _, counters = line.strip().partition(":")
            if name == self.host.interface:
                return int(counters.split()[0])
        raise ProcessLookupError(f"{self.name} does not see {self.host.interface}")

    def kill(self) -> None:
        """SIGKILL, as a power switch would."""
        if self.poll() is None:
            self._process.kill()
            self._wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to its whole session when that does not help."""
        if self.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        if not self._wait(STOP_TIMEOUT_S):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._wait(STOP_TIMEOUT_S)

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"nothing in {self.log}"
