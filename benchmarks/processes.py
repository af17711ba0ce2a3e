"""Start-up of the command, and what an idle agent costs: processor time and memory."""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgesync.demo.fleet import COMMAND, Fleet
from simulations.netlab.hosts import cpu_seconds

HELP_RUNS = 11
IDLE_S = 30.0
HELP_BAR_S = 0.25
IDLE_BAR_PERCENT = 0.5
IDLE_RSS_BAR_MB = 68


def run() -> list[str]:
    return [_help(), *_idle()]


def _help() -> str:
    walls = []
    for _ in range(HELP_RUNS + 1):
        started = time.perf_counter()
        subprocess.run([*COMMAND, "--help"], check=True, stdout=subprocess.DEVNULL)
        walls.append(time.perf_counter() - started)
    walls = walls[1:]
    user = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime / (HELP_RUNS + 1)
    return (
        f"edgesync --help: median {statistics.median(walls):.3f} s (min {min(walls):.3f}, max {max(walls):.3f}, "
        f"user {user:.3f} s); bar {HELP_BAR_S} s"
    )


def _idle() -> list[str]:
    with tempfile.TemporaryDirectory(prefix="edgesync-bench-") as work, Fleet(Path(work)) as fleet:
        fleet.init_gateway()
        fleet.start_gateway()
        device = fleet.join("device-1")
        fleet.start_device(device)
        fleet.wait_connected()
        time.sleep(5)  # what a start leaves to do is not idling
        assert device.process is not None
        rows = []
        pids = {"agent": device.process.pid, "gateway": fleet.gateway_pid}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        time.sleep(IDLE_S)
        for name, pid in pids.items():
            percent = 100 * (cpu_seconds(pid) - before[name]) / IDLE_S
            bar = f"; bar {IDLE_BAR_PERCENT} %" if name == "agent" else ""
            rows.append(f"idle {name}: {percent:.2f} % of a core over {IDLE_S:.0f} s{bar}")
            bar = f"; bar {IDLE_RSS_BAR_MB} MB" if name == "agent" else ""
            rows.append(f"idle {name}: {rss_mb(pid):.1f} MB resident{bar}")
        return rows


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ProcessLookupError(pid)


if __name__ == "__main__":
    sys.stdout.write("\n".join(run()) + "\n")
