"""A bar chart as SVG: one panel a link, a bar a contender, a line from its worst to its best run.

Plain text out, no library: a page of bars needs no plotting package in anybody's virtual environment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.netbench.results import Spread

WIDTH = 900
LABEL = 190
RIGHT = 70
BAR = 16
STEP = 22
HEAD = 44
FOOT = 14
OURS = "#1a7f5a"
THEIRS = "#8aa0b4"
INK = "#1f2933"
GRID = "#d8dee4"
TICKS = 4


@dataclass(frozen=True)
class Bar:
    label: str
    spread: Spread
    ours: bool
    finished: bool = True
    """False: stopped before it was done; the bar is hatched."""


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    full: float
    """The end of the axis, in ``unit``: what the link can do."""
    bars: Sequence[Bar]


def draw(title: str, panels: Sequence[Panel]) -> str:
    heights = [HEAD + STEP * len(panel.bars) + FOOT for panel in panels]
    total = 34 + sum(heights)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        'font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        '<defs><pattern id="part" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="{THEIRS}" opacity=".35"/>'
        f'<rect width="2" height="6" fill="{THEIRS}"/></pattern></defs>',
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
        _text(12, 22, title, size=15, weight="bold"),
    ]
    top = 34
    for panel, height in zip(panels, heights, strict=True):
        out += _panel(panel, top)
        top += height
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(panel: Panel, top: int) -> list[str]:
    span = WIDTH - LABEL - RIGHT
    bottom = top + HEAD + STEP * len(panel.bars) - 4
    out = [_text(12, top + 16, panel.title, size=13, weight="bold")]
    for tick in range(TICKS + 1):
        x = LABEL + span * tick / TICKS
        value = f"{panel.full * tick / TICKS:g}" + (f" {panel.unit}" if tick == TICKS else "")
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top + HEAD - 8}" y2="{bottom}" stroke="{GRID}"/>'
        )
        out.append(_text(x, top + HEAD - 12, value, size=10, anchor="middle"))
    for number, bar in enumerate(panel.bars):
        y = top + HEAD + STEP * number
        middle = y + BAR / 2 - 4
        fill = OURS if bar.ours else THEIRS if bar.finished else "url(#part)"
        length = span * min(1.0, bar.spread.median / panel.full)
        low, high = (
            LABEL + span * min(1.0, v / panel.full) for v in (bar.spread.low, bar.spread.high)
        )
        out.append(_text(LABEL - 8, middle + 4, bar.label, anchor="end"))
        out.append(
            f'<rect x="{LABEL}" y="{y - 4}" width="{max(1.0, length):.1f}" height="{BAR}" fill="{fill}"/>'
        )
        out.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle:.1f}" y2="{middle:.1f}" stroke="{INK}"/>'
        )
        out.append(_text(max(LABEL + length, high) + 6, middle + 4, f"{bar.spread.median:.3g}"))
    return out


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: str = "normal", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{INK}">{escape(text)}</text>'
    )
