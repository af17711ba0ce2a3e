"""Commands of a gateway: `edgesync gateway|token|device|publish|assign|unassign|events`.

Only typer is imported until a command runs. Each command opens the data directory, calls one verb of
``gateway.service`` and prints what it returned.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from edgesync.storage.datadir import DataDir
    from gateway.config import GatewaySettings
    from gateway.service.bundles import Published
    from gateway.store import GatewayStore

DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="EDGESYNC_DATA", help="Data directory.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
SelectorOption = Annotated[
    str | None,
    typer.Option(
        "-l",
        "--selector",
        help="Label selector, as kubectl's: 'region=eu,site!=lab'.",
        show_default=False,
    ),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option("--device", help="Device id; may be repeated.", show_default=False),
]
AllOption = Annotated[bool, typer.Option("--all", help="Every accepted device.")]


def _group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)


gateway_app = _group("This machine's gateway.")
token_app = _group("Tokens that let machines join.")
device_app = _group("The gateway's register of devices (this machine's agent is `edgesync agent`).")
publish_app = _group("Publish something to the fleet.")


def mount(app: typer.Typer) -> None:
    app.add_typer(gateway_app, name="gateway")
    app.add_typer(token_app, name="token")
    app.add_typer(device_app, name="device")
    app.add_typer(publish_app, name="publish")
    app.command("assign")(assign)
    app.command("unassign")(unassign)
    app.command("events")(events)


def _data_dir(data: Path | None, *, keep_reading: bool = True) -> "DataDir":
    from edgesync.storage import datadir
    from gateway.acting import become_owner

    path = datadir.choose_path("gateway", data)
    become_owner(path, keep_reading=keep_reading)
    return datadir.DataDir.open(path, "gateway")


def _store(data: Path | None) -> "AbstractContextManager[GatewayStore]":
    from gateway.store import GatewayStore

    return GatewayStore.open(_data_dir(data))


def _settings(directory: "DataDir", flags: dict[str, Any] | None = None) -> "GatewaySettings":
    from edgesync import config
    from gateway.config import GatewaySettings

    return config.load(GatewaySettings, directory.config, flags=flags).values


def _labels(pairs: list[str] | None) -> dict[str, str]:
    from edgesync.selectors import parse_label

    return dict(parse_label(pair) for pair in pairs or ())


def _when(seconds: float | None) -> str:
    import datetime as dt

    if seconds is None:
        return "never"
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _bundle(text: str) -> tuple[str, str | None]:
    """``N[@V]``. Raises UsageError."""
    from edgesync import manifest
    from edgesync.errors import UsageError, VerificationError

    name, at, version = text.partition("@")
    try:
        manifest.check_name(name)
        return name, manifest.check_version(version) if at else None
    except VerificationError as exc:
        raise UsageError(str(exc)) from exc


# --- gateway -------------------------------------------------------------------------------------------------------
@gateway_app.command("init")
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


@gateway_app.command("run")
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
            help="Bytes per second to devices: 500kB, 4MB, 4MiB.",
            show_default=False,
        ),
    ] = None,
    data: DataOption = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM."""
    directory = _data_dir(data, keep_reading=False)
    settings = _settings(
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


@gateway_app.command("broker-config")
def gateway_broker_config(
    broker: Annotated[str, typer.Argument(metavar="mosquitto|emqx", help="For which broker.")],
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="Where it shall listen.")
    ] = 8883,
    data: DataOption = None,
) -> None:
    """Print configuration and access rules for a broker of your own; devices use it with the setting broker."""
    from gateway import broker_config, fleet

    with _store(data) as store:
        site = broker_config.BrokerSite(gateway=fleet.load(store).gateway_id, port=port)
    typer.echo(broker_config.broker_config(broker, site), nl=False)


@gateway_app.command("status")
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

    with _store(data) as store:
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
        typer.echo(f"running  process {now['pid']} since {_when(now['started'])}")
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
    replication = now["min_site_replication"]
    typer.echo(f"copies   {'nothing active' if replication is None else replication}")
    typer.echo(f"sent     {output.size(now['bytes_out'])}")
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
        [
            (role["role"], role["version"] or "-", _when(role["expires"]))
            for role in now["metadata"]
        ],
    )
    missing = [key["role"] for key in now["keys"] if not key["readable"]]
    typer.echo(
        f"keys     not here: {', '.join(missing)}" if missing else "keys     all readable here"
    )
    for problem in now["problems"]:
        typer.echo(f"problem: {output.clean(problem)}")


# --- tokens --------------------------------------------------------------------------------------------------------
@token_app.command("create")
def token_create(
    ttl: Annotated[str, typer.Option("--ttl", help="How long it may be used: 30m, 1h, 7d.")] = "1h",
    uses: Annotated[int, typer.Option("--uses", help="How many machines may use it.")] = 1,
    site: Annotated[
        str | None,
        typer.Option("--site", help="Site of the machines that use it.", show_default=False),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Label k=v; may be repeated.", show_default=False),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware", help="Hardware type, whatever the machine says.", show_default=False
        ),
    ] = None,
    id_pattern: Annotated[
        str | None,
        typer.Option("--id", help="Ids it is good for, such as cam-*.", show_default=False),
    ] = None,
    auto_accept: Annotated[
        bool,
        typer.Option("--auto-accept", help="Let machines in at once even with more than one use."),
    ] = False,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Make a token and print the command that joins a machine with it. It is shown once."""
    import time

    from edgesync.cli import output
    from edgesync.config import parse_duration
    from edgesync.errors import UsageError
    from gateway.service import setup, tokens

    try:
        ttl_s = parse_duration(ttl)
    except ValueError as exc:
        raise UsageError(f"--ttl: {exc}") from exc
    directory = _data_dir(data)
    settings = _settings(directory)
    from gateway.store import GatewayStore

    with GatewayStore.open(directory) as store:
        root_version, root_sha256 = setup.repository(store).root_pin()
        made = tokens.create(
            store,
            root_version=root_version,
            root_sha256=root_sha256,
            addresses=setup.advertised(settings),
            utc_now=time.time(),
            ttl_s=ttl_s,
            uses=uses,
            site=site,
            labels=_labels(label),
            hardware=hardware,
            id_pattern=id_pattern,
            auto_accept=auto_accept,
        )
    if json:
        output.print_json(
            {
                "schema": "edgesync.token/1",
                "id": made.id,
                "token": made.token,
                "join_command": made.join_command,
                "expires": made.expires,
                "uses": made.uses,
                "pending": made.pending,
            }
        )
        return
    typer.echo(
        f"token {made.id}, {made.uses} use{'s' if made.uses > 1 else ''}, until {_when(made.expires)}:"
    )
    typer.echo(made.token)
    typer.echo("on the machine that shall join:")
    typer.echo(made.join_command)
    if made.pending:
        typer.echo(
            "machines wait for `edgesync device accept ID` (make it with --auto-accept to let them in at once)"
        )


@token_app.command("list")
def token_list(data: DataOption = None, json: JsonOption = False) -> None:
    """List tokens; what they say is not kept."""
    import time

    from edgesync.cli import output
    from gateway.service import tokens

    with _store(data) as store:
        rows = tokens.list_tokens(store, utc_now=time.time())
    if json:
        output.print_json({"schema": "edgesync.tokens/1", "tokens": rows})
        return
    output.print_table(
        ("TOKEN", "STATE", "USED", "EXPIRES", "LABELS", "HARDWARE", "IDS"),
        [
            (
                row["id"],
                row["state"],
                f"{row['used']}/{row['uses']}",
                _when(row["expires"]),
                _label_text(row["labels"]),
                row["hardware"] or "-",
                row["id_pattern"] or "-",
            )
            for row in rows
        ],
    )


@token_app.command("revoke")
def token_revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID")], data: DataOption = None
) -> None:
    """Let no further machine join with a token."""
    import time

    from gateway.service import tokens

    with _store(data) as store:
        tokens.revoke(store, token_id, utc_now=time.time())
    typer.echo(f"token {token_id} is revoked; machines that joined with it stay")


# --- devices -------------------------------------------------------------------------------------------------------
def _label_text(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items()) or "-"


@device_app.command("list")
def device_list(
    selector: SelectorOption = None, data: DataOption = None, json: JsonOption = False
) -> None:
    """List devices: state, site and why, versions held, last seen and what they wait for."""
    from edgesync import selectors
    from edgesync.cli import output
    from gateway.service import devices

    with _store(data) as store:
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
                "online" if row["online"] else _when(row["last_seen"]),
                row["site"],
                row["site_why"],
                row["agent_version"] or "-",
                ",".join(f"{b['name']}@{b['version']}" for b in row["bundles"]) or "-",
                row["waiting"] or "-",
            )
            for row in rows
        ],
    )


@device_app.command("show")
def device_show(
    device_id: Annotated[str, typer.Argument(metavar="ID")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Show one device with its bundles, assignments and executions."""
    from edgesync.cli import output
    from gateway.service import devices

    with _store(data) as store:
        row = devices.show(store, device_id)
    if json:
        output.print_json({"schema": "edgesync.device/1", **row})
        return
    lists = ("bundles", "assignments", "executions")
    for key, value in row.items():
        if key in lists:
            continue
        shown = _when(value) if key in {"joined", "last_seen"} else value
        shown = _label_text(value) if key == "labels" else shown
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


@device_app.command("label")
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
    setting = _labels(
        [change for change in changes if not (change.endswith("-") and "=" not in change)]
    )
    with _store(data) as store:
        labels = devices.label(store, device_id, setting=setting, removing=removing)
        assignments.follow(store, [device_id])
    if json:
        output.print_json({"schema": "edgesync.device-labels/1", "id": device_id, "labels": labels})
        return
    typer.echo(f"{device_id}: {_label_text(labels)}")


@device_app.command("accept")
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

    with _store(data) as store:
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


@device_app.command("reject")
def device_reject(
    device_ids: Annotated[list[str], typer.Argument(metavar="ID")],
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Refuse devices that wait; their keys cannot join again unless accepted later."""
    from edgesync.cli import output
    from gateway.service import devices

    with _store(data) as store:
        changed = [device_id for device_id in device_ids if devices.reject(store, device_id)]
    if json:
        output.print_json({"schema": "edgesync.device-reject/1", "rejected": changed})
        return
    typer.echo(f"rejected {len(changed)}: {', '.join(changed)}" if changed else "nothing to reject")


# --- bundles -------------------------------------------------------------------------------------------------------
@publish_app.command("bundle")
def publish_bundle(
    path: Annotated[Path, typer.Argument(help="Folder or file to publish.")],
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
        name, version = _bundle(bundle)
    if name is None or version is None:
        raise UsageError("name the bundle and its version: N@V, or --name N --version V")
    _bundle(f"{name}@{version}")
    kinds = {known: known for known in manifest.KINDS}
    if kind not in kinds:
        raise UsageError(f"--kind {kind!a} is not one of {', '.join(kinds)}")
    if access not in {"fleet", "assigned"}:
        raise UsageError(f"--access {access!a} is not fleet or assigned")
    path = path.absolute()
    directory = _data_dir(data)
    with (
        GatewayStore.open(directory) as store,
        output.Progress(f"publishing {name}@{version}") as progress,
    ):
        published = bundles.publish(
            store,
            setup.repository(store),
            path,
            name,
            version,
            kind=kinds[kind],
            hardware=hardware or [],
            release_counter=release_counter,
            access="fleet" if access == "fleet" else "assigned",
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
    typer.echo(f"wire     {size(published.wire_bytes)}, {size(published.new_wire_bytes)} of it new")
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

    name, version = _bundle(bundle)
    try:
        limit_s = parse_duration(timeout) if timeout is not None else None
    except ValueError as exc:
        raise UsageError(f"--timeout: {exc}") from exc
    with _store(data) as store:
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
                f"{made.name}@{made.version} is assigned to {_devices(len(made.devices))}{rule}"
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

    bundle_name, version = _bundle(name)
    with _store(data) as store:
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
    typer.echo(f"{bundle_name} is no longer assigned to {_devices(len(changed))}")


def _devices(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


# --- events --------------------------------------------------------------------------------------------------------
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
    with _store(data) as store:
        chosen = selectors.parse(selector) if selector is not None else None
        for event in service.read(store, after=since, follow=follow, selector=chosen):
            # ASCII: a remote name cannot drive the terminal this may be printed on.
            sys.stdout.write(json_module.dumps(event, separators=(",", ":")) + "\n")
            if follow:
                sys.stdout.flush()


class GatewayRole:
    """What `edgesync bundle …` and `edgesync config show` ask of a gateway's directory."""

    def bundle_list(self, data: Path) -> list[dict[str, object]]:
        from gateway.service import bundles

        with _store(data) as store:
            return bundles.list_bundles(store)

    def bundle_show(self, data: Path, bundle: str) -> dict[str, object]:
        from gateway.service import bundles

        with _store(data) as store:
            return bundles.show(store, *_full(bundle))

    def bundle_verify(self, data: Path, bundle: str) -> dict[str, object]:
        from gateway.service import bundles

        with _store(data) as store:
            return bundles.verify(store, *_full(bundle))

    def bundle_remove(self, data: Path, bundle: str) -> dict[str, object]:
        from gateway.service import bundles, setup

        with _store(data) as store:
            return bundles.remove(store, setup.repository(store), *_full(bundle))

    def config_show(self, data: Path) -> list[dict[str, object]]:
        from edgesync import config
        from gateway.config import GatewaySettings

        return config.show(config.load(GatewaySettings, _data_dir(data).config))


def _full(bundle: str) -> tuple[str, str]:
    from edgesync.errors import UsageError

    name, version = _bundle(bundle)
    if version is None:
        raise UsageError(f"name the version: {name}@VERSION")
    return name, version


ROLE = GatewayRole()
