"""`consilium-site page`: the site in a browser on its own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_HERE = Path()
_PORT = 9449


def page(
    folder: Annotated[Path, typer.Argument(help="The site's folder, with site.yaml.")] = _HERE,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder of `adapt --out`, or of several; may be repeated; left out, `adapted` at the site."
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="On 127.0.0.1; 0: a free one.", min=0, max=65535)] = _PORT,
    exact: Annotated[bool, typer.Option("--exact", help="Exact counts, for the hospital's own eyes only.")] = False,
) -> None:
    """Show this site in a browser on this machine, until Ctrl-C: status, studies, privacy, data, adapted models.

    The address that is printed holds the key to it; no browser is opened, since every user of the machine can read what
    programs are started with. It shows, and changes nothing.
    """
    from client.data_check import DataCheck
    from client.local_page import LocalPage
    from client.local_server import serve
    from common.errors import Problem, UsageError

    for place in (folder, *(results or ())):
        if not place.is_dir():
            raise UsageError(Problem(str(place), "is no folder", "check the path"))
    shown = LocalPage(folder, tuple(results or (folder / "adapted",)), exact, DataCheck(folder))
    serve(shown, port=port, ready=_tell)


def _tell(address: str) -> None:
    typer.echo(address)
    typer.echo("Open it in a browser on this machine, and keep it to yourself; Ctrl-C stops.", err=True)
