"""The process that carries one impaired link, and the compiler of its source.

A Python forwarder was measured first and costs a core at the packet rates wanted here (docs/adr/0022); so the file
beside this one is compiled on first use, and again whenever it changes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from simulations.netlab.hosts import Host, LabError

SOURCE: Final = Path(__file__).with_name("forwarder.c")


def binary() -> Path:
    """The compiled forwarder. Raises LabError: there is no C compiler, or it fails."""
    source = SOURCE.read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgesync-netlab"
    wanted = cache / f"forwarder-{hashlib.sha256(source).hexdigest()[:16]}"
    if wanted.exists():
        return wanted
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise LabError("the forwarder is a C file: install a compiler (Debian: gcc)")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        built = Path(scratch) / "forwarder"
        done = subprocess.run(
            [compiler, "-O2", "-o", str(built), str(SOURCE), "-lm"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise LabError(
                f"{compiler} could not build the forwarder: {done.stderr.strip()[-300:]}"
            )
        built.replace(wanted)
    return wanted


@dataclass(frozen=True)
class Impairment:
    """What one direction of a link does to packets."""

    rate: float = 0.0
    """Bits per second at IP level; 0: unlimited."""
    delay: float = 0.0
    """Seconds, one way."""
    jitter: float = 0.0
    """Seconds, plus or minus: the delay wanders between both ends in four times as long; order and mean are kept."""
    loss: float = 0.0
    """Share of packets, 0 to 1."""
    burst: float = 1.0
    """Mean packets a loss lasts (Gilbert-Elliott); 1: each by itself."""
    reorder: float = 0.0
    """Share of packets that come ``reorder_by`` seconds late."""
    reorder_by: float = 0.0
    duplicate: float = 0.0
    queue: float = 1_000_000
    """Bytes that may wait for their turn; more are dropped."""
    mtu: float = 0.0
    """Larger packets vanish without a word; 0: none do."""
    down: float = 0.0
    """1: nothing passes."""
    no_udp: float = 0.0
    only_port: float = 0.0
    """Only TCP to or from this port passes; 0: everything."""
    police: float = 0.0
    """Bits per second above which packets are dropped without a queue; 0: none are."""
    police_burst: float = 64_000
    """Bytes the policer lets through at once."""


@dataclass(frozen=True)
class Counters:
    """One direction since the link was made."""

    in_packets: int
    in_bytes: int
    out_packets: int
    out_bytes: int
    lost: int
    overflowed: int
    blocked: int
    too_big: int
    policed: int
    while_down: int


class Forwarder:
    """A link between a device in ``one`` and a device in ``two``. ``there`` is the direction from one to two."""

    def __init__(
        self, one: Host, one_device: str, two: Host, two_device: str, *, seed: int
    ) -> None:
        self._process = subprocess.Popen(
            [
                *(str(binary()), one.namespace, one_device, two.namespace, two_device),
                str(seed),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        if self._answer() != "ready":
            raise LabError(f"the forwarder did not start: {self._complaint()}")
        self.there = Impairment()
        self.back = Impairment()

    @property
    def pid(self) -> int:
        return self._process.pid

    def set(
        self, there: Impairment | None = None, back: Impairment | None = None, /, **both: float
    ) -> None:
        """Change the link from now on; ``both`` names single values for both directions. Raises LabError."""
        there = dataclasses.replace(there or self.there, **both)
        back = dataclasses.replace(back or self.back, **both)
        for letter, old, new in (("a", self.there, there), ("b", self.back, back)):
            for field in dataclasses.fields(Impairment):
                value = getattr(new, field.name)
                if value != getattr(old, field.name) or field.name in {"queue", "police_burst"}:
                    self._tell(f"set {letter} {field.name} {value:.9g}")
        self.there, self.back = there, back

    def counters(self) -> tuple[Counters, Counters]:
        """(there, back)."""
        both: dict[str, Any] = json.loads(self._ask("stats"))
        return Counters(**both["a"]), Counters(**both["b"])

    def _tell(self, command: str) -> None:
        answer = self._ask(command)
        if answer != "ok":
            raise LabError(f"the forwarder refused `{command}`: {answer}")

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise LabError(f"the forwarder is gone: {self._complaint()}") from exc
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _complaint(self) -> str:
        self._process.wait(5)
        assert self._process.stderr is not None
        return self._process.stderr.read().strip() or f"exit {self._process.returncode}"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
