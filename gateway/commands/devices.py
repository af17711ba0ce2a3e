"""`edgesync device …`: the gateway's register."""

from typing import Annotated

import typer

from gateway.commands.options import (
    DataOption,
    JsonOption,
    SelectorOption,
    group,
    label_text,
    open_store,
    parse_labels,
    when,
)

app = group("The gateway's register of devices (this machine's agent is `edgesync agent`).")


@app.command("list")
def device_list(
    selector: SelectorOption = None, data: DataOption = None, json: JsonOption = False
) -> None:
    """List devices: state, site and why, versions held, last seen and what they wait for."""
    from edgesync import selectors
    from edgesync.cli import output
    from gateway.service import devices

    with open_store(data) as store:
        rows = devices.list_devices(
            store, selectors.parse(selector) if selector is not None else None
        )
    if json:
        output.print_json({"schema": "edgesync.devices/1", "devices": rows})
        return
    output.print_table(
        ("DEVICE", "STATE", "SEEN", "SITE", "WHY", "AGENT", "HOLDS", "WAITING"),
        [
            (
                row["id"],
                row["state"],
                "online" if row["online"] else when(row["last_seen"]),
                row["site"],
                row["site_why"],
                row["agent_version"] or "-",
                ",".join(
                    f"{b['name']}@{b['version']}"
                    for b in row["bundles"]
                    if b["state"] == "succeeded"  # the rest is on its way, or was given up
                )
                or "-",
                row["waiting"] or "-",
            )
            for row in rows
        ],
    )


@app.command("show")
def device_show(
    device_id: Annotated[str, typer.Argument(metavar="ID")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show one device with its bundles, assignments and executions."""
    from edgesync.cli import output
    from gateway.service import devices

    with open_store(data) as store:
        row = devices.show(store, device_id)
    if json:
        output.print_json({"schema": "edgesync.device/1", **row})
        return
    lists = ("bundles", "assignments", "executions")
    for key, value in row.items():
        if key in lists:
            continue
        shown = when(value) if key in {"joined", "last_seen"} else value
        shown = label_text(value) if key == "labels" else shown
        typer.echo(f"{key:<14} {output.clean(shown)}")
    for heading in lists:
        for entry in row[heading]:
            detail = " ".join(
                f"{key}={output.clean(value)}"
                for key, value in entry.items()
                if key not in {"name", "version", "counters", "digest"} and value not in {None, ""}
            )
            typer.echo(
                f"{heading[:-1]:<14} {output.clean(entry['name'])}@{output.clean(entry['version'])} {detail}"
            )


@app.command("label")
def device_label(
    device_id: Annotated[str, typer.Argument(metavar="ID")],
    changes: Annotated[
        list[str], typer.Argument(metavar="K=V|K-", help="k=v sets a label, k- removes it.")
    ],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Set or remove labels of a device."""
    from edgesync.cli import output
    from gateway.service import assignments, devices

    removing = [change[:-1] for change in changes if change.endswith("-") and "=" not in change]
    setting = parse_labels(
        [change for change in changes if not (change.endswith("-") and "=" not in change)]
    )
    with open_store(data) as store:
        labels = devices.label(store, device_id, setting=setting, removing=removing)
        assignments.follow(store, [device_id])
    if json:
        output.print_json({"schema": "edgesync.device-labels/1", "id": device_id, "labels": labels})
        return
    typer.echo(f"{device_id}: {label_text(labels)}")


@app.command("accept")
def device_accept(
    device_ids: Annotated[list[str] | None, typer.Argument(metavar="ID")] = None,
    selector: SelectorOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Every pending device.")] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Let devices in that joined and wait; standing rules of assign --follow then apply to them."""
    from edgesync import selectors
    from edgesync.cli import output
    from gateway.service import assignments, devices, setup

    with open_store(data) as store:
        certify = setup.certifier(store)
        rows = devices.select(
            store,
            ids=device_ids or (),
            selector=selectors.parse(selector) if selector is not None else None,
            everything=everything,
            states=("pending", "rejected", "accepted") if device_ids else ("pending",),
        )
        changed = []
        for row in rows:
            with store.atomic():
                if devices.accept(store, row["id"], certify):
                    assignments.follow(store, [row["id"]])
                    changed.append(row["id"])
    if json:
        output.print_json({"schema": "edgesync.device-accept/1", "accepted": changed})
        return
    typer.echo(f"accepted {len(changed)}: {', '.join(changed)}" if changed else "nothing to accept")


@app.command("reject")
def device_reject(
    device_ids: Annotated[list[str], typer.Argument(metavar="ID")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Refuse devices that wait; their keys cannot join again unless accepted later."""
    from edgesync.cli import output
    from gateway.service import devices

    with open_store(data) as store:
        changed = [device_id for device_id in device_ids if devices.reject(store, device_id)]
    if json:
        output.print_json({"schema": "edgesync.device-reject/1", "rejected": changed})
        return
    typer.echo(f"rejected {len(changed)}: {', '.join(changed)}" if changed else "nothing to reject")
