"""``python -m simulations [SCENARIO …] [--seeds N]``: run plans of the LAN swarm and print what came out."""

import sys

from simulations.scenarios import lan_swarm


def main(arguments: list[str]) -> int:
    seeds = 3
    if "--seeds" in arguments:
        position = arguments.index("--seeds")
        seeds = int(arguments[position + 1])
        del arguments[position : position + 2]
    for name in arguments or lan_swarm.PLANS:
        for seed in range(seeds):
            print(
                f"{name:14} seed {seed}: {lan_swarm.run(lan_swarm.PLANS[name], seed)}", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
