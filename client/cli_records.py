"""The hospital's commands about what it spent and what it did: privacy, ledger, journal."""

from __future__ import annotations

import getpass
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.command_line import command_group

if TYPE_CHECKING:
    from client.journal import SiteJournal
    from client.ledger import Ledger
    from client.site import SiteConfig

Site = Annotated[Path, typer.Option("--site", help="The site's folder.")]
SiteFolder = Annotated[Path, typer.Argument(help="The site's folder, with site.yaml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
By = Annotated[str | None, typer.Option(help="Who does it; left out, the user of this session.")]
Former = Annotated[list[str] | None, typer.Option(help="Fingerprint of a key that the site had before.")]

_HERE = Path()

ledger = command_group("The privacy ledger: backup and restore.")
journal = command_group("The signed journal: what was asked, approved, charged, released, refused.")


def add_commands(app: typer.Typer) -> None:
    """Give the hospital's command line these commands."""
    app.command()(privacy)
    app.add_typer(ledger, name="ledger")
    app.add_typer(journal, name="journal")


def privacy(
    folder: Annotated[Path, typer.Argument(help="The site's folder, or the state folder with its ledger.")],
    as_json: AsJson = False,
    page: Annotated[Path | None, typer.Option(help="Write a page to print or keep (HTML).")] = None,
) -> None:
    """What the patients' privacy budget was spent on. Exit code 1 if the ledger is missing or was changed."""
    from client.spending import spending_of

    spending = spending_of(folder)
    if page is not None:
        from client.privacy_page import write_page

        write_page(page, spending)
    if as_json:
        typer.echo(json.dumps(spending.to_json(), indent=2))
        return
    if spending.studies:
        _print_table(
            ("study", "rounds charged", "private queries", "epsilon alone", "from", "to"),
            [study.cells() for study in spending.studies],
        )
    for line in spending.sentences():
        typer.echo(line)
    if page is not None:
        typer.echo(f"Page: {page}")


@ledger.command()
def backup(
    file: Annotated[Path, typer.Argument(help="Where the copy goes; an older copy there is replaced.")],
    site: Site = _HERE,
) -> None:
    """Copy the ledger, also while the site runs. A plain copy of the file may be torn."""
    from client.ledger_backup import backup as copy

    rows, head = copy(_state(site), file).head
    typer.echo(f"{file}: {rows} rows, head {head[:12]}")


@ledger.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A copy that `ledger backup` wrote.")],
    site: Site = _HERE,
    by: By = None,
) -> None:
    """Put a copy in place of a lost ledger, with everything that was charged since: no budget comes back."""
    from client.journal import SiteJournal
    from client.ledger_backup import restore as put
    from client.node import WORKER
    from client.site import load_site_config
    from common.service import only_instance

    state, terms = _state(site), load_site_config(site).budget.terms()
    with only_instance(state, WORKER):  # a worker that runs would charge the ledger that is replaced
        done = put(state, file, terms=terms, journal=SiteJournal.of(state), by=by or getpass.getuser())
    typer.echo(f"The ledger holds {done.rows} rows again, the last {done.replayed} of them from the journal.")


@journal.command()
def show(
    folder: SiteFolder = _HERE,
    last: Annotated[int, typer.Option(help="How many entries, from the end; 0: all.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """The journal, as far as it can be read. `journal verify` says whether to believe it."""
    entries = _journal(folder)[0].entries()[-last:]
    if as_json:
        typer.echo(json.dumps([entry.to_json() for entry in entries], indent=2))
        return
    from client.journal import in_words
    from client.spending import day_and_time

    rows = [(str(e.number), day_and_time(e.time), e.what, in_words(e)) for e in entries]
    _print_table(("", "when", "what", "which"), rows)


@journal.command()
def verify(folder: SiteFolder = _HERE, former: Former = None, as_json: AsJson = False) -> None:
    """Check every entry's place and signature, and that no charge is missing. Exit code 1 if one was changed."""
    from common.keys import fingerprint, public_hex

    kept, spent = _journal(folder)
    entries = kept.verify(spent, former=former or ())
    signer = fingerprint(public_hex(kept.journal.key)) if kept.journal else ""
    if as_json:
        typer.echo(
            json.dumps({"entries": len(entries), "key": signer, "charges": len(spent.charges()) if spent else 0})
        )
        return
    typer.echo(f"{len(entries)} entries, none changed, none missing; the site's key is {signer}")


@journal.command()
def reopen(folder: SiteFolder = _HERE, by: By = None) -> None:
    """Begin a new journal in place of one that is damaged or lost; it says who did so, and what the ledger knows."""
    kept, spent = _journal(folder)
    aside = kept.reopen(spent, by=by or getpass.getuser())
    typer.echo("A new journal is begun" + (f"; the one before it is {aside}" if aside else ""))


def _journal(folder: Path) -> tuple[SiteJournal, Ledger | None]:
    from client.journal import SiteJournal
    from client.ledger import Ledger

    state = _state(folder)
    return SiteJournal.of(state), Ledger.found(state)


def _state(folder: Path) -> Path:
    from client.site import load_site_config

    config: SiteConfig = load_site_config(folder)
    return folder / config.state


def _print_table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, emoji=False).print(table)
