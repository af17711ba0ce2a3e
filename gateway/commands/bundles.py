"""`edgesync publish`, `assign` and `unassign`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.options import (
    AllOption,
    DataOption,
    DeviceOption,
    JsonOption,
    SelectorOption,
    count_devices,
    group,
    open_data,
    open_store,
    parse_bundle,
)

if TYPE_CHECKING:
    from gateway.service.bundles import Published

publish_app = group("Publish something to the fleet.")


@publish_app.command("bundle")
def publish_bundle(
    path: Annotated[str, typer.Argument(help="Folder or file to publish.")],
    bundle: Annotated[str | None, typer.Argument(metavar="N@V", help="Name and version.")] = None,
    name: Annotated[str | None, typer.Option("--name", show_default=False)] = None,
    version: Annotated[str | None, typer.Option("--version", show_default=False)] = None,
    kind: Annotated[str, typer.Option("--kind", help="firmware, model or files.")] = "files",
    hardware: Annotated[
        list[str] | None,
        typer.Option(
            "--hardware",
            help="Hardware it is for; may be repeated (default: any).",
            show_default=False,
        ),
    ] = None,
    release_counter: Annotated[
        int | None,
        typer.Option(
            "--release-counter",
            help="Security floor: raising it forbids going back (default: as the version before).",
            show_default=False,
        ),
    ] = None,
    access: Annotated[
        str, typer.Option("--access", help="Who may read it: fleet (every member) or assigned.")
    ] = "fleet",
    mutable: Annotated[
        list[str] | None,
        typer.Option(
            "--mutable",
            metavar="GLOB",
            help="Files applications may change, such as data/*.db; may be repeated.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count and hash, store and sign nothing.")
    ] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Chunk, hash, store and sign a folder as one version of a bundle; the running gateway announces it."""
    import dataclasses

    from edgesync import manifest
    from edgesync.cli import output
    from edgesync.errors import UsageError
    from gateway.service import bundles, setup
    from gateway.store import GatewayStore

    if bundle is not None:
        if name is not None or version is not None:
            raise UsageError("give the bundle either as N@V or with --name and --version")
        name, version = parse_bundle(bundle)
    if name is None or version is None:
        raise UsageError("name the bundle and its version: N@V, or --name N --version V")
    parse_bundle(f"{name}@{version}")
    kinds = {known: known for known in manifest.KINDS}
    if kind not in kinds:
        raise UsageError(f"--kind {kind!a} is not one of {', '.join(kinds)}")
    if access not in {"fleet", "assigned"}:
        raise UsageError(f"--access {access!a} is not fleet or assigned")
    # As a Path an empty text is the working directory, which an unset shell variable must not publish.
    if not path:
        raise UsageError("the folder or file to publish is empty: name one, or . for this folder")
    source = Path(path).absolute()
    directory = open_data(data)
    with (
        GatewayStore.open(directory) as store,
        output.Progress(f"publishing {name}@{version}") as progress,
    ):
        published = bundles.publish(
            store,
            setup.repository(store),
            source,
            name,
            version,
            kind=kinds[kind],
            hardware=hardware or [],
            release_counter=release_counter,
            access="fleet" if access == "fleet" else "assigned",
            mutable=mutable or [],
            dry_run=dry_run,
            progress=progress.update,
        )
    if json:
        output.print_json({"schema": "edgesync.published/1", **dataclasses.asdict(published)})
        return
    _print_published(published, dry_run=dry_run)


def _print_published(published: "Published", *, dry_run: bool) -> None:
    from edgesync.cli import output

    size = output.size
    typer.echo(f"{published.name}@{published.version} ({published.kind}), id {published.id}")
    if published.already_published:
        typer.echo("published already with this content: nothing changed")
    typer.echo(
        f"payload  {size(published.payload_bytes)} in {published.files} files, {published.pieces} pieces"
    )
    new = "" if published.already_published else f", {size(published.new_wire_bytes)} of it new"
    typer.echo(f"wire     {size(published.wire_bytes)}{new}")
    typer.echo(f"shared   {size(published.shared_bytes)} with earlier versions of {published.name}")
    counter = published.release_counter
    back = ", ".join(published.returnable) or "none"
    typer.echo(f"counter  {counter}; versions devices can still return to: {back}")
    for path in published.left_out:
        typer.echo(f"left out {output.clean(path)}")
    if published.left_out_count > len(published.left_out):
        typer.echo(f"left out {published.left_out_count - len(published.left_out)} more")
    typer.echo("dry run: nothing was stored" if dry_run else f"took {published.seconds:.1f} s")


def assign(
    bundle: Annotated[
        str, typer.Argument(metavar="N[@V]", help="Bundle; without a version the newest.")
    ],
    device: DeviceOption = None,
    selector: SelectorOption = None,
    everything: AllOption = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until every device has it; exit 3 if one failed.")
    ] = False,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout", help="Give up waiting after this long (exit 4).", show_default=False
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="A standing rule: devices that join later get it too.")
    ] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Sign that devices shall hold a bundle, and print how many."""
    import time

    from edgesync import selectors
    from edgesync.cli import output
    from edgesync.config import parse_duration
    from edgesync.errors import UsageError
    from gateway.service import assignments

    name, version = parse_bundle(bundle)
    try:
        limit_s = parse_duration(timeout) if timeout is not None else None
    except ValueError as exc:
        raise UsageError(f"--timeout: {exc}") from exc
    with open_store(data) as store:
        made = assignments.assign(
            store,
            name,
            version,
            ids=device or (),
            selector=selectors.parse(selector) if selector is not None else None,
            selector_text=selector or "",
            everything=everything,
            follow=follow,
            utc_now=time.time(),
        )
        if not json:
            rule = "; devices that join later get it too" if follow else ""
            typer.echo(
                f"{made.name}@{made.version} is assigned to {count_devices(len(made.devices))}{rule}"
            )
            for device_id, reason in made.skipped:
                typer.echo(f"skipped {output.clean(device_id)}: {output.clean(reason)}")
        outcome = None
        if wait:
            with output.Progress(f"{made.name}@{made.version}") as progress:
                outcome = assignments.wait(store, made, timeout_s=limit_s, progress=progress.update)
    if json:
        output.print_json(
            {
                "schema": "edgesync.assigned/1",
                "name": made.name,
                "version": made.version,
                "assignment": made.assignment_id,
                "devices": made.devices,
                "skipped": [
                    {"id": device_id, "reason": reason} for device_id, reason in made.skipped
                ],
                "follow": follow,
                "outcome": outcome,
            }
        )
    assignments.judge(made, outcome)


def unassign(
    name: Annotated[str, typer.Argument(metavar="N", help="Bundle name.")],
    device: DeviceOption = None,
    selector: SelectorOption = None,
    everything: AllOption = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Sign that devices shall no longer hold a bundle; --all also ends its standing rules."""
    import time

    from edgesync import selectors
    from edgesync.cli import output
    from gateway.service import assignments

    bundle_name, version = parse_bundle(name)
    with open_store(data) as store:
        changed = assignments.unassign(
            store,
            bundle_name,
            version,
            ids=device or (),
            selector=selectors.parse(selector) if selector is not None else None,
            everything=everything,
            utc_now=time.time(),
        )
    if json:
        output.print_json(
            {"schema": "edgesync.unassigned/1", "name": bundle_name, "devices": changed}
        )
        return
    typer.echo(f"{bundle_name} is no longer assigned to {count_devices(len(changed))}")
