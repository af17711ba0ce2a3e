"""Lay out what a cut may leave, at many points of a recording, and run a checker on each."""

import gc
import json
import os
import random
import select
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.crash.powercut.disk import Disk, Model
from tests.crash.powercut.log import read_log

Check = Callable[[Path, list[str]], str | None]
"""Called with a crash state's directory and the lines acknowledged before the cut; returns what is wrong, or None."""


@dataclass
class Failure:
    cut: int
    seed: int
    reason: str
    lost: dict[str, object]


@dataclass
class Outcome:
    model: Model
    states: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0


def choose_cuts(log: Path, count: int, seed: int) -> list[tuple[int, int]]:
    """(log index, seed) pairs: half anywhere, half after an ack or a change of names or just before a sync."""
    kinds = [record[0] for record in read_log(log)]
    rng, everywhere = random.Random(seed), range(kinds.index("start"), len(kinds))
    telling = [
        at for at in everywhere if kinds[at] in {"ack", "rename", "exchange", "unlink", "link"}
    ]
    telling += [at - 1 for at in everywhere if kinds[at] in {"fsync", "fsyncdir", "syncfs"}]
    return sorted(
        (rng.choice(telling if telling and number % 2 else everywhere), rng.getrandbits(40))
        for number in range(count)
    )


def replay(
    log: Path, cuts: list[tuple[int, int]], model: Model, check: Check, work: Path, *, jobs: int = 2
) -> Outcome:
    """Try every cut, each in a forked child. ``work`` holds the states and should be a tmpfs."""
    began = time.monotonic()
    outcome = Outcome(model)
    disk = Disk(model)
    running: dict[int, tuple[tuple[int, int], int]] = {}
    todo = sorted(cuts)[::-1]

    def collect(limit: int) -> None:
        while len(running) > limit:
            for pipe in select.select(list(running), [], [])[0]:
                with os.fdopen(pipe) as reader:
                    answer = json.loads(reader.read() or '["the checker died", {}]')
                (cut, seed), child = running.pop(pipe)
                os.waitpid(child, 0)
                outcome.states += 1
                if answer[0] is not None:
                    outcome.failures.append(Failure(cut, seed, answer[0], answer[1]))

    number = -1
    for number, record in enumerate(read_log(log)):
        disk.feed(number, record)
        while todo and todo[-1][0] <= number:
            cut = todo.pop()
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                gc.disable()
                os.close(reader)
                answer = _try(disk, cut[1], check, work / f"state-{os.getpid()}")
                with os.fdopen(writer, "w") as pipe:
                    pipe.write(json.dumps(answer))
                os._exit(0)
            os.close(writer)
            running[reader] = cut, child
            collect(jobs - 1)
        if not todo:
            break
    collect(0)
    outcome.seconds = time.monotonic() - began
    return outcome


def _try(
    disk: Disk, seed: int, check: Check, directory: Path
) -> tuple[str | None, dict[str, object]]:
    told = asdict(disk.crash(seed))
    try:
        disk.materialise(directory)
        acks = b"".join(disk.acks).decode().splitlines()
        return check(directory, acks), told
    except BaseException:  # noqa: BLE001  # any way out of the checker is a failed state
        return traceback.format_exc()[-3000:], told
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def show(log: Path, cut: int, seed: int, model: Model, keep: Path) -> dict[str, object]:
    """Leave one crash state in a new directory, to look at; returns what it lost."""
    disk = Disk(model)
    for number, record in enumerate(read_log(log)):
        disk.feed(number, record)
        if number >= cut:
            break
    told = disk.crash(seed)
    disk.materialise(keep)
    return asdict(told)
