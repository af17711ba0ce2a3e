"""``python -m tests.differential --seeds 10000 [--first N]``: exit 1 and the seeds that differ, if any do."""

import argparse
import sys
import time

from tests.differential import compare


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.differential")
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    started, bad = time.monotonic(), 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        for sentence in compare(seed):
            bad += 1
            print(sentence, flush=True)
        if (seed - arguments.first) % 1000 == 999:
            print(f"{seed + 1 - arguments.first} seeds, {bad} differences", flush=True)
    print(
        f"{arguments.seeds} seeds, {bad} differences, {time.monotonic() - started:.0f} s",
        flush=True,
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
