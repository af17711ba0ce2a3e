"""Rows of results: kept in one JSON file so that a long run can be resumed, and what is computed from them.

A row is one run. Nothing is averaged away in the file.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Results:
    """The file; every ``add`` is on disk before it returns."""

    def __init__(self, path: Path, *, schema: str, fresh: bool = False) -> None:
        """Raises SystemExit: the file holds something else."""
        self.path = path
        self._schema = schema
        self.rows: list[Row] = []
        if path.exists() and not fresh:
            stored = json.loads(path.read_text())
            if stored.get("schema") != schema:
                raise SystemExit(f"{path} is not {schema}: move it away or give another --rows")
            self.rows = stored["rows"]

    def of(self, **facts: object) -> list[Row]:
        """Rows of which all these facts are true."""
        return [row for row in self.rows if all(row.get(k) == v for k, v in facts.items())]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(
            json.dumps({"schema": self._schema, "rows": self.rows}, indent=1, sort_keys=True) + "\n"
        )
        part.replace(self.path)


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values))


def goodputs(rows: Iterable[Row]) -> list[float]:
    """Bit/s of each run with one device."""
    return [
        8 * d["bytes_done"] / d["seconds"]
        for row in rows
        for d in row["devices"]
        if d["seconds"] > 0
    ]


def finished(rows: Iterable[Row]) -> bool:
    return all(d["finished"] for row in rows for d in row["devices"])


def paired_ratios(mine: Sequence[Row], theirs: Sequence[Row]) -> list[float]:
    """Goodput of ``mine`` over that of ``theirs`` in the same round."""
    other = {row["round"]: row for row in theirs}
    found = []
    for row in mine:
        if row["round"] in other:
            a, b = goodputs([row]), goodputs([other[row["round"]]])
            if a and b and b[0] > 0:
                found.append(a[0] / b[0])
    return found


def verdict(reached: bool) -> str:
    """How pages say whether a bar was met."""
    return "reached" if reached else "**missed**"


def machine() -> dict[str, str]:
    """What a figure depends on, without the name of anything private."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": f"{os.cpu_count()} × {cpu}",
        "kernel": platform.release().partition("-")[0],
        "python": f"{platform.python_implementation()} {platform.python_version()} ({platform.python_compiler()})",
    }


def revision() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"
