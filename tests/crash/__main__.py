"""Power-cut campaigns: ``python -m tests.crash --cuts 1000 --model ordered --model harsh --target store --seed 7``.

For each target: one recording without faults, on which every model gets its cuts; then ``--faults`` recordings in each
of which one sync fails (every one of them by default), with a few cuts each. Prints a line a campaign, ends 1 when a
promise was broken. ``--keep DIR`` leaves the recordings there; ``--show CUT:SEED`` lays one state of one out.
Needs root (FUSE, seccomp) and a tmpfs at /dev/shm.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash.powercut.disk import Model
from tests.crash.powercut.record import Recording, record
from tests.crash.powercut.replay import Outcome, choose_cuts, replay, show
from tests.crash.targets import FAILED, TARGETS, Target, prepare

_SYNCS = ("fsync", "fsyncdir", "syncfs")
_ERRNOS = ("EIO", "ENOSPC")
_SHOWN = 5


class Campaign:
    def __init__(self, target: Target, options: argparse.Namespace, work: Path) -> None:
        self.target, self.options, self.work = target, options, work
        self.seed: int = options.seed
        self.broken = 0
        self.states = 0
        prepare(target.name, self.seed)

    def record(self, faults: list[str]) -> tuple[Path, Recording]:
        folder = self.work / (
            "plain" if not faults else faults[0].replace(":", "-").replace("+", "on")
        )
        shutil.rmtree(folder, ignore_errors=True)
        directory = folder / "dir"
        directory.mkdir(parents=True)
        log = folder / "log"
        done = record(
            directory, log, lambda path, acks: self.target.program(path, acks, self.seed), faults
        )
        return log, done

    def cut(self, log: Path, model: Model, count: int, seed: int, *, faulty: bool) -> Outcome:
        outcome = replay(
            log,
            choose_cuts(log, count, seed),
            model,
            lambda path, acks: self.target.check(path, acks, self.seed, faulty),
            self.work,
            jobs=self.options.jobs,
        )
        self.states += outcome.states
        self.report(outcome, log, model)
        return outcome

    def report(self, outcome: Outcome, log: Path, model: Model) -> None:
        self.broken += len(outcome.failures)
        for failure in outcome.failures[:_SHOWN]:
            print(
                f"BROKEN {self.target.name} {log.parent.name} {model} state {failure.cut}:{failure.seed}"
            )
            print(f"  {failure.reason}\n  lost: {json.dumps(failure.lost)[:600]}")
        if outcome.failures and self.options.keep:
            kept = Path(self.options.keep) / f"{self.target.name}-{log.parent.name}-{model}.log"
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, kept)
            print(f"  recording kept: {kept}")

    def plain(self) -> Recording:
        log, done = self.record([])
        if done.status:
            self.broken += 1
            print(f"BROKEN {self.target.name}: the program ends {done.status} without a fault")
            return done
        for model in self.options.model:
            outcome = self.cut(log, model, self.options.cuts, self.seed, faulty=False)
            print(
                f"{self.target.name} {model}: {outcome.states} cuts, {len(outcome.failures)} broken, "
                f"{outcome.seconds:.1f} s ({sum(done.counts.values())} operations, "
                f"{sum(done.counts.get(kind, 0) for kind in _SYNCS)} syncs)"
            )
        return done

    def faults(self, counts: dict[str, int]) -> None:
        rules = [
            f"{kind}:{number}:{code}"
            for kind in _SYNCS
            for number in range(1, counts.get(kind, 0) + 1)
            for code in _ERRNOS
        ]
        if self.options.faults is not None and len(rules) > self.options.faults:
            step = len(rules) / max(self.options.faults, 1)
            offset = self.seed % max(int(step), 1)
            rules = [
                rules[min(int(n * step) + offset, len(rules) - 1)]
                for n in range(self.options.faults)
            ]
        began, statuses = time.monotonic(), Counter[int]()
        states = self.states
        for rule in rules:
            log, done = self.record([rule])
            statuses[done.status] += 1
            if done.status not in {0, FAILED}:
                self.broken += 1
                print(f"BROKEN {self.target.name}: the program ends {done.status} under {rule}")
            for model in self.options.model:
                self.cut(log, model, self.options.fault_cuts, self.seed, faulty=True)
            shutil.rmtree(log.parent)
        print(
            f"{self.target.name} faults: {len(rules)} failed syncs, {statuses[0]} survived, "
            f"{statuses[FAILED]} stopped the program, {self.states - states} cuts, "
            f"{time.monotonic() - began:.1f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--model", action="append", choices=("ordered", "harsh"))
    parser.add_argument("--cuts", type=int, default=1000, help="cuts a target and model")
    parser.add_argument("--faults", type=int, help="failed syncs a target (default: every one)")
    parser.add_argument("--fault-cuts", type=int, default=4, help="cuts a failed sync and model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", help="folder for recordings of failures")
    parser.add_argument("--show", metavar="LOG CUT:SEED NEWDIR", nargs=3, help="lay one state out")
    options = parser.parse_args()
    options.model = options.model or ["ordered", "harsh"]
    if options.show:
        cut, seed = map(int, options.show[1].split(":"))
        print(
            json.dumps(
                show(Path(options.show[0]), cut, seed, options.model[0], Path(options.show[2])),
                indent=1,
            )
        )
        return 0
    broken = 0
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory(prefix="powercut-", dir="/dev/shm") as folder:
        for name in options.target or TARGETS:
            campaign = Campaign(TARGETS[name], options, Path(folder) / name)
            done = campaign.plain()
            if options.faults != 0:
                campaign.faults(done.counts)
            broken += campaign.broken
    print(f"{broken} broken promises" if broken else "no broken promise")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
