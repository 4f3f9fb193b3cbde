"""The hospital's commands for its own use of what the federation learned: adapt, predict, export. Nothing leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from client.adapted_model import Facts

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable.")]
Watch = Callable[[float, str], object]
T = TypeVar("T")

_STAYS = "Nothing left this hospital and nothing was charged; the model is for its own use and stays here."


def add_commands(app: typer.Typer) -> None:
    """Give the hospital's command line these commands."""
    app.command()(adapt)
    app.command()(predict)
    app.command()(export)


def adapt(
    folder: Annotated[Path, typer.Argument(help="The site's folder, with site.yaml.")],
    meta: Annotated[Path, typer.Option("--from", help="The meta-initialization: a checkpoint, or a run's folder.")],
    plan: Annotated[Path | None, typer.Option(help="The study (YAML); left out, plan.json beside META.")] = None,
    labels: Annotated[str | None, typer.Option(help="Which label set of the study is asked for.")] = None,
    task: Annotated[str | None, typer.Option(help="Or the hospital's own labels, as normal,tuberculosis.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Labelled images of each kind; left out, the study's.", min=1)
    ] = None,
    right: Annotated[
        float | None, typer.Option(help="Answer only where such a share is right; left out, 0.9.", min=0.0, max=1.0)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model; left out, `adapted` at the site.")] = None,
    as_json: AsJson = False,
) -> None:
    """Adapt a meta-initialization to this hospital's own question, and measure what that is worth.

    Cross-validated by patient against a random initialization and training from scratch on the same images.
    """
    where = out or folder / "adapted"

    def work(watch: Watch) -> Facts:
        from client.adaptation import adapt_site
        from client.adaptation_page import write_page
        from client.adapted_model import PAGE, save_adapted

        own = [label.strip() for label in (task or "").split(",") if label.strip()]
        found = adapt_site(
            folder, meta, plan_file=plan, labels=labels, own=own, shots=shots, share_right=right, watch=watch
        )
        save_adapted(where, found.facts, found.params, found.support)
        write_page(where / PAGE, found)
        return found.facts

    facts = watched(work, quiet=as_json)
    if as_json:
        typer.echo(facts.model_dump_json(indent=2))
        return
    _show(facts)
    typer.echo(f"Model: {where}  Report: {where / 'report.html'}")


def predict(
    source: Annotated[Path, typer.Argument(help="A site's folder, or any folder of images.")],
    model: Annotated[Path, typer.Option(help="A folder that `adapt` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for predictions.csv, overlays and masks; new or empty.")],
    modality: Annotated[str | None, typer.Option(help="What the images are, where the study names several.")] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Answer from such a confidence on, whatever `adapt` found.", min=0.0, max=1.0)
    ] = None,
    overlays: Annotated[bool, typer.Option(help="Draw what each answer looks at.")] = True,
    as_json: AsJson = False,
) -> None:
    """Say what an adapted model says about images, with calibrated probabilities; nothing where it should not.

    Files that cannot be read are named and left out. Not a medical device.
    """
    from client.adapted_model import load_adapted
    from client.predict import TABLE
    from client.predict import predict as answer_all

    adapted = load_adapted(model)
    done = answer_all(source, adapted, out, modality=modality, least=confidence, overlays=overlays)
    if as_json:
        problems = [str(problem) for problem in done.problems]
        told = {"images": done.counts, "left_out": problems, "images_per_second": round(done.speed, 2)}
        typer.echo(json.dumps(told, indent=2))
        return
    for problem in done.problems:
        typer.secho(str(problem), fg=typer.colors.YELLOW, err=True)
    counts = ", ".join(f"{count} {status}" for status, count in done.counts.items())
    typer.echo(f"{done.images} images: {counts}; {len(done.problems)} left out; {done.speed:.1f} images a second")
    if adapted.facts.phantom:
        typer.echo("The model was adapted to PHANTOMS, drawn images: it says nothing about people.")
    typer.echo(f"Not a medical device. {out / TABLE}")


def export(
    model: Annotated[Path, typer.Option(help="A folder that `adapt` wrote.")],
    out: Annotated[Path, typer.Option(help="Folder for the files; new or empty.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="ONNX too, checked against torch (consilium[export]).")] = False,
) -> None:
    """Write an adapted model as safetensors with a model card, for use inside the hospital."""
    from client.adapted_model import load_adapted
    from client.export import export as write

    names = write(load_adapted(model), out, onnx=onnx)
    typer.echo(f"{out}: {', '.join(names)}")
    typer.echo("Its weights were adapted without differential privacy: it stays in the hospital. Not a medical device.")


def _show(facts: Facts) -> None:
    from rich.console import Console
    from rich.table import Table

    from client.adapted_model import in_figures, told
    from client.cross_validation import ARMS
    from common.metrics import lead_metric, metrics_of

    lead = lead_metric(facts.kind)
    unit = f"{facts.shots} images of each kind, {facts.folds} folds by patient, {facts.repeats} times"
    table = Table("", metrics_of(facts.kind)[lead][0], "gain of the first", title=unit)
    for arm, values in facts.metrics.items():
        gain = in_figures(facts.gains[arm][lead]) if arm in facts.gains else ""
        table.add_row(ARMS[arm], in_figures(values[lead]), gain)
    Console(highlight=False, markup=False, emoji=False).print(table)
    if facts.phantom:
        typer.echo("PHANTOMS: drawn images, no patients.")
    for note in facts.notes:
        typer.secho(f"note: {note}", fg=typer.colors.YELLOW)
    typer.echo(told(facts))
    typer.echo(f"The meta-initialization's privacy: {facts.start_privacy}.")
    typer.echo(f"{_STAYS} {facts.seconds:.0f} s.")


def watched(work: Callable[[Watch], T], *, quiet: bool) -> T:
    """Run `work`, with a bar and the time that is left where somebody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet or not console.is_terminal) as bars:
        bar = bars.add_task("loading", total=1.0)
        return work(lambda share, what: bars.update(bar, completed=share, description=what))
