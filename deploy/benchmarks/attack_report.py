"""The report of `deploy.benchmarks.attacks`: its figures, tables and picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from client.data.dataset import SiteData
from common.plan import StudyPlan
from common.trials import Estimate

FALSE_POSITIVES = (0.01, 0.05)
LEFTMOST = 0.002  # false positive rate that is drawn

_PICTURED = 3
_COLOURS = ("#d55e00", "#e69f00", "#009e73", "#0072b2")


@dataclass(frozen=True)
class Membership:
    """How well the lab tells who is in, by one plan at one epsilon."""

    plan: str
    epsilon: float  # inf: without privacy
    noise_multiplier: float
    auroc: Estimate
    auroc_bound: float
    true_positives: list[Estimate]  # at FALSE_POSITIVES
    by_definition: list[float]  # e^eps FPR + delta, at most 1
    by_profile: list[float]
    curve: list[tuple[float, float]]  # (FPR, TPR)
    curve_bound: list[tuple[float, float]]


@dataclass(frozen=True)
class Inversion:
    """How like the originals the lab's pictures are; epsilon None: what it needs no update for."""

    part: str
    epsilon: float | None
    psnr: Estimate  # dB
    ssim: Estimate


def markdown(
    plan: StudyPlan, inferred: list[Membership], inverted: list[Inversion], *, runs: int, images: int, tries: int
) -> str:
    """Both tables, and what they say."""
    (site,) = plan.training_sites
    patients = plan.sites[site].patients
    head = ["plan", "privacy", "AUROC"]
    for rate in FALSE_POSITIVES:
        head += [f"TPR at {rate:.0%} FPR", "e^eps FPR + delta", "by PLD"]
    rows = []
    for one in inferred:
        row = [one.plan, _name(one.epsilon), _range(one.auroc)]
        for found, loose, sharp in zip(one.true_positives, one.by_definition, one.by_profile, strict=True):
            row += [_range(found), f"{loose:.3f}", f"{sharp:.3f}"]
        rows.append(row)
    pictures = [
        [
            one.part if one.epsilon is None else f"`{one.part}` travels",
            _name(one.epsilon),
            _bars(one.psnr, 1),
            _bars(one.ssim, 2),
        ]
        for one in inverted
    ]
    return "\n".join(
        [
            f"Membership: {patients} of {2 * patients} patients of {site} enrolled, {plan.rounds} rounds, {runs} runs."
            " Guessing: AUROC 0.5, TPR = FPR. The bounds are the most that epsilon leaves to any attack.",
            "",
            *_lines(head, rows),
            "",
            f"Inversion: {images} images, one by one: one patient, one step. The best of {tries} tries by"
            " the original itself, brightness and contrast fitted to it; mean and half of the 95 % interval.",
            "",
            *_lines(["what the lab has", "privacy", "PSNR (dB)", "SSIM"], pictures),
            "",
        ]
    )


def _lines(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _name(epsilon: float | None) -> str:
    if epsilon is None:
        return ""
    return "none" if math.isinf(epsilon) else f"epsilon {epsilon:g}"


def _range(value: Estimate) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _bars(value: Estimate, digits: int) -> str:
    return f"{value.mean:.{digits}f} ± {value.high - value.mean:.{digits}f}"


def draw(path: Path, inferred: list[Membership], pictures: dict[float, list[Tensor]], shown: SiteData) -> None:
    """ROC curves by plan, with the bounds dashed; below, originals and what was made of them at each epsilon."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    chance = np.geomspace(LEFTMOST, 1.0, 100)
    plans = list(dict.fromkeys(one.plan for one in inferred))
    for number, (name, axes) in enumerate(zip(plans, above.subplots(1, len(plans)), strict=True)):
        for one, colour in zip((one for one in inferred if one.plan == name), _COLOURS, strict=False):
            axes.plot(*zip(*one.curve, strict=True), color=colour, label=_privacy(one.epsilon), linewidth=1.6)
            if math.isfinite(one.epsilon):
                axes.plot(*zip(*one.curve_bound, strict=True), color=colour, linestyle="--", linewidth=1)
        axes.plot(chance, chance, ":", color="0.4", label="guessing", linewidth=1)
        axes.set(xscale="log", xlim=(LEFTMOST, 1), ylim=(0, 1.02), xlabel="false positive rate", title=f"Plan: {name}")
        axes.grid(alpha=0.25)
        if number == 0:
            axes.set_ylabel("true positive rate (dashed: bound)")
            axes.legend(frameon=False, fontsize=8, loc="upper left")
    columns = [("original", list(shown.images.float() / 255.0)), *((_privacy(e), p) for e, p in pictures.items())]
    below.suptitle("One patient, one step, the whole network travels: what the lab reconstructs", fontsize=11)
    count = min(_PICTURED, len(shown))
    grid = below.subplots(count, len(columns), squeeze=False)
    for column, (title, found) in enumerate(columns):
        grid[0][column].set_title(title, fontsize=10)
        for row in range(count):
            grid[row][column].imshow(found[row].permute(1, 2, 0).squeeze(2), cmap="gray", vmin=0, vmax=1)
            grid[row][column].set_axis_off()
    figure.savefig(path)


def _privacy(epsilon: float) -> str:
    return "no privacy" if math.isinf(epsilon) else f"epsilon {epsilon:g}"
