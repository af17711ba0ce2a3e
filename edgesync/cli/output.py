"""What commands print: JSON objects, plain tables, one progress line; remote text made harmless first.

Results go to stdout, progress to stderr and only when that is a terminal.
"""

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

_UNITS = ("B", "kB", "MB", "GB", "TB")


def clean(text: object) -> str:
    """``text`` without control, formatting and bidirectional characters: a remote name must not drive a terminal."""
    return "".join(
        "�" if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn"} else c for c in str(text)
    )


def size(count: float) -> str:
    """``1.2 MB``; powers of 1000."""
    value = float(count)
    for unit in _UNITS:
        if abs(value) < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def print_json(value: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns padded with blanks, no markup: readable, and cut(1) and awk(1) can take it apart."""
    table = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(headings, *table, strict=True)]
    for row in (list(headings), *table):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


class Progress:
    """One line on stderr, rewritten in place; silent when stderr is no terminal."""

    def __init__(self, title: str) -> None:
        self._title = clean(title)
        self._shown = sys.stderr.isatty()
        self._last = ""

    def update(self, done: float, total: float, note: str = "") -> None:
        if not self._shown:
            return
        share = min(1.0, done / total) if total else 1.0
        bar = "#" * int(share * 24)
        line = (
            f"\r{self._title} [{bar:<24}] {share:4.0%} {size(done)} of {size(total)} {clean(note)}"
        )
        if line != self._last:
            sys.stderr.write(line.ljust(len(self._last)))
            sys.stderr.flush()
            self._last = line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._last:
            sys.stderr.write("\n")


def narrator(*, quiet: bool) -> Callable[[str], None]:
    """Where a long command says what it does: stdout for people, stderr when stdout carries JSON."""

    def say(line: str) -> None:
        stream = sys.stderr if quiet else sys.stdout
        stream.write(line + "\n")
        stream.flush()

    return say
