"""`consilium-site audit`: attack this installation, and sign what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.cli_adapt import Watch, watched

if TYPE_CHECKING:
    from client.audit import AuditReport

_HERE = Path()
_COLOURS = {"PASS": typer.colors.GREEN, "INCONCLUSIVE": typer.colors.YELLOW, "FAIL": typer.colors.RED}


def audit(
    folder: Annotated[Path, typer.Argument(help="The site's folder, with site.yaml.")] = _HERE,
    study: Annotated[str | None, typer.Option(help="An approved study; left out, the one approved last.")] = None,
    plan: Annotated[Path | None, typer.Option(help="A study plan (YAML) instead.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; left out, `audit` at the site.")] = None,
    verify: Annotated[Path | None, typer.Option(help="Check the signature of such a report, and show it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Attack this installation's privacy on drawn patients: no image is read, no budget spent. Exit code 1 on FAIL."""
    if verify is not None:
        _verify(verify, as_json)
        return
    from client.audit import PAGE, plan_to_audit, write_audit

    chosen = plan_to_audit(folder, study=study, plan=plan)
    where = out or folder / "audit"
    report = _watched(folder, chosen, quiet=as_json)
    write_audit(folder, report, where)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        for part in report.parts:
            typer.secho(part.line(), fg=_COLOURS[part.verdict])
        typer.echo(f"{report.verdict} after {report.seconds:.0f} s. Report: {where / PAGE}")
    raise typer.Exit(1 if report.verdict == "FAIL" else 0)


def _watched(folder: Path, plan: Any, *, quiet: bool) -> AuditReport:
    def work(watch: Watch) -> AuditReport:
        from client.audit import run_audit  # torch, while the bar says that it loads

        return run_audit(folder, plan, watch)

    return watched(work, quiet=quiet)


def _verify(path: Path, as_json: bool) -> None:
    from client.audit import verified_audit
    from common.keys import fingerprint

    body, signer = verified_audit(path)
    if as_json:
        typer.echo(json.dumps({"signed_by": fingerprint(signer), "audit": body}, indent=2))
        return
    typer.echo(f"{body['verdict']}: site {body['site']}, study {body['study']}, software {body['version']}")
    typer.echo(f"signed by {fingerprint(signer)}: compare it with the hospital's fingerprint")
