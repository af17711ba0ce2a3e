"""The page of `make bench-network`: tables, bars reached and missed, and how to take the figures again."""

from collections.abc import Mapping, Sequence

from benchmarks.netbench.chart import Bar, Panel, draw
from benchmarks.netbench.links import LINKS, MBIT, Link
from benchmarks.netbench.results import (
    Results,
    Row,
    Spread,
    finished,
    goodputs,
    paired_ratios,
    verdict,
)

OURS = "edgesync"
MAIN = "edgesync-bbr"
TCP_BBR = "curl-bbr"
TCP_CUBIC = "curl-cubic"
UNIMPAIRED = ("fast-0", "unimpaired")
SLOW_BIT_S = 20 * MBIT
CORE_SHARE = 0.15
"""Of a core an agent may take while it receives at ``SLOW_BIT_S``."""
BEHIND = 0.97
"""Ours is not to be slower than this share of TCP BBR in the same run."""


def markdown(results: Results, size: int, labels: Mapping[str, str]) -> str:
    links = [link for link in LINKS.values() if _measured(results, link, size)]
    out = [
        "# EdgeSync beside what people would use instead",
        "",
        "Written by `make bench-network` from the rows in [network.json](network.json): do not edit. Losses are here too.",
        "",
        *_method(results, size),
    ]
    singles = [link for link in links if link.devices == 1]
    if singles:
        out += ["![Goodput by link](network.svg)", ""]
    for link in links:
        out += ["", f"## {link.what[0].upper()}{link.what[1:]}", ""]
        out += (
            _table(results, link, size, labels)
            if link.devices == 1
            else _site(results, link, size, labels)
        )
        out += _verdicts(results, link, size)
    out += _versions(results, labels)
    return "\n".join(out) + "\n"


def svg(results: Results, size: int, labels: Mapping[str, str]) -> str:
    panels = []
    for link in LINKS.values():
        if link.devices != 1 or not _measured(results, link, size):
            continue
        bars = []
        for tool in _order(results, link, size, labels):
            rows = _rows(results, link, tool, size)
            rates = [r / MBIT for r in goodputs(rows)]
            if rates:
                bars.append(
                    Bar(labels[tool], Spread.of(rates), tool.startswith(OURS), finished(rows))
                )
        full = link.rate_bit_s / MBIT
        if link.key in UNIMPAIRED:
            full = max(bar.spread.high for bar in bars) * 1.05
        panels.append(Panel(link.what, "Mbit/s", round(full, 1), bars))
    return draw("Goodput, one device from one gateway (median; line: worst to best run)", panels)


def payload(link: Link, size: int) -> int:
    return int(size * link.size_share)


def _measured(results: Results, link: Link, size: int) -> bool:
    return bool(results.of(link=link.key, size=payload(link, size)))


def _rows(results: Results, link: Link, tool: str, size: int) -> list[Row]:
    return results.of(link=link.key, tool=tool, size=payload(link, size))


def _order(results: Results, link: Link, size: int, labels: Mapping[str, str]) -> list[str]:
    return [tool for tool in labels if _rows(results, link, tool, size)]


def _method(results: Results, size: int) -> list[str]:
    machines = sorted({"; ".join(row["machine"].values()) for row in results.rows})
    commits = sorted({row["revision"] for row in results.rows})
    others = Spread.of([row["others_busy"] for row in results.rows])
    return [
        f"Payload {size / 1e6:g} MB of seeded random bytes in one file, the same for all. Goodput is payload over the time "
        "from the first request to verified (each tool's own check, `sha256sum` after curl). Rate is at IP level, loss is "
        "in both directions, the queue is one product of rate and round trip. Runs are interleaved: every contender once, "
        "then all again in another order, each in fresh network namespaces. curl and aria2 speak plain HTTP to nginx, "
        "without the encryption that EdgeSync, Syncthing and partly libtorrent pay for. A run that had moved less than "
        "a quarter of what the link could after 30 s (10 s plus one copy's time, if that is less) was stopped; its goodput is what had come over the time it took, "
        "and its row says *stopped*.",
        "",
        "CPU is processor seconds of all processes of the source and of the devices, user and system, from the command on.",
        "",
        "Measured on "
        + " / ".join(machines)
        + f"; EdgeSync at {', '.join(commits)}. Processes that were not part of a run "
        f"took {100 * others.median:.0f} % of the cores beside it, {100 * others.high:.0f} % at most.",
        "",
        "```sh",
        "make bench-network                                   # everything, needs root",
        f"python -m benchmarks.network --only loss-1 --tools edgesync-bbr,curl-bbr --size {size // 1_000_000}MB --repeat 3",
        "```",
        "",
    ]


def _table(results: Results, link: Link, size: int, labels: Mapping[str, str]) -> list[str]:
    out = [
        "| | goodput Mbit/s, median (worst–best) | of what gets through | seconds | operator's view s | CPU s source + device | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for tool in _order(results, link, size, labels):
        rows = _rows(results, link, tool, size)
        rates = Spread.of([r / MBIT for r in goodputs(rows)] or [0.0])
        done = finished(rows)
        seconds = Spread.of([d["seconds"] for row in rows for d in row["devices"]])
        view = Spread.of([d["operator_s"] for row in rows for d in row["devices"]])
        share = (
            ""
            if link.key in UNIMPAIRED
            else f"{100 * rates.median * MBIT / link.usable_bit_s:.0f} %"
        )
        name = f"**{labels[tool]}**" if tool.startswith(OURS) else labels[tool]
        out.append(
            f"| {name} | {rates.median:.2f} ({rates.low:.2f}–{rates.high:.2f}) | {share} "
            f"| {f'{seconds.median:.1f}' if done else 'stopped'} | {f'{view.median:.1f}' if done else '–'} "
            f"| {_cpu(rows)} | {len(rows)} |"
        )
    return out


def _site(results: Results, link: Link, size: int, labels: Mapping[str, str]) -> list[str]:
    out = [
        "| | copies over the thin link (towards the site, IP level) | back, share of one copy | first device done s "
        "| last device done s | one copy takes s | CPU s source + devices | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    copy_s = 8 * payload(link, size) / link.usable_bit_s
    for tool in _order(results, link, size, labels):
        rows = _rows(results, link, tool, size)
        down = Spread.of([row["wan_down_bytes"] / row["size"] for row in rows])
        up = Spread.of([row["wan_up_bytes"] / row["size"] for row in rows])
        done = finished(rows)
        first = Spread.of([min(d["operator_s"] for d in row["devices"]) for row in rows])
        last = Spread.of([max(d["operator_s"] for d in row["devices"]) for row in rows])
        name = f"**{labels[tool]}**" if tool.startswith(OURS) else labels[tool]
        ended = f"{last.median:.1f} ({last.low:.1f}–{last.high:.1f})" if done else "stopped"
        out.append(
            f"| {name} | {down.median:.2f} ({down.low:.2f}–{down.high:.2f}) | {100 * up.median:.1f} % "
            f"| {f'{first.median:.1f}' if done else '–'} | {ended} | {copy_s:.1f} | {_cpu(rows)} | {len(rows)} |"
        )
    return out


def _cpu(rows: Sequence[Row]) -> str:
    source = Spread.of([row["cpu_source_s"] for row in rows])
    device = Spread.of([row["cpu_devices_s"] for row in rows])
    return f"{source.median:.1f} + {device.median:.1f}"


def verdicts(results: Results, link: Link, size: int) -> list[str]:
    """The bars the project set itself on this link, each reached or missed, as sentences."""
    mine = _rows(results, link, MAIN, size)
    if not mine or link.devices != 1:
        return []
    said = []
    rate = Spread.of(goodputs(mine) or [0.0]).median
    if link.bar is not None:
        share = rate / link.usable_bit_s
        said.append(
            f"{verdict(share >= link.bar)}: {100 * share:.1f} % of rate × (1 − loss), bar {100 * link.bar:.0f} %"
        )
    if link.key in UNIMPAIRED:
        return said
    if link.rate_bit_s == SLOW_BIT_S:
        core = Spread.of([r["cpu_devices_s"] / r["devices"][0]["operator_s"] for r in mine]).median
        said.append(
            f"{verdict(core <= CORE_SHARE)}: the agent takes {100 * core:.1f} % of a core, bar {100 * CORE_SHARE:.0f} %"
        )
    ratios = paired_ratios(mine, _rows(results, link, TCP_BBR, size))
    if ratios:
        ratio = Spread.of(ratios).median
        need = 1.0 if link.key == "fast-1" else BEHIND
        said.append(
            f"{verdict(ratio >= need)}: {ratio:.2f} × TCP BBR in the same round, bar {need:g}"
        )
    if link.key == "fast-1":
        ratios = paired_ratios(mine, _rows(results, link, TCP_CUBIC, size))
        if ratios:
            ratio = Spread.of(ratios).median
            said.append(
                f"{verdict(ratio >= 20)}: {ratio:.0f} × TCP CUBIC in the same round, bar 20"
            )
        free = _rows(results, LINKS["fast-0"], MAIN, size)
        if free:
            share = rate / Spread.of(goodputs(free)).median
            said.append(
                f"{verdict(share >= 0.6)}: {100 * share:.0f} % of the same processes' rate over the same 100 Mbit/s without delay and "
                "loss, bar 60 % (a forwarder without a rate carries more than a 100 Mbit/s link could)"
            )
    return said


def _verdicts(results: Results, link: Link, size: int) -> list[str]:
    return ["", *(f"- {line}" for line in verdicts(results, link, size))]


def _versions(results: Results, labels: Mapping[str, str]) -> list[str]:
    seen: dict[str, set[str]] = {}
    for row in results.rows:
        seen.setdefault(row["tool"], set()).add(row["version"])
    out = ["", "## Versions", "", "| | version |", "|---|---|"]
    return out + [f"| {labels[t]} | {'; '.join(sorted(seen[t]))} |" for t in labels if t in seen]
