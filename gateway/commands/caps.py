"""`edgesync caps …`: rate caps of the gateway, of sites and of devices, obeyed within seconds."""

from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.options import (
    DataOption,
    JsonOption,
    group,
    open_store,
    warn_if_empty,
    when,
)

if TYPE_CHECKING:
    from edgesync.wire.mqtt import CapScope

app = group("Rate caps by time of day, obeyed within seconds and without a restart.")

SiteOption = Annotated[
    str | None,
    typer.Option("--site", help="All devices of this site together.", show_default=False),
]
OneDeviceOption = Annotated[
    str | None, typer.Option("--device", help="This device.", show_default=False)
]
GatewayOption = Annotated[bool, typer.Option("--gateway", help="All this gateway sends.")]


@app.command("set")
def caps_set(
    site: SiteOption = None,
    device: OneDeviceOption = None,
    gateway: GatewayOption = False,
    upload: Annotated[
        str | None,
        typer.Option(
            "--upload", help="Such as 200kB/s or '08:00-18:00 200kB/s; 2MB/s'.", show_default=False
        ),
    ] = None,
    download: Annotated[
        str | None, typer.Option("--download", help="As --upload.", show_default=False)
    ] = None,
    between: Annotated[
        str | None,
        typer.Option("--between", help="Only at these times: 08:00-18:00.", show_default=False),
    ] = None,
    zone: Annotated[
        str, typer.Option("--zone", help="Zone of the times, such as Europe/Rome.")
    ] = "UTC",
    lasts: Annotated[
        str | None,
        typer.Option("--for", help="Lift it after this long: 2h, 7d.", show_default=False),
    ] = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Set the cap of the gateway, a site or a device; replaces the one it had."""
    import time

    from edgesync.cli import output
    from edgesync.config import parse_duration
    from edgesync.errors import UsageError
    from gateway.service import caps

    with open_store(data) as store:
        scope, target = _target(store, site, device, gateway)
        if scope == "gateway" and download is not None:
            raise UsageError("a gateway downloads nothing worth a cap: use --upload")
        now = time.time()
        try:
            until = now + parse_duration(lasts) if lasts is not None else None
        except ValueError as exc:
            raise UsageError(f"--for: {exc}") from exc
        if until == now:
            raise UsageError("--for: a cap that lasts no time is none; caps clear lifts one")
        entry = caps.set_cap(
            store,
            scope=scope,
            target=target,
            upload=_timed(upload, between),
            download=_timed(download, between),
            zone=zone,
            until=until,
            utc_now=now,
        )
        if scope == "site":
            warn_if_empty(store, target)
    if json:
        output.print_json(
            {
                "schema": "edgesync.caps-set/1",
                "scope": entry.scope,
                "target": entry.target,
                "upload": entry.upload,
                "download": entry.download,
                "zone": entry.zone,
                "until": entry.until,
            }
        )
        return
    for word, text in (("upload", entry.upload), ("download", entry.download)):
        if text:
            typer.echo(f"{scope} {target}: {word} {text} ({entry.zone})")


@app.command("list")
def caps_list(data: DataOption = None, json: JsonOption = False) -> None:
    """List the caps that are set and what each comes to now."""
    import time

    from edgesync import caps as schedules
    from edgesync.cli import output
    from gateway.service import caps

    with open_store(data) as store:
        rows = caps.list_caps(store, utc_now=time.time())
    if json:
        output.print_json({"schema": "edgesync.caps/1", "caps": rows})
        return

    def now(rate: int) -> str:
        return schedules.rate_text(rate) if rate else "-"

    output.print_table(
        ("SCOPE", "TARGET", "UPLOAD", "DOWNLOAD", "ZONE", "UP NOW", "DOWN NOW", "UNTIL"),
        [
            (
                row["scope"],
                row["target"],
                row["upload"] or "-",
                row["download"] or "-",
                row["zone"],
                now(row["upload_now"]),
                now(row["download_now"]),
                when(row["until"]),
            )
            for row in rows
        ],
    )


@app.command("clear")
def caps_clear(
    site: SiteOption = None,
    device: OneDeviceOption = None,
    gateway: GatewayOption = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Lift the cap of the gateway, a site or a device."""
    import time

    from edgesync.cli import output
    from gateway.service import caps

    with open_store(data) as store:
        scope, target = _target(store, site, device, gateway)
        caps.clear(store, scope=scope, target=target, utc_now=time.time())
    if json:
        output.print_json({"schema": "edgesync.caps-clear/1", "scope": scope, "target": target})
        return
    typer.echo(f"the cap of {scope} {target} is lifted")


def _target(
    store: object, site: str | None, device: str | None, gateway: bool
) -> "tuple[CapScope, str]":
    from edgesync.errors import UsageError
    from gateway import fleet
    from gateway.store import GatewayStore

    assert isinstance(store, GatewayStore)
    if sum((site is not None, device is not None, gateway)) != 1:
        raise UsageError("say whose cap it is: one of --site NAME, --device ID, --gateway")
    if site is not None:
        return "site", site
    if device is not None:
        return "device", device
    return "gateway", fleet.load(store).gateway_id


def _timed(text: str | None, between: str | None) -> str:
    if text is None:
        return ""
    return f"{between} {text}" if between is not None else text
