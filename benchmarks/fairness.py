"""`make bench-fairness`: what a flow of ours leaves to others on one bottleneck, and what others of ours leave to it.

``python -m benchmarks.fairness`` (root; Linux namespaces). The bottleneck has 20 Mbit/s and 100 ms round trip. Each flow
ends at a device of its own, and shares are what that device's interface received in a window of 60 s, by the kernel's
counters, headers counted, the first seconds left out. Ours are real gateways and agents, one pair a flow, so that no
peer can help another. Flows that are compared run in the same invocation, in turn.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.netbench.edgesync_fleet import NAME, EdgeSync, Execution, assign, start_fleet
from benchmarks.netbench.files import Http, await_listening, needs
from benchmarks.netbench.links import MBIT, Link
from benchmarks.netbench.results import Results, Row, Spread, goodputs, machine, revision, verdict
from benchmarks.netbench.rig import Rig, behind, on_a_lan
from benchmarks.netbench.single import CACHE, DOCS, MB, SEED, run_once
from benchmarks.netbench.transfer import Contender, Payload
from simulations.netlab.fleet import Fleet, Ports
from simulations.netlab.hosts import Child, Host, LabError

SCHEMA = "edgesync.bench-fairness/1"
RATE_BIT_S = 20 * MBIT
RTT_S = 0.1
SETTLE_S = 10.0
WINDOW_S = 60.0
IPERF_PORT = 5201
SHORT_QUEUE = Link(
    "short-queue", "20 Mbit/s, 100 ms RTT, 10 ms queue, no loss", RATE_BIT_S, RTT_S, queue_bdp=0.1
)


@dataclass(frozen=True)
class Flow:
    """One flow of a case: ours with a congestion controller, or Linux' TCP with one."""

    label: str
    ours: str = ""
    """Value of the setting ``congestion``; ``background``: the agent asks for background mode."""
    tcp: str = ""


@dataclass(frozen=True)
class Case:
    key: str
    what: str
    queue_bdp: float
    flows: tuple[Flow, ...]


OURS = Flow("EdgeSync (BBR)", ours="bbr")
BACKGROUND = Flow("EdgeSync (background)", ours="background")
CUBIC = Flow("TCP CUBIC", tcp="cubic")
BBR = Flow("TCP BBR", tcp="bbr")
CASES = {
    case.key: case
    for case in (
        Case("bbr-1x", "TCP BBR beside TCP CUBIC, queue of 1 BDP", 1, (BBR, CUBIC)),
        Case("ours-1x", "EdgeSync beside TCP CUBIC, queue of 1 BDP", 1, (OURS, CUBIC)),
        Case("bbr-4x", "TCP BBR beside TCP CUBIC, queue of 4 BDP", 4, (BBR, CUBIC)),
        Case("ours-4x", "EdgeSync beside TCP CUBIC, queue of 4 BDP", 4, (OURS, CUBIC)),
        Case("two", "2 of EdgeSync, queue of 1 BDP", 1, (OURS,) * 2),
        Case("four", "4 of EdgeSync, queue of 1 BDP", 1, (OURS,) * 4),
        Case("bbr-four", "4 of TCP BBR, queue of 1 BDP", 1, (BBR,) * 4),
        Case("solo", "TCP CUBIC alone, queue of 1 BDP", 1, (CUBIC,)),
        Case("background", "background mode beside TCP CUBIC", 1, (BACKGROUND, CUBIC)),
    )
}


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 when all are equal, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0


class _Running:
    """A flow in a rig: prepared, then started, then read at its device's interface."""

    def __init__(self, rig: Rig, flow: Flow, host: Host, number: int, window_s: float) -> None:
        self._rig = rig
        self._host = host
        self._number = number
        self._seconds = int(SETTLE_S + window_s + 30)
        self.flow = flow
        self._anchor = rig.spawn(host, f"anchor-{host.name}", ["sleep", "86400"])
        self._fleet: Fleet | None = None
        self._client: Child | None = None

    def prepare(self, payload: Payload) -> None:
        if self.flow.tcp:
            argv = ["iperf3", "--server", "--one-off", "--port", str(IPERF_PORT)]
            server = self._rig.spawn(self._host, f"iperf3-{self._host.name}", argv)
            await_listening(server, IPERF_PORT)
            return
        if self.flow.ours == "background":
            everyone, agent = {}, {"EDGESYNC_BACKGROUND": "true"}
        else:
            everyone, agent = {"EDGESYNC_CONGESTION": self.flow.ours}, {}
        self._fleet = start_fleet(
            self._rig,
            name=f"gateway-{self._number}",
            devices=[self._host],
            ports=Ports().plus(10 * self._number),
            environment=everyone,
            agent_environment=agent,
        )
        self._fleet.publish(payload.path, NAME, "1")

    def start(self) -> None:
        if self._fleet is not None:
            assign(self._rig, self._fleet, "1")
            return
        argv = ["iperf3", "--client", self._host.address, "--port", str(IPERF_PORT)]
        argv += ["--time", str(self._seconds), "--congestion", self.flow.tcp]
        self._client = self._rig.spawn(self._rig.source, f"client-{self._host.name}", argv)

    def received(self) -> int:
        if self._client is not None:
            self._client.check()
        if self._fleet is not None and Execution(self._fleet.agents[0], "1").verified() is not None:
            raise LabError(
                f"{self.flow.label} finished within the window: give a larger --window payload"
            )
        return self._anchor.received_bytes()


def measure(case: Case, *, window_s: float, payload: Payload) -> Row:
    """Run one case once; bit/s of each flow in the window, and second by second. Raises LabError."""
    link = Link(
        case.key, case.what, RATE_BIT_S, RTT_S, queue_bdp=case.queue_bdp, devices=len(case.flows)
    )
    work = Path(tempfile.mkdtemp(prefix="bench-fairness-"))
    try:
        with behind([link], work) as rig, rig:
            running = [
                _Running(rig, flow, host, number, window_s)
                for number, (flow, host) in enumerate(zip(case.flows, rig.devices, strict=True))
            ]
            for flow in running:
                flow.prepare(payload)
            for flow in running:
                flow.start()
            time.sleep(SETTLE_S)
            began = time.monotonic()
            samples = [[flow.received() for flow in running]]
            while (elapsed := time.monotonic() - began) < window_s:
                time.sleep(min(1.0, window_s - elapsed))
                samples.append([flow.received() for flow in running])
            took = time.monotonic() - began
            rig.stop_counting()
        others = rig.others_busy()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rates = [8 * (b - a) / took for a, b in zip(samples[0], samples[-1], strict=True)]
    return {
        "flows": [flow.label for flow in case.flows],
        "bit_s": [round(rate) for rate in rates],
        "jain": round(jain(rates), 4),
        "window_s": round(took, 2),
        "others_busy": others,
        "samples": samples,
    }


ALONE = ("short-queue", "lan")
LAN_TIMES = 4
"""A LAN moves the payload in two seconds, of which the first is no measure: there it is so many times larger."""


def solo_rows(results: Results, only: Sequence[str], repeat: int, size: int) -> None:
    """Goodput alone: on a queue of 10 ms, and on a LAN without any impairment."""
    short: list[Contender] = [
        EdgeSync("ours", "EdgeSync (BBR)", congestion="bbr"),
        Http("curl-bbr", "curl, TCP BBR", tcp="bbr"),
        Http("curl-cubic", "curl, TCP CUBIC", tcp="cubic"),
    ]
    local: list[Contender] = [
        EdgeSync("chosen", "EdgeSync (as it chooses)", congestion="auto"),
        EdgeSync("reno", "EdgeSync (aioquic's default, Reno)", congestion="reno"),
    ]
    if not only or "short-queue" in only:
        payload = Payload.make(CACHE, size, seed=SEED)
        _alone(results, "short-queue", lambda w: behind([SHORT_QUEUE], w), short, repeat, payload)
    if not only or "lan" in only:
        payload = Payload.make(CACHE, LAN_TIMES * size, seed=SEED)
        _alone(results, "lan", on_a_lan, local, repeat, payload)


def _alone(
    results: Results,
    case: str,
    make: Callable[[Path], Any],
    contenders: Sequence[Contender],
    repeat: int,
    payload: Payload,
) -> None:
    for number in range(1, repeat + 1):
        turn = number % len(contenders)
        # Another order each round: nobody always runs after the same neighbour.
        for contender in (*contenders[turn:], *contenders[:turn]):
            if results.of(case=case, tool=contender.key, round=number, size=payload.size):
                continue
            reason = contender.missing()
            if reason is not None:
                print(f"{case} {contender.label}: left out: {reason}", flush=True)
                continue
            try:
                row = run_once(make, contender, payload, rate_bit_s=SHORT_QUEUE.rate_bit_s)
            except LabError as exc:
                print(f"{case} {contender.label} run {number}: no figure: {exc}", flush=True)
                continue
            results.add(
                {
                    "case": case,
                    "tool": contender.key,
                    "label": contender.label,
                    "round": number,
                    "size": payload.size,
                    **_facts(),
                    **row,
                }
            )
            rate = goodputs([row])[0] / MBIT
            print(f"{case} {contender.label} run {number}: {rate:.2f} Mbit/s", flush=True)


def _facts() -> dict[str, Any]:
    return {"machine": machine(), "revision": revision(), "at": int(time.time())}


def verdicts(results: Results) -> list[str]:
    """Each bar the project set itself, reached or missed."""
    said = []
    for queue in ("1x", "4x"):
        ours, bbr = (_median(results, f"{who}-{queue}", "TCP CUBIC") for who in ("ours", "bbr"))
        if ours is not None and bbr is not None:
            said.append(
                f"{verdict(ours >= bbr)}: beside EdgeSync TCP CUBIC keeps {100 * ours:.0f} % of the link, beside TCP BBR "
                f"{100 * bbr:.0f} % (queue {queue[0]} BDP; aim 25 %)"
            )
    for key, count in (("two", 2), ("four", 4)):
        if rows := results.of(case=key):
            index = statistics.median(row["jain"] for row in rows)
            bar = f"{verdict(index >= 0.9)}: " if count == 4 else ""
            said.append(
                f"{bar}{count} of EdgeSync share with Jain's index {index:.3f} (bar 0.9 for 4)"
            )
    solo = _median(results, "solo", "TCP CUBIC")
    beside = _median(results, "background", "TCP CUBIC")
    if solo and beside is not None:
        kept = beside / solo
        said.append(
            f"{verdict(kept >= 0.9)}: background mode leaves TCP {100 * kept:.0f} % of its solo rate, bar 90 %"
        )
    if rows := results.of(case="short-queue", tool="ours"):
        share = statistics.median(goodputs(rows)) / RATE_BIT_S
        said.append(
            f"{verdict(share >= 0.85)}: {100 * share:.0f} % of the link on a queue of 10 ms, bar 85 %"
        )
    chosen, reno = (results.of(case="lan", tool=tool) for tool in ("chosen", "reno"))
    if chosen and reno:
        ratio = statistics.median(goodputs(chosen)) / statistics.median(goodputs(reno))
        said.append(
            f"{verdict(ratio >= 1)}: on a LAN {ratio:.2f} × what aioquic's default reaches, bar 1"
        )
    return said


def _median(results: Results, case: str, label: str) -> float | None:
    """Median share of the link that flow ``label`` got."""
    shares = [
        rate / RATE_BIT_S
        for row in results.of(case=case)
        for name, rate in zip(row["flows"], row["bit_s"], strict=True)
        if name == label
    ]
    return statistics.median(shares) if shares else None


def markdown(results: Results) -> str:
    out = [
        "# What EdgeSync leaves to others",
        "",
        "Written by `make bench-fairness` from the rows in [fairness.json](fairness.json): do not edit.",
        "",
        __doc__.split("\n\n", 1)[1].replace("\n", " ").strip(),
        "",
        "Measured on "
        + " / ".join(sorted({"; ".join(r["machine"].values()) for r in results.rows}))
        + f"; EdgeSync at {', '.join(sorted({r['revision'] for r in results.rows}))}. Processes that were not part of a run "
        f"took {100 * max(r['others_busy'] for r in results.rows):.0f} % of the cores beside it at most.",
        "",
        *(f"- {line}" for line in verdicts(results)),
        "",
        "| | Mbit/s of each flow, median (worst–best) | Jain's index | runs |",
        "|---|---|---|---|",
    ]
    for case in CASES.values():
        rows = results.of(case=case.key)
        if not rows:
            continue
        cells = []
        for number, flow in enumerate(case.flows):
            rate = Spread.of([row["bit_s"][number] / MBIT for row in rows])
            cells.append(f"{flow.label} {rate.median:.1f} ({rate.low:.1f}–{rate.high:.1f})")
        index = Spread.of([row["jain"] for row in rows])
        shown = f"{index.median:.3f}" if len(case.flows) > 1 else ""
        out.append(f"| {case.what} | {'; '.join(cells)} | {shown} | {len(rows)} |")
    out += ["", "| alone | Mbit/s of payload, median (worst–best) | runs |", "|---|---|---|"]
    for key, what in (("short-queue", SHORT_QUEUE.what), ("lan", "LAN, no impairment")):
        rows = results.of(case=key)
        for label in dict.fromkeys(row["label"] for row in rows):
            mine = [row for row in rows if row["label"] == label]
            rate = Spread.of([r / MBIT for r in goodputs(mine)])
            out.append(
                f"| {what}: {label} | {rate.median:.1f} ({rate.low:.1f}–{rate.high:.1f}) | {len(mine)} |"
            )
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="CASE", help=", ".join((*CASES, *ALONE))
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--window", type=float, default=WINDOW_S, help="seconds measured")
    parser.add_argument("--size", default="100MB", help="payload of the runs alone")
    parser.add_argument(
        "--quick", action="store_true", help="15 s, 10 MB, one run, no page in docs"
    )
    parser.add_argument("--fresh", action="store_true", help="forget the rows there are")
    parser.add_argument("--rows", type=Path, help="where rows are kept")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("bench-fairness makes network namespaces: run it as root", file=sys.stderr)
        return 2
    if (absent := needs("iperf3", "nginx", "curl")) is not None:
        print(absent, file=sys.stderr)
        return 2
    if unknown := [key for key in options.only if key not in (*CASES, *ALONE)]:
        print(f"no case {unknown[0]!r}: there are {', '.join((*CASES, *ALONE))}", file=sys.stderr)
        return 2
    if options.quick:
        options = _quick(options)
    rows: Path = options.rows or (CACHE / "quick" if options.quick else DOCS) / "fairness.json"
    results = Results(rows, schema=SCHEMA, fresh=options.fresh)
    # Enough to last through the window whoever wins, and the time in which the flows start one after the other.
    payload = Payload.make(CACHE, int(RATE_BIT_S / 8 * (SETTLE_S + options.window + 20)), seed=SEED)
    for number in range(1, options.repeat + 1):
        for case in CASES.values():
            if (options.only and case.key not in options.only) or results.of(
                case=case.key, round=number
            ):
                continue
            try:
                row = measure(case, window_s=options.window, payload=payload)
            except LabError as exc:
                print(f"{case.key} run {number}: no figure: {exc}", flush=True)
                continue
            results.add({"case": case.key, "round": number, **_facts(), **row})
            shares = ", ".join(
                f"{name} {rate / MBIT:.2f}"
                for name, rate in zip(row["flows"], row["bit_s"], strict=True)
            )
            print(
                f"{case.key} run {number}: {shares} Mbit/s, Jain {row['jain']:.3f}, "
                f"others took {100 * row['others_busy']:.0f} % of the cores",
                flush=True,
            )
    size = int(float(options.size.removesuffix("MB")) * MB)
    solo_rows(results, options.only, options.repeat, size)
    for line in verdicts(results):
        print(line)
    rows.with_suffix(".md").write_text(markdown(results))
    return 0


def _quick(options: argparse.Namespace) -> argparse.Namespace:
    options.repeat, options.window, options.size = 1, 15.0, "10MB"
    return options


if __name__ == "__main__":
    sys.exit(main())
