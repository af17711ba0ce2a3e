"""What of one connection's speed is left when pieces are also read, hashed, written, synced and committed.

A gateway and one agent, as the commands start them, on a tmpfs: one incompressible file over loopback. The rate is
payload over the time from the agent's first to its last counted byte; both processes' CPU is given per MB.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from edgesync.demo.fleet import Fleet
from edgesync.demo.run import assign, publish
from simulations.netlab.fleet import make_tree
from simulations.netlab.hosts import cpu_seconds

SIZE = 300_000_000
SAMPLE_S = 0.1
IP_HEADERS_BYTES = 28


def measure(size: int = SIZE) -> dict[str, float]:
    """MB/s, and CPU milliseconds per MB of gateway and agent."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None  # noqa: PTH112 - a tmpfs is what is asked for
    with (
        tempfile.TemporaryDirectory(prefix="edgesync-bench-", dir=base) as work,
        Fleet(Path(work)) as fleet,
    ):
        tree = Path(work) / "tree"
        make_tree(tree, size=size, files=1, seed=11)
        fleet.init_gateway()
        fleet.start_gateway()
        device = fleet.join("device-1")
        fleet.start_device(device)
        fleet.wait_connected()
        publish(fleet, tree, "1", name="big")
        assert device.process is not None
        pids = {"gateway": fleet.gateway_pid, "agent": device.process.pid}
        before = {name: cpu_seconds(pid) for name, pid in pids.items()}
        assign(fleet, "1", name="big")
        first: tuple[float, int] | None = None
        while True:
            bundle = device.bundle("big", "1")
            now = time.monotonic()
            done = int(bundle["bytes_from_gateway"]) if bundle else 0
            if done and first is None:
                first = (now, done)
            if done >= size:
                break
            time.sleep(SAMPLE_S)
        assert first is not None
        rate = (done - first[1]) / (now - first[0]) / 1e6
        cpu = {
            name: 1000 * (cpu_seconds(pid) - before[name]) / (size / 1e6)
            for name, pid in pids.items()
        }
        return {"MB/s": rate, **{f"{name} ms/MB": value for name, value in cpu.items()}}


def measure_in_namespace(size: int, *, datagram: int) -> dict[str, float]:
    """``measure`` where loopback carries UDP payloads of at most ``datagram`` bytes. Needs root."""
    setting = f'ip link set lo up mtu {datagram + IP_HEADERS_BYTES} && exec "$0" -m benchmarks.whole_path --once {size}'
    argv = ["unshare", "--net", "sh", "-c", setting, sys.executable]
    found: dict[str, float] = json.loads(subprocess.check_output(argv))
    return found


def run(repeats: int = 3) -> list[str]:
    """Rows for the benchmark table."""
    runs = [measure() for _ in range(repeats)]
    return [
        "whole path, gateway to agent, tmpfs, 300 MB: "
        + ", ".join(f"{statistics.median(r[key] for r in runs):.1f} {key}" for key in runs[0])
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--once"]:
        print(json.dumps(measure(int(sys.argv[2]))))
        raise SystemExit
    sys.stdout.write("\n".join(run(int(sys.argv[1]) if len(sys.argv) > 1 else 3)) + "\n")
