"""Commands of a gateway: `edgesync gateway|token|device|publish|assign|unassign|events`, and its part of `bundle`.

Only typer is imported until a command runs. Each command opens the data directory, calls one verb of
``gateway.service`` and prints what it returned.
"""

from pathlib import Path

import typer

from gateway.commands import budget, bundles, caps, devices, events, fleet, tokens
from gateway.commands.options import open_data, open_store, parse_full


def mount(app: typer.Typer) -> None:
    app.add_typer(fleet.app, name="gateway")
    app.add_typer(tokens.app, name="token")
    app.add_typer(devices.app, name="device")
    app.add_typer(caps.app, name="caps")
    app.add_typer(budget.app, name="budget")
    app.add_typer(bundles.publish_app, name="publish")
    app.command("assign")(bundles.assign)
    app.command("unassign")(bundles.unassign)
    app.command("events")(events.events)


class GatewayRole:
    """What `edgesync bundle …` and `edgesync config show` ask of a gateway's directory."""

    def bundle_list(self, data: Path) -> list[dict[str, object]]:
        from gateway.service import bundles as service

        with open_store(data) as store:
            return service.list_bundles(store)

    def bundle_show(self, data: Path, bundle: str) -> dict[str, object]:
        from gateway.service import bundles as service

        with open_store(data) as store:
            return service.show(store, *parse_full(bundle))

    def bundle_verify(self, data: Path, bundle: str) -> dict[str, object]:
        from gateway.service import bundles as service

        with open_store(data) as store:
            return service.verify(store, *parse_full(bundle))

    def bundle_remove(self, data: Path, bundle: str) -> dict[str, object]:
        from gateway.service import bundles as service
        from gateway.service import setup

        with open_store(data) as store:
            return service.remove(store, setup.repository(store), *parse_full(bundle))

    def config_show(self, data: Path) -> list[dict[str, object]]:
        from edgesync import config
        from gateway.config import GatewaySettings

        return config.show(config.load(GatewaySettings, open_data(data).config))


ROLE = GatewayRole()
