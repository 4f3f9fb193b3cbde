"""`consilium-site`: the hospital's command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client import cli_adapt, cli_network, cli_records
from client.cli_audit import audit
from client.cli_import import import_, origin
from client.cli_page import page
from common.command_line import command_group, run
from common.disclosure import shown

if TYPE_CHECKING:
    from client.data.checks import SiteReport

app = command_group("Consilium at a hospital: its data stays here.")
data = command_group("The hospital's images.")
app.add_typer(data, name="data")
cli_network.add_commands(app)
cli_records.add_commands(app)
cli_adapt.add_commands(app)
app.command()(audit)
app.command()(page)
data.command("import")(import_)
data.command()(origin)


@data.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The site's folder, with site.yaml.")],
    plan: Annotated[Path | None, typer.Option(help="A study plan (YAML) that the images must fit.")] = None,
    site: Annotated[str | None, typer.Option(help="The site's name in the plan, if not that of site.yaml.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet (PNG), for the hospital's own eyes.")
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Forget what is kept of the images: the next start reads them all.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Exact counts, for the hospital's own eyes only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Count the images and name every problem with file and line. Exit code 2 if there is one.

    Copies across patients, empty images and drawn text are told to be looked at; they are no problems yet. Counts are
    rounded down to tens, and not shown below ten, so that what is sent on gives no patient away.
    """
    from client.data.checks import check_site, coarsened
    from client.data.kept import ImageStore
    from client.data.sheet import Sheet
    from client.data.suspicions import Suspicions
    from client.site import load_site_config
    from common.plan import load_plan

    if forget:
        ImageStore(folder / load_site_config(folder).state).forget()
    suspicions, pictures = Suspicions(), Sheet()
    look = [suspicions.look, pictures.look] if sheet else [suspicions.look]
    report = check_site(folder, load_plan(plan) if plan else None, site=site, look=look)
    report = dataclasses.replace(report, suspicions=suspicions.all())
    if sheet:
        pictures.write(sheet)
    if as_json:
        typer.echo(json.dumps((report if exact else coarsened(report)).to_json(), indent=2))
    else:
        _show(report if exact else coarsened(report), str if exact else shown)
    raise typer.Exit(0 if report.fit else 2)


def _show(report: SiteReport, number: Callable[[int], str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(report.counted, "split", "patients", "images", title=f"{report.site} ({report.folder})")
    for count in report.counts:
        table.add_row(count.label, count.split, number(count.patients), number(count.images))
    fewest, mean, most = report.images_per_patient
    if report.counts:
        Console(highlight=False, markup=False, emoji=False).print(table)
    typer.echo(
        f"{number(report.images)} images of {number(report.patients)} patients"
        f" ({number(report.training_patients)} train); {f'{fewest} to {most} images per patient, ' if most else ''}"
        f"mean {mean:g}; {number(report.masks)} with a mask"
    )
    for line in report.known_details(number):
        typer.echo(line)
    for note in report.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW)
    for suspicion in report.suspicions:
        typer.secho(f"look at {suspicion}", fg=typer.colors.YELLOW, err=True)
    for problem in report.problems:
        typer.secho(str(problem), fg=typer.colors.RED, err=True)
    if report.fit:
        typer.secho("fit for use", fg=typer.colors.GREEN)
    else:
        typer.secho(f"not fit for use: problems found: {len(report.problems)}", fg=typer.colors.RED, err=True)


def main() -> None:
    """The console script."""
    run(app)


if __name__ == "__main__":
    main()
