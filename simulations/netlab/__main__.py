"""`python -m simulations.netlab run FILE`, `verify`, `clean`."""

import argparse
import sys

from simulations.netlab.hosts import LabError, need_root, remove_left_behind
from simulations.netlab.verify import verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulations.netlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="measure every impairment with ping and iperf3")
    commands.add_parser("clean", help="remove the namespaces of runs, of running ones too")
    options = parser.parse_args()
    try:
        need_root()
        if options.command == "verify":
            return 0 if verify() else 1
        for name in remove_left_behind(everything=True):
            print(f"removed {name}")
    except LabError as exc:
        print(f"netlab: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
