"""`edgesync budget …`: bytes for each calendar month between this gateway and a site."""

from typing import Annotated

import typer

from gateway.commands.options import DataOption, JsonOption, group, open_store, warn_if_empty

app = group("Bytes for each calendar month between the gateway and a site.")

SiteOption = Annotated[str, typer.Option("--site", help="All devices of this site together.")]


@app.command("set")
def budget_set(
    size: Annotated[str, typer.Argument(metavar="SIZE", help="For each month: 2GB, 500MiB.")],
    site: SiteOption,
    zone: Annotated[
        str, typer.Option("--zone", help="Zone whose months count, such as Europe/Rome.")
    ] = "UTC",
    data: DataOption = None,
    json: JsonOption = False,
) -> None:
    """Set the budget of a site; what it has spent this month stays spent."""
    import time

    from edgesync.budget import size_text
    from edgesync.cli import output
    from gateway.service import budgets

    with open_store(data) as store:
        one = budgets.set_budget(store, site=site, size=size, zone=zone, utc_now=time.time())
        warn_if_empty(store, one.site)
    if json:
        output.print_json(
            {
                "schema": "edgesync.budget-set/1",
                "site": one.site,
                "limit": one.limit_bytes,
                "zone": one.zone,
            }
        )
        return
    typer.echo(f"site {one.site}: {size_text(one.limit_bytes)} for each month ({one.zone})")


@app.command("list")
def budget_list(data: DataOption = None, json: JsonOption = False) -> None:
    """List budgets, what is spent of each and when it renews."""
    import time

    from edgesync.cli import output
    from gateway.commands.options import when
    from gateway.service import budgets

    with open_store(data) as store:
        rows = budgets.list_budgets(store, utc_now=time.time())
    if json:
        output.print_json({"schema": "edgesync.budgets/1", "budgets": rows})
        return
    output.print_table(
        ("SITE", "SPENT", "BUDGET", "MONTH", "ZONE", "RENEWS"),
        [
            (
                row["site"],
                output.size(row["spent"]),
                output.size(row["limit"]),
                row["month"],
                row["zone"],
                when(row["renews"]),
            )
            for row in rows
        ],
    )


@app.command("clear")
def budget_clear(site: SiteOption, data: DataOption = None, json: JsonOption = False) -> None:
    """Lift the budget of a site."""
    import time

    from edgesync.cli import output
    from gateway.service import budgets

    with open_store(data) as store:
        budgets.clear(store, site=site, utc_now=time.time())
    if json:
        output.print_json({"schema": "edgesync.budget-clear/1", "site": site})
        return
    typer.echo(f"the budget of site {site} is lifted")
