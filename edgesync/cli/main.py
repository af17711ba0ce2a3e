"""Root of the ``edgesync`` command.

It names neither side: gateway and device mount their commands through entry points. It imports no network, crypto or
database module, so that ``--help`` stays quick on a small machine.
"""

import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from edgesync.cli import demo, errors, roles

app = typer.Typer(
    name="edgesync",
    help="Move signed files to fleets of edge devices over bad networks.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from edgesync import __version__

        typer.echo(f"edgesync {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version_flag: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def build() -> typer.Typer:
    """The whole command tree; called once a process."""
    demo.mount(app)
    roles.mount(app)
    for entry in sorted(entry_points(group="edgesync.commands"), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def main() -> None:
    sys.exit(errors.run(build()))


if __name__ == "__main__":
    main()
