"""One payload on its way to some devices: what was asked, what has come, and when a run is called off.

Every contender gives one ``Transfer`` a device; ``watch`` waits for them the same way for all.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.netbench.rig import Rig
from simulations.netlab.fleet import write_random
from simulations.netlab.hosts import LabError

EARLY_SHARE = 0.25
"""Who has moved less than this share of what the link could by the early mark is stopped there: it is slow, not stuck,
and its rate is known by then."""


@dataclass(frozen=True)
class Payload:
    """An incompressible file, the same for everybody."""

    path: Path
    size: int
    sha256: str
    seed: int

    @staticmethod
    def make(folder: Path, size: int, *, seed: int) -> "Payload":
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"payload-{size}-{seed}" / "payload.bin"
        if not path.exists() or path.stat().st_size != size:
            path.parent.mkdir(exist_ok=True)
            write_random(path, size, random.Random(seed))
        with path.open("rb") as file:
            return Payload(path, size, hashlib.file_digest(file, "sha256").hexdigest(), seed)


@dataclass
class Transfer:
    """One device's copy. Times are Unix seconds; the callables may be asked at any moment, often."""

    device: str
    started: Callable[[], float | None]
    """When it asked first."""
    verified: Callable[[], float | None]
    """When all of it had come and was checked."""
    done_bytes: Callable[[], int]
    """Payload bytes that have come."""
    target: Path | None = None
    """Where the file lies in the end; compared byte for byte after the clock has stopped."""
    settled: Callable[[], float | None] | None = None
    """When the operator sees it done, if that is later."""


@dataclass
class DeviceResult:
    device: str
    seconds: float
    """First request to verified; to the moment it was stopped where ``finished`` is false."""
    finished: bool
    bytes_done: int
    operator_s: float
    """From the operator's command to the moment it is seen done."""


@dataclass(frozen=True)
class Patience:
    """When a run that is not done is stopped; its goodput is then what came, over the time it took."""

    early_s: float
    limit_s: float
    rate_bit_s: float

    @staticmethod
    def for_payload(
        size: int, rate_bit_s: float, copies: int = 1, *, factor: float = 3.0
    ) -> "Patience":
        ideal = 8 * size * copies / rate_bit_s
        return Patience(
            early_s=min(30.0, 10 + ideal),
            limit_s=max(20.0, factor * ideal + 10),
            rate_bit_s=rate_bit_s,
        )


class Contender(Protocol):
    """A way of moving files, with its defaults except where its docstring says so."""

    key: str
    label: str
    tcp: str
    """Linux' TCP congestion control while it runs."""

    def missing(self) -> str | None:
        """What to do before it can run; None when it can."""
        ...

    def version(self) -> str: ...

    def begin(self, rig: Rig, payload: Payload) -> tuple[float, list[Transfer]]:
        """Start servers and fetches; returns the time of the operator's command and one transfer a device."""
        ...


def watch(
    payload: Payload, asked_at: float, transfers: Sequence[Transfer], patience: Patience
) -> list[DeviceResult]:
    """Wait for every transfer, or until patience ends. Raises LabError: a copy differs from the payload."""
    results: dict[str, DeviceResult] = {}
    began = time.time()
    early_checked = False
    while len(results) < len(transfers):
        for transfer in transfers:
            if transfer.device in results:
                continue
            verified = transfer.verified()
            seen = transfer.settled() if transfer.settled is not None else verified
            if verified is not None and seen is not None:
                first = transfer.started() or asked_at
                results[transfer.device] = DeviceResult(
                    transfer.device,
                    round(verified - first, 3),
                    finished=True,
                    bytes_done=payload.size,
                    operator_s=round(seen - asked_at, 3),
                )
        elapsed = time.time() - began
        stop = elapsed > patience.limit_s
        if not early_checked and elapsed > patience.early_s:
            early_checked = True
            came = sum(_bytes(t, payload) for t in transfers)
            fair = min(patience.rate_bit_s / 8 * elapsed, payload.size * len(transfers))
            stop = stop or came < EARLY_SHARE * fair
        if stop:
            break
        time.sleep(0.05)
    now = time.time()
    for transfer in transfers:
        if transfer.device not in results:
            first = transfer.started() or asked_at
            results[transfer.device] = DeviceResult(
                transfer.device,
                round(now - first, 3),
                finished=False,
                bytes_done=_bytes(transfer, payload),
                operator_s=round(now - asked_at, 3),
            )
        elif transfer.target is not None:
            _compare(transfer.target, payload)
    return [results[t.device] for t in transfers]


def _bytes(transfer: Transfer, payload: Payload) -> int:
    return min(payload.size, transfer.done_bytes())


def _compare(target: Path, payload: Payload) -> None:
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != payload.sha256:
        raise LabError(f"{target} is not the payload: SHA-256 {found[:16]}…")


def disk_bytes(folder: Path) -> int:
    """Bytes written so far to the files of ``folder``, holes not counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        if path.is_file():
            total += min(info.st_size, info.st_blocks * 512)
    return total


def describe(results: Sequence[DeviceResult]) -> list[dict[str, Any]]:
    return [vars(result) for result in results]
