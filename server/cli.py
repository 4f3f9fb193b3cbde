"""`consilium-lab`: the coordinating lab's command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.command_line import command_group, run
from server.cli_network import add_commands

if TYPE_CHECKING:
    from rich.table import Table

    from server.study import SiteCost, StudyCheck

app = command_group("Consilium at the coordinating lab.")
study = command_group("Study plans.")
sites = command_group("Sites' data for simulations.")
app.add_typer(study, name="study")
app.add_typer(sites, name="sites")
add_commands(app, study)


class Cut(StrEnum):
    """How npz files become hospitals."""

    site = "site"
    dataset = "dataset"
    dirichlet = "dirichlet"


class Form(StrEnum):
    """How a site's images are stored."""

    npz = "npz"
    png = "png"


class Orientation(StrEnum):
    """Whether images have an up and a left."""

    fixed = "fixed"
    free = "free"


class EngineName(StrEnum):
    """What a simulation runs on."""

    local = "local"
    ray = "ray"


@study.command("check")
def study_check(
    file: Annotated[Path, typer.Argument(help="The study plan (YAML).")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say a plan in words, and what it costs every patient. Exit code 2 if it is not valid or cannot be met."""
    from server.study import check_study

    checked = check_study(file)
    if as_json:
        typer.echo(json.dumps(checked.to_json(), indent=2))
    else:
        _show(checked)


def _show(checked: StudyCheck) -> None:
    from rich.console import Console
    from rich.text import Text

    console, plan = Console(highlight=False), checked.plan
    console.print(Text.assemble((plan.study, "bold"), f"  {plan.description}\n", (f"digest {plan.digest}\n", "dim")))
    for sentence in checked.sentences:
        question, _, answer = sentence.partition(": ")
        console.print(Text.assemble((f"{question}: ", "bold"), answer))
    if checked.plan.privacy is not None:
        console.print(_cost_table(checked.costs, allowed=checked.plan.privacy.epsilon))
    for warning in checked.warnings:
        console.print(Text.assemble(("Warning: ", "bold yellow"), warning))


def _cost_table(costs: tuple[SiteCost, ...], *, allowed: float) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title="\nPrivacy cost of the whole study, per patient",
        caption=f"epsilon is by PLD; the plan allows {allowed:g}. RDP is the looser cross-check.\n"
        "noise: its norm in one query, over the largest that the mean gradient can have.",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for title in ("site", "N", "B=qN", "events", "noise z", "epsilon", "RDP", "delta", "noise"):
        table.add_column(title, justify="left" if title == "site" else "right")
    for row in costs:
        cost = row.privacy
        table.add_row(
            cost.site,
            f"{cost.patients}",
            f"{cost.expected_batch:g}",
            f"{cost.queries}",
            f"{cost.noise_multiplier:g}",
            f"{cost.epsilon:.3f}",
            f"{cost.epsilon_rdp:.3f}",
            f"{cost.delta:.1e}",
            f"{row.noise_to_signal:.2f}",
        )
    return table


@sites.command("make")
def sites_make(
    files: Annotated[list[Path], typer.Argument(help="npz files with images, labels and patient_ids.")],
    out: Annotated[Path, typer.Option(help="Where the site folders go.")],
    by: Annotated[Cut, typer.Option(help="One hospital per value of the site column, per file, or drawn at random.")],
    name: Annotated[list[str] | None, typer.Option(help="Names of the hospitals, in order; once for each.")] = None,
    only: Annotated[str | None, typer.Option(help="Keep one value of the site column.")] = None,
    sites: Annotated[int, typer.Option(help="dirichlet: how many hospitals per file.")] = 4,
    alpha: Annotated[float, typer.Option(help="dirichlet: the smaller, the more the labels differ.")] = 1.0,
    test_fraction: Annotated[float, typer.Option(help="Share of a hospital's patients who never train.")] = 0.25,
    public_fraction: Annotated[float, typer.Option(help="Share of the patients that goes to OUT/public.")] = 0.0,
    limit_per_class: Annotated[int | None, typer.Option(help="At most so many images per label.")] = None,
    form: Annotated[Form, typer.Option("--format", help="One npz, or PNGs beside a manifest.csv.")] = Form.npz,
    seed: Annotated[int, typer.Option(help="Which patients go where.")] = 0,
    masked_only: Annotated[bool, typer.Option("--masked-only", help="Leave out images without a mask.")] = False,
    orientation: Annotated[
        Orientation, typer.Option(help="free: no up or left, as on slides; then views turn.")
    ] = Orientation.fixed,
) -> None:
    """Cut npz files into site folders; a patient is never in two splits or two sites."""
    from server.made_sites import make_sites

    folders = make_sites(
        out,
        files,
        by=by.value,
        names=name or (),
        only=only,
        sites=sites,
        alpha=alpha,
        test_fraction=test_fraction,
        public_fraction=public_fraction,
        limit_per_class=limit_per_class,
        seed=seed,
        format=form.value,
        masked_only=masked_only,
        orientation=orientation.value,
        say=typer.echo,
    )
    _list_sites(folders)


@sites.command("phantoms")
def sites_phantoms(
    out: Annotated[Path, typer.Option(help="Where the site folders go.")],
    name: Annotated[list[str] | None, typer.Option(help="A hospital; once for each. Left out: all of them.")] = None,
    patients: Annotated[int, typer.Option(help="Patients of each hospital.")] = 80,
    image_size: Annotated[int, typer.Option(help="Pixels.")] = 64,
    channels: Annotated[int, typer.Option(help="1 or 3.")] = 1,
    seed: Annotated[int, typer.Option(help="Which phantoms.")] = 0,
) -> None:
    """Draw phantom hospitals: images made by a program, no patient's."""
    from server.made_sites import PROFILES, make_phantom_sites

    names = tuple(name or PROFILES)
    drawn = make_phantom_sites(out, names=names, patients=patients, image_size=image_size, channels=channels, seed=seed)
    _list_sites(drawn)


def _list_sites(folders: Sequence[Path]) -> None:
    from server.made_sites import describe

    for folder in folders:
        site = describe(folder)
        typer.echo(
            f"{folder}: {site.images} images of {site.patients} patients, {site.training_patients} of them train"
        )


@app.command("pretrain")
def pretrain(
    file: Annotated[Path, typer.Argument(help="The study plan (YAML): its network and image size.")],
    sites: Annotated[Path, typer.Option(help="Folder of public data sets in the form of site folders.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; left out, the plan's warm_start.")] = None,
    avoid: Annotated[Path | None, typer.Option(help="Site folders none of whose images may be used.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 1200,
    meta_steps: Annotated[int, typer.Option(help="Steps of meta-training after them.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Initial values, batches and views.")] = 0,
) -> None:
    """Train a warm start on public images, without privacy: they have none to lose."""
    from server.warm_start import make_warm_start

    written = make_warm_start(file, sites, out, avoid=avoid, steps=steps, meta_steps=meta_steps, seed=seed)
    typer.echo(f"Warm start: {written}")


@app.command("simulate")
def simulate(
    file: Annotated[Path, typer.Argument(help="The study plan (YAML).")],
    out: Annotated[Path, typer.Option(help="The run folder.")],
    sites: Annotated[Path | None, typer.Option(help="Folder of site folders; left out, phantoms are drawn.")] = None,
    engine: Annotated[EngineName, typer.Option(help="In this process, or on Flower's Ray backend.")] = EngineName.local,
    jobs: Annotated[int, typer.Option(help="Sites at once.", min=1)] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the run folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, nothing else.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where a round's time went; OUT/trace.json for Perfetto.")
    ] = False,
) -> None:
    """Run a study over sites on this machine, and report what a new hospital gains from it."""
    from rich.console import Console

    from server import profile as profiling
    from server.experiment import METRICS, REPORT, simulate_study
    from server.progress import ProgressBars
    from server.report import text_table

    with ProgressBars(Console(stderr=True)) as watcher, profiling.profiled(profile, jobs=jobs) as taken:
        results = simulate_study(file, sites, out, engine=engine.value, jobs=jobs, resume=resume, watcher=watcher)
    if profile:
        Console(stderr=as_json).print(taken.write(out / profiling.TRACE).table())
    if as_json:
        typer.echo((out / METRICS).read_text())
        return
    console = Console()
    console.print(text_table(results))
    console.print(f"Report: {out / REPORT}", highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of `consilium-lab`."""
    run(app)


if __name__ == "__main__":
    main()
