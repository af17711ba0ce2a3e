"""`edgesync gateway …`: this machine's gateway."""

from typing import Annotated, Any

import typer

from gateway.commands.options import (
    DataOption,
    JsonOption,
    group,
    load_settings,
    open_data,
    open_store,
    when,
)

app = group("This machine's gateway.")


@app.command("init")
def gateway_init(
    name: Annotated[str, typer.Argument(help="Name of the fleet.")] = "fleet",
    advertise: Annotated[
        list[str] | None,
        typer.Option(
            "--advertise",
            help="Where devices reach this machine, HOST[:PORT]; may be repeated.",
            show_default=False,
        ),
    ] = None,
    region: Annotated[
        str, typer.Option("--region", help="Name of this gateway's territory.")
    ] = "main",
    threshold: Annotated[
        str, typer.Option("--threshold", help="Signatures a root or targets change needs, M-of-N.")
    ] = "1-of-1",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Make a new fleet: keys, signed metadata, certificate authority, this gateway's identity and settings."""
    from edgesync.cli import output
    from edgesync.storage import datadir
    from gateway.service import setup

    made = setup.init(
        datadir.choose_path("gateway", data),
        name=name,
        advertise=advertise or [],
        region=region,
        threshold=setup.parse_threshold(threshold),
    )
    if json:
        output.print_json({"schema": "edgesync.gateway-init/1", **made})
        return
    typer.echo(
        f"fleet {made['name']} ({made['fleet_id'][:12]}), region {made['region']}, gateway {made['gateway_id']}"
    )
    typer.echo(f"data      {made['data']}")
    typer.echo(f"settings  {made['config']}")
    typer.echo(f"keys      {made['keys']}: move this folder to a safe place and keep a copy")
    tail = "" if data is None else f" --data {data}"
    typer.echo(f"next: edgesync gateway run{tail}")


@app.command("run")
def gateway_run(
    listen_quic: Annotated[
        str | None,
        typer.Option(
            "--listen-quic", help="Where devices reach it by QUIC, HOST:PORT.", show_default=False
        ),
    ] = None,
    listen_mqtt: Annotated[
        str | None,
        typer.Option(
            "--listen-mqtt", help="Where the embedded broker listens.", show_default=False
        ),
    ] = None,
    listen_http: Annotated[
        str | None,
        typer.Option(
            "--listen-http", help="Where /livez, /readyz and /metrics are.", show_default=False
        ),
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(
            "--broker",
            help="Use this broker, mqtts://HOST[:PORT], not the embedded one.",
            show_default=False,
        ),
    ] = None,
    upload_limit: Annotated[
        str | None,
        typer.Option(
            "--upload-limit",
            help="Bytes per second to devices: 500kB, 4MiB, or '08:00-18:00 200kB/s; 2MB/s'.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM."""
    directory = open_data(data, keep_reading=False)
    settings = load_settings(
        directory,
        {
            "listen_quic": listen_quic,
            "listen_mqtt": listen_mqtt,
            "listen_http": listen_http,
            "broker": broker,
            "upload_limit": upload_limit,
        },
    )
    from gateway import daemon

    daemon.run(directory, settings)


@app.command("broker-config")
def gateway_broker_config(
    broker: Annotated[str, typer.Argument(metavar="mosquitto|emqx", help="For which broker.")],
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Where it shall listen.")
    ] = 8883,
    data: DataOption = None,
) -> None:
    """Print configuration and access rules for a broker of your own; devices use it with the setting broker."""
    from gateway import broker_config, fleet

    with open_store(data) as store:
        site = broker_config.BrokerSite(gateway=fleet.load(store).gateway_id, port=port)
    typer.echo(broker_config.broker_config(broker, site), nl=False)


@app.command("status")
def gateway_status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Print again each second until interrupted.")
    ] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Broker, devices, active bundles, bytes out, replication, metadata expiry and readable keys."""
    import sys
    import time

    from edgesync.cli import output
    from gateway.service import status

    with open_store(data) as store:
        while True:
            now = status.read(store, utc_now=time.time())
            if json:
                output.print_json(now)
            else:
                if watch and sys.stdout.isatty():
                    typer.echo("\x1b[2J\x1b[H", nl=False)
                _print_status(now)
            if not watch:
                return
            time.sleep(1.0)


def _print_status(now: dict[str, Any]) -> None:
    from edgesync.cli import output

    broker, devices = now["broker"], now["devices"]
    typer.echo(f"fleet    {now['fleet']} region {now['region']} gateway {now['gateway']}")
    if now["running"]:
        typer.echo(f"running  process {now['pid']} since {when(now['started'])}")
        state = (
            "connected"
            if broker["connected"]
            else f"not connected: {output.clean(broker['error'])}"
        )
        typer.echo(f"broker   {broker['kind']} {output.clean(broker['url'])} {state}")
    else:
        typer.echo("running  no")
    counts = ", ".join(f"{count} {state}" for state, count in devices.items())
    typer.echo(f"devices  {counts}")
    blocked = [site for site in now["sites"] if site["udp_blocked"]]
    if blocked:
        said = ", ".join(f"{site['udp_blocked']} at {site['site']}" for site in blocked[:8])
        more = f" and {len(blocked) - 8} more sites" if len(blocked) > 8 else ""
        typer.echo(f"tls      UDP is blocked for devices online: {output.clean(said)}{more}")
    replication = now["min_site_replication"]
    typer.echo(f"copies   {'nothing active' if replication is None else replication}")
    typer.echo(f"sent     {output.size(now['bytes_out'])}")
    if now["quic"] and now["quic"].get("controllers"):
        said = ", ".join(f"{count} by {name}" for name, count in now["quic"]["controllers"].items())
        typer.echo(f"sessions {said}")
    for cap in now["caps"]:
        typer.echo(f"cap      {output.clean(cap['what'])} {output.clean(cap['text'])}")
    for one in now["budgets"]:
        typer.echo(f"budget   site {output.clean(one['site'])}: {one['text']}")
    if now["sites"]:
        output.print_table(
            ("SITE", "DEVICES", "SENT"),
            [
                (site["site"], site["devices"], output.size(site["bytes_out"]))
                for site in now["sites"]
            ],
        )
    if now["bundles"]:
        output.print_table(
            ("BUNDLE", "KIND", "ASSIGNED", "DONE", "FAILED", "WORKING"),
            [
                (
                    f"{b['name']}@{b['version']}",
                    b["kind"],
                    b["assigned"],
                    b["succeeded"],
                    b["failed"],
                    b["in_progress"],
                )
                for b in now["bundles"]
            ],
        )
    output.print_table(
        ("METADATA", "VERSION", "EXPIRES"),
        [(role["role"], role["version"] or "-", when(role["expires"])) for role in now["metadata"]],
    )
    missing = [key["role"] for key in now["keys"] if not key["readable"]]
    typer.echo(
        f"keys     not here: {', '.join(missing)}" if missing else "keys     all readable here"
    )
    for problem in now["problems"]:
        typer.echo(f"problem: {output.clean(problem)}")
