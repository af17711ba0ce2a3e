"""`edgesync demo`: the options; the work is in ``edgesync.demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edgesync.demo.run import Delivery


def mount(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    path: Annotated[
        Path | None, typer.Argument(help="What to publish (default: a copy of Python's library).")
    ] = None,
    update: Annotated[
        Path | None,
        typer.Option("--update", help="What to publish as the second version.", show_default=False),
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, max=64, help="How many agents.")] = 4,
    tour: Annotated[bool, typer.Option("--tour", help="Slowly, in four acts, to watch.")] = False,
    keep: Annotated[
        Path | None,
        typer.Option("--keep", help="Work in DIR and leave it behind.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Run one gateway and some agents as processes on this machine and bring them a bundle, then an update.

    Ends with 0 only if every device's tree equals the source.
    """
    import contextlib
    import tempfile

    from edgesync.cli import output
    from edgesync.demo import source
    from edgesync.demo import tour as tour_module
    from edgesync.demo.fleet import Fleet
    from edgesync.demo.run import deliver, report
    from edgesync.errors import ConflictError, EdgeSyncError, NotFoundError

    for given in (path, update):
        if given is not None and not given.exists():
            raise NotFoundError(f"{given} does not exist: name a file or a folder to publish")
    with contextlib.ExitStack() as stack:
        if keep is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgesync-demo-")))
        else:
            keep.mkdir(parents=True, exist_ok=True)
            work = keep.resolve()
            if any(work.iterdir()):
                raise ConflictError(f"{work} is not empty: name a new folder with --keep")
        say = output.narrator(quiet=json)
        if path is None:
            path = work / "v1"
            source.make_default(path)
        if update is None:
            update = work / "v2" if path.is_dir() else work / "v2" / path.name
            source.make_update(path, update)
        fleet = stack.enter_context(Fleet(work))
        if tour:
            first, second, resume = tour_module.run(fleet, path, update, devices=devices, say=say)
        else:
            resume = None
            say(f"one gateway and {devices} agents in {work}")
            fleet.init_gateway()
            fleet.start_gateway()
            for number in range(1, devices + 1):
                fleet.start_device(fleet.join(f"device-{number}"))
            fleet.wait_connected()
            say(f"publishing {path} as demo@1")
            first = deliver(fleet, path, "1")
            say("publishing the second version as demo@2")
            second = deliver(fleet, update, "2")
        if json:
            output.print_json(report(first, second, resume))
        else:
            _print_table(first, second)
            if keep is not None:
                say(f"everything is left in {work}")
        for delivery in (first, second):
            for row in delivery.devices:
                if not row["verified"]:
                    raise EdgeSyncError(
                        f"{row['id']} does not hold version {delivery.version} as published: {row['difference']}"
                    )


def _print_table(*deliveries: "Delivery") -> None:
    from edgesync.cli import output

    output.print_table(
        ("DEVICE", "VERSION", "STATE", "GATEWAY", "PEERS", "LOCAL", "SECONDS", "RSS", "EQUAL"),
        [
            (
                row["id"],
                delivery.version,
                row["state"],
                output.size(row["bytes_from_gateway"]),
                output.size(row["bytes_from_peers"]),
                output.size(row["bytes_local"]),
                row["seconds"],
                output.size(row["rss_peak_bytes"]),
                "yes" if row["verified"] else "NO",
            )
            for delivery in deliveries
            for row in delivery.devices
        ],
    )
    for delivery in deliveries:
        wire = delivery.published["wire_bytes" if delivery.version == "1" else "new_wire_bytes"]
        copies = delivery.gateway_bytes_out / wire if wire else 0.0
        typer.echo(
            f"version {delivery.version}: {output.size(delivery.published['payload_bytes'])} payload, "
            f"{output.size(wire)} to move, gateway sent {output.size(delivery.gateway_bytes_out)} "
            f"({copies:.2f} copies for {len(delivery.devices)} devices)"
        )
