"""`consilium-site data import`: from a folder of originals to a site's manifest; and back, `data origin`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.disclosure import shown

if TYPE_CHECKING:
    from client.data.pixels import Window


def import_(
    source: Annotated[Path, typer.Argument(help="A folder or PACS export: DICOM, NIfTI, PNG, JPEG, TIFF.")],
    site: Annotated[Path, typer.Option("--site", help="The site's folder, with site.yaml.")],
    labels: Annotated[
        Path | None, typer.Option(help="A CSV: file, series, study or patient; label; and optional columns.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Which slices of a volume: every:N, index:I,J, middle, mask[:N].")
    ] = "every:1",
    window: Annotated[str | None, typer.Option(help="CENTRE,WIDTH in the scanner's units; not the file's own.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Of the patients, for split 'test'.", min=0, max=0.9)] = 0.25,
    patients_by_folder: Annotated[
        bool, typer.Option("--patients-by-folder", help="Pictures belong to the patient their folder is named after.")
    ] = False,
    keep_burnt_in: Annotated[
        bool, typer.Option("--keep-burnt-in", help="Also images that say that they hold drawn text.")
    ] = False,
    processes: Annotated[int | None, typer.Option(help="How many decode at once.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Take images into the site's folder, under pseudonyms. Nothing leaves, no name, date or number is written.

    A file that cannot be used is named and left out. Stopped, the same command goes on.
    """
    from client.data.imports import Choice, import_images
    from client.data.slices import parse_rule

    choice = Choice(parse_rule(rule), _window(window), test_fraction, patients_by_folder, keep_burnt_in)
    with _progress() as tell:
        done = import_images(source, site, labels=labels, choice=choice, processes=processes, tell=tell)
    for problem in done.left_out:
        typer.secho(str(problem), fg=typer.colors.YELLOW, err=True)
    if as_json:
        typer.echo(json.dumps({"images": done.images, "patients": done.patients, "left_out": len(done.left_out)}))
        return
    typer.echo(f"{shown(done.images)} images of {shown(done.patients)} patients; left out: {len(done.left_out)}")
    typer.echo(f"Next: consilium-site data check {site} --sheet SHEET.png")


def origin(
    image: Annotated[str, typer.Argument(help="A path of the manifest, or one of its lines, as manifest.csv:7.")],
    site: Annotated[Path, typer.Option("--site", help="The site's folder, with site.yaml.")],
) -> None:
    """Say of which original an imported image is. For the hospital's own eyes: its path may name a patient."""
    from client.data.origins import find_origin

    path, frame = find_origin(site, image)
    typer.echo(f"{path}  image {frame} of it, from 0")


def _window(text: str | None) -> Window | None:
    from client.data.pixels import Window
    from common.errors import Problem, UsageError

    if text is None:
        return None
    try:
        centre, width = (float(number) for number in text.split(","))
    except ValueError:
        centre, width = 0.0, 0.0
    if width < 1:
        raise UsageError(Problem("--window", f"{text!r} is no window", "write CENTRE,WIDTH as 40,400"))
    return Window(centre, width)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A bar on stderr for each of the two passes, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def tell(what: str, done: int, of: int | None) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=of)
            progress.update(bars[what], completed=done)

        yield tell
