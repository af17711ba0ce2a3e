"""Commands of a device: `edgesync agent …` and `edgesync get`. Only typer is imported until a command runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edgesync.storage.datadir import DataDir

DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="EDGESYNC_DATA", help="Data directory.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token-file",
        help="File with the token, or - for stdin (else EDGESYNC_TOKEN).",
        show_default=False,
    ),
]
GatewayOption = Annotated[
    str | None,
    typer.Option(
        "--gateway-quic", help="Reach the gateway here, HOST:PORT (NAT, relay).", show_default=False
    ),
]
PROXY_SEEN = "Other users of this machine can see it: give one with a password in EDGESYNC_PROXY or agent.toml."
ProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        help=f"HTTP proxy out of the site, http://HOST[:PORT], or none. {PROXY_SEEN}",
        show_default=False,
    ),
]
RecoveryProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        help="HTTP proxy, http://HOST[:PORT], or none, for this recovery only; a lasting one is `proxy` in agent.toml. "
        + PROXY_SEEN,
        show_default=False,
    ),
]

MALLOC_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}

agent_app = typer.Typer(
    help="This machine's agent (the gateway's register of devices is `edgesync device`).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def mount(app: typer.Typer) -> None:
    app.add_typer(agent_app, name="agent")
    app.command("get")(get)


def _data_dir(data: Path | None) -> "DataDir":
    from edgesync.storage import datadir

    return datadir.DataDir.open(datadir.choose_path("agent", data), "agent")


def _read_token(token_file: str | None) -> str:
    """The token from a file, stdin or the environment; never from the command line, which others can read."""
    import os
    import sys

    from edgesync.errors import NotFoundError, UsageError

    if token_file == "-":  # noqa: S105 - stdin, not a secret
        text = sys.stdin.read(64 * 1024)
    elif token_file is not None:
        try:
            text = Path(token_file).read_text()
        except (OSError, UnicodeDecodeError) as exc:
            reason = getattr(exc, "strerror", None) or "it is not text"
            raise NotFoundError(f"cannot read the token from {token_file}: {reason}") from exc
    else:
        text = os.environ.get("EDGESYNC_TOKEN", "")
    if not text.strip():
        raise UsageError(
            "no token: make one on the gateway with `edgesync token create` and give it with --token-file FILE, "
            "on stdin with --token-file -, or in EDGESYNC_TOKEN"
        )
    # What `token create` printed may be given whole: the token is the word that looks like one.
    return next((word for word in text.split() if word.startswith("es1")), text.strip())


@agent_app.command("join")
def join(
    token_file: TokenOption = None,
    device_id: Annotated[
        str | None,
        typer.Option(
            "--id", help="Name to register (default: host name and 4 characters of the key)."
        ),
    ] = None,
    hardware: Annotated[
        str, typer.Option("--hardware", help="Hardware type that bundles may ask for.")
    ] = "",
    gateway_quic: GatewayOption = None,
    proxy: ProxyOption = None,
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Enrol this machine with a token made on the gateway."""
    from device import joining
    from edgesync.cli import output
    from edgesync.cli.errors import complain
    from edgesync.storage import datadir

    token = _read_token(token_file)
    path = datadir.choose_path("agent", data)
    joined = joining.join(
        path,
        token,
        device_id=device_id,
        hardware=hardware,
        gateway_quic=gateway_quic,
        proxy=proxy,
    )
    if proxy and not joined["settings_written"]:
        complain(
            "agent.toml was there before and is kept: the agent uses the proxy that it names, not --proxy"
        )
    if json:
        output.print_json({"schema": "edgesync.agent-join/1", **joined})
        return
    typer.echo(
        f"joined as {joined['id']} ({joined['state']}); gateway {joined['gateway']}, region {joined['region']}"
    )
    if joined["state"] == "pending":
        typer.echo(f"the operator accepts it with: edgesync device accept {joined['id']}")
    typer.echo("start it with: edgesync agent run" + ("" if data is None else f" --data {data}"))


@agent_app.command("recover")
def recover(
    token_file: TokenOption = None,
    gateway_quic: GatewayOption = None,
    proxy: RecoveryProxyOption = None,
    data: DataOption = None,
) -> None:
    """Join again with the same key after both copies of trust.db were lost; floors restart from what is installed."""
    from device import joining

    token = _read_token(token_file)
    joined = joining.recover(_data_dir(data), token, gateway_quic=gateway_quic, proxy=proxy)
    typer.echo(
        f"recovered {joined['id']}: trust metadata fetched again, {joined['floors']} floors set from bundles"
    )


@agent_app.command("run")
def run(
    interface: Annotated[
        str | None,
        typer.Option("--interface", help="Find peers on this interface (name or address) only."),
    ] = None,
    listen_quic: Annotated[
        str | None, typer.Option("--listen-quic", help="Where peers reach this device, HOST:PORT.")
    ] = None,
    gateway_quic: GatewayOption = None,
    no_mdns: Annotated[
        bool, typer.Option("--no-mdns", help="Neither announce nor look for peers.")
    ] = False,
    upload_limit: Annotated[
        str | None,
        typer.Option(
            "--upload-limit",
            help="Bytes per second to peers: 500kB, 4MiB, or '08:00-18:00 200kB/s; 2MB/s'.",
        ),
    ] = None,
    download_limit: Annotated[
        str | None,
        typer.Option(
            "--download-limit", help="Bytes per second fetched; a rate or times as --upload-limit."
        ),
    ] = None,
    background: Annotated[
        bool,
        typer.Option("--background", help="Leave room to other traffic of the site's line."),
    ] = False,
    data: DataOption = None,
) -> None:
    """Run the daemon in the foreground until SIGTERM."""
    import os
    import sys

    from device.config import AgentSettings
    from edgesync import config

    directory = _data_dir(data)
    flags = {
        "interface": interface,
        "listen_quic": listen_quic,
        "gateway_quic": gateway_quic,
        "mdns": False if no_mdns else None,
        "upload_limit": upload_limit,
        "download_limit": download_limit,
        "background": True if background else None,
    }
    config.load(
        AgentSettings, directory.config, flags=flags
    )  # a bad value ends here, in one sentence
    # The daemon is a fresh interpreter without the command line's libraries: some 15 MB less on a small machine.
    # Pieces come and go in blocks that glibc, left alone, keeps in per-thread heaps: some 15 MB more.
    environment = {**MALLOC_SETTINGS, **os.environ, "EDGESYNC_DATA": str(directory.path)}
    for name, value in flags.items():
        if value is not None:
            environment[config.ENVIRONMENT_PREFIX + name.upper()] = str(value)
    os.execve(sys.executable, [sys.executable, "-m", "device"], environment)  # noqa: S606


@agent_app.command("status")
def status(data: DataOption = None, json: JsonOption = False) -> None:
    """What this device holds, does and waits for; works whether the agent runs or not."""
    from device import status as device_status
    from edgesync.cli import output

    shown = device_status.read(_data_dir(data))
    if json:
        output.print_json(shown)
        return
    for line in device_status.lines(shown):
        typer.echo(output.clean(line))


def get(
    bundle: Annotated[str, typer.Argument(metavar="NAME[@VERSION]")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Where to write it; must not exist.")],
    data: DataOption = None,
) -> None:
    """Fetch a bundle through this machine's agent and write it to OUT; no assignment is needed.

    Without a version it is the one published last.
    """
    from device import getting

    fetched = getting.get(_data_dir(data).path, bundle, out)
    typer.echo(f"{fetched} is in {out}")


class _Role:
    """What the role-neutral commands call on a device."""

    def bundle_list(self, data: Path) -> list[dict[str, Any]]:
        from device import role

        return role.bundle_list(data)

    def bundle_show(self, data: Path, bundle: str) -> dict[str, Any]:
        from device import role

        return role.bundle_show(data, bundle)

    def bundle_verify(self, data: Path, bundle: str) -> dict[str, Any]:
        from device import role

        return role.bundle_verify(data, bundle)

    def bundle_remove(self, data: Path, bundle: str) -> dict[str, Any]:
        from device import role

        return role.bundle_remove(data, bundle)

    def config_show(self, data: Path) -> list[dict[str, Any]]:
        from device import role

        return role.config_show(data)


ROLE = _Role()
