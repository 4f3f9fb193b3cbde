"""The hospital's commands for the real federation: init, join, approve, start, status, stop, doctor."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from common.keys import SignedDocument
    from common.plan import StudyPlan

SiteFolder = Annotated[Path, typer.Argument(help="The site's folder, with site.yaml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]

_HERE = Path()


def add_commands(app: typer.Typer) -> None:
    """Give the hospital's command line these commands."""
    for command in (init, join, approve, withdraw, start, status, stop, doctor):
        app.command()(command)
    app.command(hidden=True)(worker)


def init(
    folder: SiteFolder,
    name: Annotated[str, typer.Option(help="The site's name in study plans.")],
    epsilon: Annotated[float, typer.Option(help="Budget of a patient, over all studies.", min=0.01)] = 8.0,
    delta: Annotated[float, typer.Option(help="The budget's delta.", min=1e-12, max=0.1)] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Make the site's folder and keys, and a request to a lab. The private keys never leave this machine."""
    from client.membership import REQUEST_FILE, init_site, own_fingerprint
    from common.errors import UsageError

    try:
        init_site(folder, name=name, epsilon=epsilon, delta=delta)
    except ValueError as error:
        raise UsageError(f"--name {name}: {error}") from None
    told = {"site": name, "request": str(folder / REQUEST_FILE), "fingerprint": own_fingerprint(folder)}
    _say(
        told,
        as_json,
        f"Site {name}: {folder}",
        f"Send the lab {told['request']}, and read it this fingerprint by telephone:",
        told["fingerprint"],
    )


def join(
    bundle: Annotated[Path, typer.Argument(help="What the lab sent.")],
    fingerprint: Annotated[
        str, typer.Option(prompt="The lab's fingerprint, as it told you by telephone", help="Of the lab's key.")
    ],
    folder: Annotated[Path, typer.Option("--site", help="The site's folder.")] = _HERE,
    as_json: AsJson = False,
) -> None:
    """Accept the lab's answer, after comparing its fingerprint."""
    from client.membership import join as accept

    membership = accept(folder, bundle, expected=fingerprint)
    _say(
        {"site": membership.site, "lab": membership.lab, "address": membership.address},
        as_json,
        f"Site {membership.site} joined {membership.lab} at {membership.address}.",
    )


def approve(
    study: Annotated[str | None, typer.Argument(help="A signed plan, or a waiting one's name or digest.")] = None,
    folder: Annotated[Path, typer.Option("--site", help="The site's folder.")] = _HERE,
    by: Annotated[str | None, typer.Option(help="Who approves; left out, the user of this session.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a signed study in words, with its cost, and approve it. Without STUDY: list those that wait."""
    from client import approval
    from client.membership import membership_of
    from client.site import load_site_config

    config = load_site_config(folder)
    state, lab = folder / config.state, membership_of(folder)
    if study is None:
        _list_waiting(state, lab.lab_key, as_json)
        return
    from client.journal import SiteJournal
    from client.review import review

    document = _document(state, study)
    plan = approval.signed_plan(document, lab_key=lab.lab_key)
    reviewed = review(folder, plan)
    if as_json:
        typer.echo(json.dumps(reviewed.to_json(), indent=2))
    else:
        for line in reviewed.lines(lab.lab):
            typer.echo(line)
    if reviewed.objection:
        raise reviewed.objection
    if not yes:
        typer.confirm("Approve this study?", abort=True)
    person = by or getpass.getuser()
    SiteJournal.of(state).approved(plan, by=person)  # before it holds: no approval is without its entry
    approval.approve(state, plan, by=person, document=document)
    if not as_json:
        typer.echo(f"Approved: {plan.study} ({plan.digest[:12]})")


def withdraw(
    study: Annotated[str, typer.Argument(help="The start of an approved study's digest, or its name.")],
    folder: Annotated[Path, typer.Option("--site", help="The site's folder.")] = _HERE,
    by: Annotated[str | None, typer.Option(help="Who withdraws; left out, the user of this session.")] = None,
) -> None:
    """Take an approval back: the worker refuses the study from now on."""
    from client import approval
    from client.journal import SiteJournal
    from client.site import load_site_config
    from common.errors import Problem, UsageError

    state = folder / load_site_config(folder).state
    found = [
        digest
        for digest, record in approval.approved(state).items()
        if digest.startswith(study) or record.plan.study == study
    ]
    if len(found) != 1:
        what = "is not approved here" if not found else "could be several: give more of the digest"
        raise UsageError(Problem(f"study {study}", what, "`consilium-site status` lists the approved ones"))
    approval.withdraw(state, found[0])  # first: it holds also where the journal is damaged
    SiteJournal.of(state).withdrawn(found[0], by=by or getpass.getuser())
    typer.echo(f"Withdrawn: {found[0][:12]}")


def start(
    folder: SiteFolder = _HERE,
    node_only: Annotated[bool, typer.Option("--node-only", help="The worker is started apart.")] = False,
) -> None:
    """Run the site's node and worker until Ctrl-C or SIGTERM. Only outgoing connections."""
    from client.membership import membership_of
    from client.node import run_node
    from common.service import stop_on_signals

    membership = membership_of(folder)
    typer.echo(f"Site {membership.site}, lab {membership.lab} at {membership.address}; Ctrl-C stops")
    run_node(folder, stop_on_signals(), with_worker=not node_only)


def worker(folder: SiteFolder) -> None:
    """Run the worker alone: data, ledger and GPU, and no network."""
    from client.node import run_worker
    from common.service import stop_on_signals

    run_worker(folder, stop_on_signals())


def status(folder: SiteFolder = _HERE, as_json: AsJson = False) -> None:
    """What runs here, what waits for approval, what is spent. Exit code 1 unless node and worker run."""
    from client.node import site_status

    now = site_status(folder)
    if as_json:
        typer.echo(json.dumps(now, indent=2))
    else:
        for line in _status_lines(now):
            typer.echo(line)
    raise typer.Exit(0 if now["node"] and now["worker"] else 1)


def stop(folder: SiteFolder = _HERE) -> None:
    """Stop the site's node, and the worker that it started."""
    from client.membership import NODE
    from client.node import NODE_SERVICE
    from common.service import stop_instance

    typer.echo("Stopped." if stop_instance(folder / NODE, NODE_SERVICE) else "It did not run.")


def doctor(folder: SiteFolder = _HERE, as_json: AsJson = False) -> None:
    """Check everything that a node needs, in order, each with its remedy. Exit code 1 if something is wrong."""
    from client.doctor import examine

    findings = list(examine(folder))
    if as_json:
        typer.echo(json.dumps([finding.to_json() for finding in findings], indent=2))
    else:
        for finding in findings:
            colour = {"ok": typer.colors.GREEN, "wrong": typer.colors.RED}.get(finding.state, typer.colors.YELLOW)
            typer.secho(f"{finding.state:7} ", fg=colour, nl=False)
            typer.echo(f"{finding.check}: {finding.what}" + (f" -- {finding.remedy}" if finding.remedy else ""))
    raise typer.Exit(1 if any(finding.state == "wrong" for finding in findings) else 0)


def _document(state: Path, study: str) -> SignedDocument:
    """A signed plan in a file, or the waiting one of that name or digest. Raises UsageError."""
    from client import approval
    from common.errors import Problem, UsageError
    from common.keys import read_signed
    from common.plan import plan_from_json

    if Path(study).is_file():
        return read_signed(Path(study))
    found = {
        digest: document
        for digest, document in approval.pending(state).items()
        if digest.startswith(study) or plan_from_json(document.body).study == study
    }
    if len(found) != 1:
        what = "is neither a file nor a study that waits" if not found else "could be several: give more of the digest"
        raise UsageError(Problem(study, what, "`consilium-site approve` lists those that wait"))
    return next(iter(found.values()))


def _list_waiting(state: Path, lab_key: str, as_json: bool) -> None:
    from client import approval
    from common.errors import UntrustedDocument

    waiting: list[tuple[str, StudyPlan]] = []
    for digest, document in approval.pending(state).items():
        try:
            waiting.append((digest, approval.signed_plan(document, lab_key=lab_key)))
        except UntrustedDocument as error:
            typer.secho(f"{digest[:12]}: {error}", fg=typer.colors.RED, err=True)
    if as_json:
        typer.echo(json.dumps([{"digest": digest, "study": plan.study} for digest, plan in waiting], indent=2))
        return
    for digest, plan in waiting:
        typer.echo(f"{digest[:12]}  {plan.study}: {plan.description}")
    typer.echo("`consilium-site approve DIGEST` shows one in words." if waiting else "No study waits for approval.")


def _say(values: dict[str, Any], as_json: bool, *lines: str) -> None:
    typer.echo(json.dumps(values) if as_json else "\n".join(lines))


def _status_lines(now: dict[str, Any]) -> list[str]:
    runs = {True: "runs", False: "does not run"}
    lines = [
        f"site {now['site']}, lab {now['lab'] or 'none'} {now['address'] or ''}".rstrip(),
        f"node {runs[bool(now['node'])]}, worker {runs[bool(now['worker'])]}",
    ]
    inside = now["worker"]
    if inside:
        lines.append(f"epsilon {inside['epsilon_spent']:.3f} of {inside['epsilon_budget']:g} is spent")
        lines.append(f"studies: {len(inside['approved'])} approved, {len(inside['pending'])} wait for approval")
    return lines
