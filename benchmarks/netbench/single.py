"""One contender, one laboratory, one run: what every network benchmark repeats."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.netbench.rig import Rig
from benchmarks.netbench.transfer import Contender, Patience, Payload, describe, watch

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / ".bench"
DOCS = ROOT / "docs" / "benchmarks"
SEED = 4
MB = 1_000_000


def run_once(
    make: Callable[[Path], AbstractContextManager[Rig]],
    contender: Contender,
    payload: Payload,
    *,
    rate_bit_s: float,
) -> dict[str, Any]:
    """Bring ``payload`` to every device of a fresh laboratory. Raises LabError.

    ``rate_bit_s`` is what the thin link lets through; patience is measured by it.
    """
    work = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        with make(work) as rig:
            copies = len(rig.devices)
            patience = Patience.for_payload(
                payload.size, rate_bit_s, copies, factor=3.0 if copies == 1 else 1.5
            )
            with rig:
                rig.set_tcp(contender.tcp)
                asked_at, transfers = contender.begin(rig, payload)
                devices = watch(payload, asked_at, transfers, patience)
                rig.stop_counting()
                carried = rig.wan_bytes()
            # Closed now: servers have waited for their workers, and their time is known.
            cpu = rig.cpu_s()
            at_source = sum(cpu[child.name] for child in rig.children if child.host is rig.source)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "devices": describe(devices),
        "wan_down_bytes": sum(down for down, _up in carried),
        "wan_up_bytes": sum(up for _down, up in carried),
        "cpu_source_s": round(at_source, 2),
        "cpu_devices_s": round(sum(cpu.values()) - at_source, 2),
        "cpu": cpu,
        "others_busy": rig.others_busy(),
    }
