"""`edgesync events`: the append-only log."""

from typing import Annotated

import typer

from gateway.commands.options import (
    DataOption,
    SelectorOption,
    open_store,
)


def events(
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for what is still to come.")
    ] = False,
    since: Annotated[
        int, typer.Option("--since", metavar="ID", help="Only events after this id.")
    ] = 0,
    selector: SelectorOption = None,
    data: DataOption = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON lines, which is what it prints anyway.")
    ] = True,
) -> None:
    """Print what happened as JSON lines, oldest first. Remember the last id to go on from there."""
    import json as json_module
    import sys

    from edgesync import selectors
    from gateway.service import events as service

    del json
    with open_store(data) as store:
        chosen = selectors.parse(selector) if selector is not None else None
        for event in service.read(store, after=since, follow=follow, selector=chosen):
            # ASCII: a remote name cannot drive the terminal this may be printed on.
            sys.stdout.write(json_module.dumps(event, separators=(",", ":")) + "\n")
            if follow:
                sys.stdout.flush()
