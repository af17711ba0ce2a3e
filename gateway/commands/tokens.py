"""`edgesync token …`: what lets machines join."""

from typing import Annotated

import typer

from gateway.commands.options import (
    DataOption,
    JsonOption,
    group,
    label_text,
    load_settings,
    open_data,
    open_store,
    parse_labels,
    when,
)

app = group("Tokens that let machines join.")


@app.command("create")
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
    directory = open_data(data)
    settings = load_settings(directory)
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
            labels=parse_labels(label),
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
        f"token {made.id}, {made.uses} use{'s' if made.uses > 1 else ''}, until {when(made.expires)}:"
    )
    typer.echo(made.token)
    typer.echo("on the machine that shall join:")
    typer.echo(made.join_command)
    if made.pending:
        typer.echo(
            "machines wait for `edgesync device accept ID` (make it with --auto-accept to let them in at once)"
        )


@app.command("list")
def token_list(data: DataOption = None, json: JsonOption = False) -> None:
    """List tokens; what they say is not kept."""
    import time

    from edgesync.cli import output
    from gateway.service import tokens

    with open_store(data) as store:
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
                when(row["expires"]),
                label_text(row["labels"]),
                row["hardware"] or "-",
                row["id_pattern"] or "-",
            )
            for row in rows
        ],
    )


@app.command("revoke")
def token_revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID")], data: DataOption = None
) -> None:
    """Let no further machine join with a token."""
    import time

    from gateway.service import tokens

    with open_store(data) as store:
        tokens.revoke(store, token_id, utc_now=time.time())
    typer.echo(f"token {token_id} is revoked; machines that joined with it stay")
