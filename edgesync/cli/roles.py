"""Commands that serve either role: they read the role from the data directory and call that role's code.

This module names neither side; a role is found through the entry point group ``edgesync.roles`` and has the methods of
``Role``.
"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Protocol, cast

import typer

from edgesync.cli import output
from edgesync.errors import ConfigError, ExitCode, UsageError, VerificationError

DEFAULT_ROOT = Path("/var/lib/edgesync")
ROLE_NAMES = ("agent", "gateway")
MAX_SHOWN_PATHS = 20

DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="EDGESYNC_DATA", help="Data directory.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Role(Protocol):
    """What either role answers; all values are plain data, sizes in bytes."""

    def bundle_list(self, data: Path) -> list[dict[str, object]]: ...
    def bundle_show(self, data: Path, bundle: str) -> dict[str, object]: ...
    def bundle_verify(self, data: Path, bundle: str) -> dict[str, object]:
        """``{"name", "version", "pieces", "bad": [piece index, …]}``."""
        ...

    def bundle_remove(self, data: Path, bundle: str) -> dict[str, object]: ...
    def config_show(self, data: Path) -> list[dict[str, object]]:
        """One ``{"key", "value", "origin"}`` a setting."""
        ...


def choose(data: Path | None) -> tuple[Path, Role]:
    """The data directory and the role written in it.

    Raises UsageError: none given and both defaults exist. Raises ConfigError: there is none, or it has no role.
    """
    if data is None:
        found = [
            DEFAULT_ROOT / name for name in ROLE_NAMES if (DEFAULT_ROOT / name / "role").exists()
        ]
        if len(found) > 1:
            raise UsageError("this machine is both gateway and agent: name one with --data")
        if not found:
            raise ConfigError(
                f"no data directory under {DEFAULT_ROOT}: run `edgesync gateway init` or `edgesync agent join`, "
                "or name one with --data"
            )
        data = found[0]
    from edgesync.storage.datadir import DataDir

    role = DataDir.open(data).role
    for entry in entry_points(group="edgesync.roles", name=role):
        return data, cast("Role", entry.load())
    raise ConfigError(f"{data} belongs to a role this installation does not have: {role}")


bundle_app = typer.Typer(
    help="The bundles a gateway published or a device holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Settings in force.", no_args_is_help=True, rich_markup_mode=None)


def mount(app: typer.Typer) -> None:
    app.add_typer(bundle_app, name="bundle")
    app.add_typer(config_app, name="config")


@bundle_app.command("list")
def bundle_list(data: DataOption = None, json: JsonOption = False) -> None:
    """List bundles, newest first."""
    directory, role = choose(data)
    rows = role.bundle_list(directory)
    if json:
        output.print_json({"schema": "edgesync.bundles/1", "bundles": rows})
        return
    output.print_table(
        ("BUNDLE", "KIND", "STATE", "PAYLOAD", "ID"),
        [
            (
                f"{row['name']}@{row['version']}",
                row["kind"],
                row["state"],
                output.size(cast("int", row["payload_bytes"])),
                str(row["id"])[:12],
            )
            for row in rows
        ],
    )


@bundle_app.command("show")
def bundle_show(bundle: str, data: DataOption = None, json: JsonOption = False) -> None:
    """Show one bundle, NAME@VERSION."""
    directory, role = choose(data)
    shown = role.bundle_show(directory, bundle)
    if json:
        output.print_json({"schema": "edgesync.bundle/1", **shown})
        return
    output.print_table(("FIELD", "VALUE"), sorted(shown.items()))


@bundle_app.command("verify")
def bundle_verify(bundle: str, data: DataOption = None, json: JsonOption = False) -> None:
    """Read every piece of NAME@VERSION again and compare its hash; exit 5 if one is wrong."""
    directory, role = choose(data)
    result = role.bundle_verify(directory, bundle)
    bad = cast("list[int]", result["bad"])
    paths = cast("list[str]", result.get("paths", []))
    if json:
        output.print_json({"schema": "edgesync.bundle-verify/1", **result})
        if bad or paths:
            raise typer.Exit(ExitCode.VERIFICATION)
        return
    if bad or paths:
        for path in paths[:MAX_SHOWN_PATHS]:
            typer.echo(f"differs: {output.clean(path)}", err=True)
        raise VerificationError(
            f"{bundle} is not as signed: {len(bad)} of {result['pieces']} pieces and {len(paths)} paths differ; "
            "a running agent brings an assigned bundle again"
        )
    typer.echo(f"{result['name']}@{result['version']}: {result['pieces']} pieces, all as signed")


@bundle_app.command("remove")
def bundle_remove(bundle: str, data: DataOption = None, json: JsonOption = False) -> None:
    """Remove NAME@VERSION; refused while it is assigned."""
    directory, role = choose(data)
    result = role.bundle_remove(directory, bundle)
    if json:
        output.print_json({"schema": "edgesync.bundle-remove/1", **result})
    else:
        typer.echo(f"removed {bundle}")


@config_app.command("show")
def config_show(
    data: DataOption = None,
    json: JsonOption = False,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say where each value comes from.")
    ] = False,
) -> None:
    """Show the settings in force."""
    directory, role = choose(data)
    rows = role.config_show(directory)
    if json:
        output.print_json({"schema": "edgesync.config/1", "settings": rows})
        return
    for row in rows:
        tail = f"  # {row['origin']}" if origin else ""
        typer.echo(f"{row['key']} = {row['value']}{tail}")
