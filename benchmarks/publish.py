"""Publishing: rate and peak anonymous memory of the real command, for one large image and for a tree of packages.

``python -m benchmarks.publish [MIB]``. The input is what is installed beside the running interpreter; where more is
needed it is repeated under another permutation of byte values, which is as compressible and shares no piece. The
rate is payload over the time from scan to signature, everything durable; the second figure counts the processor time
of the whole command, which other load on the machine disturbs less; memory is summed over the command and its
workers, sampled every 20 ms.
"""

import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
TREE_BYTES = 360 * MIB


def installed() -> list[Path]:
    folder = Path(sysconfig.get_path("purelib"))
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def repeated(size: int) -> Iterator[tuple[int, Path, bytes]]:
    """Files until ``size`` bytes are reached: which repetition, where it came from, its bytes."""
    rng = random.Random(1)
    table = list(range(256))
    left = size
    repetition = 0
    while True:
        for path in installed():
            data = path.read_bytes().translate(bytes(table))[:left]
            left -= len(data)
            yield repetition, path, data
            if not left:
                return
        repetition += 1
        rng.shuffle(table)


def make_image(target: Path, size: int) -> None:
    target.mkdir()
    with (target / "rootfs.img").open("wb") as stream:
        for _, _, data in repeated(size):
            stream.write(data)


def make_tree(target: Path, size: int) -> None:
    root = Path(sysconfig.get_path("purelib"))
    for repetition, path, data in repeated(size):
        copy = target / f"{repetition}" / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data)


def anonymous_bytes(pid: int) -> int:
    """Of a process and its children, pages they share counted once; what is gone meanwhile counts nothing."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1]) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return total
    return total + sum(anonymous_bytes(int(child)) for child in children)


def publish(data: Path, tree: Path, bundle: str) -> dict[str, Any]:
    command = ("publish", "bundle", str(tree), bundle, "--data", str(data), "--json")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-m", "edgesync", *command], stdout=subprocess.PIPE
    ) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        published: dict[str, Any] = json.loads(process.stdout.read())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    published["peak_anonymous_bytes"] = peak
    published["cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return published


def row(what: str, published: dict[str, Any]) -> str:
    megabytes = published["payload_bytes"] / 1e6
    rate = megabytes / published["seconds"]
    return (
        f"publish {what}: {rate:.0f} MB/s, {megabytes / published['cpu_s']:.0f} MB per CPU second "
        f"({megabytes:.0f} MB payload, "
        f"{published['files']} files, {published['pieces']} pieces, "
        f"{published['wire_bytes'] / 1e6:.0f} MB on the wire, "
        f"{published['seconds']:.1f} s), peak anonymous memory {published['peak_anonymous_bytes'] / MIB:.0f} MiB, "
        f"{os.cpu_count()} cores"
    )


def run(image_bytes: int = 1024 * MIB) -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgesync-bench-") as name:
        folder = Path(name)
        init = (
            "gateway",
            "init",
            "bench",
            "--advertise",
            "127.0.0.1",
            "--data",
            str(folder / "gw"),
        )
        subprocess.run(
            [sys.executable, "-m", "edgesync", *init], check=True, stdout=subprocess.DEVNULL
        )
        make_image(folder / "image", image_bytes)
        make_tree(folder / "tree", min(TREE_BYTES, image_bytes))
        os.sync()
        for what in ("image", "tree"):
            rows.append(row(what, publish(folder / "gw", folder / what, f"{what}@1")))
            again = publish(folder / "gw", folder / what, f"{what}@2")
            rows.append(row(f"{what}, everything held already", again))
    return rows


if __name__ == "__main__":
    print(*run(int(sys.argv[1]) * MIB if len(sys.argv) > 1 else 1024 * MIB), sep="\n")
