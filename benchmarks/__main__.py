"""`make bench`: timings and memory of the real programs, one row a figure. Never part of the tests.

``python -m benchmarks [NAME …]`` runs the named ones. Quote medians and ratios from a quiet machine: each row says how
it was taken, and bars are stated beside figures that have one.
"""

import importlib
import pkgutil
import platform
import sys

import benchmarks


def main() -> int:
    names = sys.argv[1:] or sorted(
        module.name
        for module in pkgutil.iter_modules(benchmarks.__path__)
        if not module.name.startswith("_")
    )
    print(f"{platform.python_implementation()} {platform.python_version()} on {platform.machine()}")
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        if not hasattr(module, "run"):  # those that need root and hours have commands of their own
            continue
        print(f"== {name}", flush=True)
        for row in module.run():
            print(f"   {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
