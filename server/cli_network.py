"""The lab's commands for the real federation: provision, enroll, revoke, serve, run, status, stop."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

LabFolder = Annotated[Path, typer.Option("--lab", envvar="CONSILIUM_LAB", help="The lab's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]

_HERE = Path("lab")


def add_commands(app: typer.Typer, study: typer.Typer) -> None:
    """Give the lab's command line these commands."""
    for command in (provision, enroll, revoke, serve, run, status, stop):
        app.command()(command)
    study.command("sign")(sign)


def provision(
    address: Annotated[str, typer.Option(help="host:port at which hospitals reach the lab.")],
    lab: LabFolder = _HERE,
    name: Annotated[str, typer.Option(help="The lab's name, as hospitals see it.")] = "lab",
    listen: Annotated[str | None, typer.Option(help="host:port to listen on; left out, every interface.")] = None,
    renew: Annotated[bool, typer.Option("--renew", help="A new server certificate now.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the lab's certificate authority, server certificate and signing key; what is there stays."""
    from common.errors import Problem, UsageError
    from common.keys import fingerprint
    from server.certificates import days_left, read_certificate
    from server.lab import provision as make
    from server.lab import renew_certificate

    try:
        made = make(lab, name=name, address=address, listen=listen)
    except ValueError as error:
        raise UsageError(Problem("--address", str(error))) from None
    if renew:
        renew_certificate(made, always=True)
    days = days_left(read_certificate(made.server_certificate))
    told = {"lab": str(made.folder), "fingerprint": fingerprint(made.public_key), "certificate_days": round(days)}
    _say(
        told,
        as_json,
        f"Lab: {made.folder}, reached at {made.config.address}; the server's certificate lasts {days:.0f} days.",
        f"Fingerprint: {told['fingerprint']}",
        "Tell hospitals this fingerprint by telephone: with it they check what you send them.",
    )


def enroll(
    request: Annotated[Path, typer.Argument(help="The hospital's enrolment-request.json.")],
    fingerprint: Annotated[
        str, typer.Option(prompt="Fingerprint that the hospital read out", help="Read out by telephone.")
    ],
    lab: LabFolder = _HERE,
    out: Annotated[Path | None, typer.Option(help="The bundle; left out, SITE.bundle.json here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let a hospital in, and write the signed bundle that it joins with."""
    from common.enrolment import read_membership
    from common.files import write_atomically
    from common.keys import read_signed
    from server.enrolment import enroll as let_in
    from server.lab import open_lab

    answer = let_in(open_lab(lab), read_signed(request), expected=fingerprint)
    site = read_membership(answer).site
    bundle = out or Path(f"{site}.bundle.json")
    write_atomically(bundle, answer.to_json().encode())
    _say(
        {"site": site, "bundle": str(bundle)},
        as_json,
        f"Site {site} is enrolled. Send it {bundle}: it holds no secret.",
    )


def revoke(
    site: Annotated[str, typer.Argument(help="The site's name.")], lab: LabFolder = _HERE, as_json: AsJson = False
) -> None:
    """Shut a hospital out, at once, also of what is running."""
    from server.enrolment import revoke as bar
    from server.lab import open_lab

    bar(open_lab(lab), site)
    _say({"site": site, "revoked": True}, as_json, f"Site {site} is shut out.")


def serve(lab: LabFolder = _HERE) -> None:
    """Serve hospitals until Ctrl-C or SIGTERM."""
    from common.service import stop_on_signals
    from server.lab import open_lab
    from server.serving import serve as keep_serving

    opened = open_lab(lab)
    typer.echo(f"Serving {opened.config.address} on {opened.config.listen}; log: {opened.folder / 'log' / 'lab.log'}")
    keep_serving(opened, stop_on_signals())


def sign(
    file: Annotated[Path, typer.Argument(help="The study plan (YAML).")],
    lab: LabFolder = _HERE,
    out: Annotated[Path | None, typer.Option(help="Left out, STUDY.signed.json here.")] = None,
) -> None:
    """Sign a plan, so that hospitals can look at it and approve it before it runs."""
    from common.files import write_atomically
    from server.lab import open_lab
    from server.orders import sign_study
    from server.study import check_study

    plan = check_study(file).plan
    target = out or Path(f"{plan.study}.signed.json")
    write_atomically(target, sign_study(open_lab(lab), plan).to_json().encode())
    typer.echo(f"Signed: {target} (digest {plan.digest[:12]})")


def run(
    file: Annotated[Path, typer.Argument(help="The study plan (YAML).")],
    lab: LabFolder = _HERE,
    wait: Annotated[float, typer.Option(help="Minutes to wait for hospitals that are not ready.", min=0)] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Run a study with the enrolled hospitals, follow it, and report. Ctrl-C leaves it running; the same command
    follows it again."""
    from rich.console import Console

    from common.service import stop_on_signals
    from server.lab import open_lab
    from server.progress import ProgressBars
    from server.running import METRICS, run_study

    stop: threading.Event = stop_on_signals()
    with ProgressBars(Console(stderr=True)) as bars:
        report = run_study(open_lab(lab), file, wait_s=60.0 * wait, observer=bars, stop=stop)
    if report is None:
        typer.echo("The study goes on in the server; the same command follows it again.", err=True)
        raise typer.Exit(130)
    typer.echo((report.parent / METRICS).read_text() if as_json else f"Report: {report}")


def status(lab: LabFolder = _HERE, as_json: AsJson = False) -> None:
    """The server, the hospitals, the studies. Exit code 1 if the lab does not serve."""
    from server.lab import open_lab
    from server.lab_status import lab_status

    now = lab_status(open_lab(lab))
    if as_json:
        typer.echo(json.dumps(now, indent=2))
    else:
        _show_status(now)
    raise typer.Exit(0 if now["serving"] and now["superlink"] else 1)


def stop(
    name: Annotated[str | None, typer.Argument(metavar="[STUDY]", help="Left out: the server itself.")] = None,
    lab: LabFolder = _HERE,
) -> None:
    """End a study's run, or the server. What is committed stays."""
    from common.service import stop_instance
    from server.lab import open_lab
    from server.running import stop_study
    from server.serving import SERVICE

    opened = open_lab(lab)
    if name is not None:
        stop_study(opened, name)
        typer.echo(f"Study {name} is stopped.")
    else:
        typer.echo("Stopped." if stop_instance(opened.folder, SERVICE) else "It did not run.")


def _say(values: dict[str, Any], as_json: bool, *lines: str) -> None:
    typer.echo(json.dumps(values) if as_json else "\n".join(lines))


def _show_status(now: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    state = "serves" if now["superlink"] else "is starting" if now["serving"] else "does not serve"
    typer.echo(f"{now['lab']} ({now['address']}) {state}; its certificate lasts {now['certificate_days']:.0f} days")
    console = Console()
    if now["sites"]:
        table = Table("site", "enrolled", "connected")
        for site in now["sites"]:
            table.add_row(site["site"], "yes" if site["enrolled"] else "revoked", "yes" if site["online"] else "no")
        console.print(table)
    if now["studies"]:
        table = Table("study", "rounds", "state")
        for study in now["studies"]:
            table.add_row(study["study"], f"{study['committed']} of {study['rounds']}", study["state"])
        console.print(table)
