"""Writes ``docs/state-machines.md`` from the ``TRANSITIONS`` tables of the decision cores.

``python -m edgesync.testing.state_docs docs/state-machines.md``; a test compares the file with ``render()``. Cores are
found by walking packages named here as text: this package imports neither side.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final

PACKAGES: Final = ("device.core", "gateway.core", "edgesync.peer")
HEADER: Final = """# State machines

Made from the `TRANSITIONS` tables in the code by `make docs`; do not edit. A pair that is in no table is either listed
under *ignored* or a mistake of the caller, which raises.
"""


def machines() -> Iterator[ModuleType]:
    """Modules that have a table, by name."""
    for package in PACKAGES:
        for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
            module = importlib.import_module(f"{package}.{found.name}")
            if hasattr(module, "TRANSITIONS"):
                yield module


def render() -> str:
    return HEADER + "".join(_render(module) for module in machines())


def _render(module: ModuleType) -> str:
    summary = (module.__doc__ or "").strip().partition("\n")[0]
    table: dict[tuple[Any, type[Any]], Any] = module.TRANSITIONS
    ignored = sorted(
        {(state.value, event.__name__) for state, event in getattr(module, "IGNORED", ())}
    )
    lines = [f"\n## `{module.__name__}`\n", f"\n{summary}\n", "\n```mermaid\nstateDiagram-v2\n"]
    names = {state: state.name for state in type(next(iter(table))[0])}
    lines += [f"    {name}: {state.value}\n" for state, name in names.items()]
    lines += [
        f"    {names[state]} --> {names[after]}: {event.__name__}\n"
        for (state, event), after in table.items()
    ]
    lines += ["```\n", "\n| state | event | next |\n|---|---|---|\n"]
    lines += [
        f"| {state.value} | {event.__name__} | {after.value} |\n"
        for (state, event), after in table.items()
    ]
    if ignored:
        by_state: dict[str, list[str]] = {}
        for state, event in ignored:
            by_state.setdefault(state, []).append(event)
        lines.append("\nIgnored:\n\n")
        lines += [f"- {state}: {', '.join(events)}\n" for state, events in by_state.items()]
    return "".join(lines)


def main(arguments: list[str]) -> int:
    text = render()
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
