"""What the gateway's commands share: their options, how they open the data directory, how they read and write words.

Only typer is imported until a command runs.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from edgesync.storage.datadir import DataDir
    from gateway.config import GatewaySettings
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


def group(text: str) -> typer.Typer:
    return typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)


def open_data(data: Path | None, *, keep_reading: bool = True) -> "DataDir":
    from edgesync.storage import datadir
    from gateway.acting import become_owner

    path = datadir.choose_path("gateway", data)
    become_owner(path, keep_reading=keep_reading)
    return datadir.DataDir.open(path, "gateway")


def open_store(data: Path | None) -> "AbstractContextManager[GatewayStore]":
    from gateway.store import GatewayStore

    return GatewayStore.open(open_data(data))


def load_settings(directory: "DataDir", flags: dict[str, Any] | None = None) -> "GatewaySettings":
    from edgesync import config
    from gateway.config import GatewaySettings

    return config.load(GatewaySettings, directory.config, flags=flags).values


def parse_labels(pairs: list[str] | None) -> dict[str, str]:
    from edgesync.selectors import parse_label

    return dict(parse_label(pair) for pair in pairs or ())


def when(seconds: float | None) -> str:
    import datetime as dt

    if seconds is None:
        return "never"
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def parse_bundle(text: str) -> tuple[str, str | None]:
    """``N[@V]``. Raises UsageError."""
    from edgesync import manifest
    from edgesync.errors import UsageError, VerificationError

    name, at, version = text.partition("@")
    try:
        manifest.check_name(name)
        return name, manifest.check_version(version) if at else None
    except VerificationError as exc:
        raise UsageError(str(exc)) from exc


def parse_full(bundle: str) -> tuple[str, str]:
    from edgesync.errors import UsageError

    name, version = parse_bundle(bundle)
    if version is None:
        raise UsageError(f"name the version: {name}@VERSION")
    return name, version


def label_text(labels: dict[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items()) or "-"


def count_devices(count: int) -> str:
    return f"{count} device" if count == 1 else f"{count} devices"


def warn_if_empty(store: "GatewayStore", site: str) -> None:
    """Say on stderr that nothing is at a site: its name may be mistyped, or its devices have yet to join."""
    from edgesync.cli.errors import complain
    from gateway.service import devices

    if devices.is_site_empty(store, site):
        complain(
            f"no device is at site {site} yet: see edgesync device list for the sites there are"
        )
