"""What `adapt` found, as a page that stands alone. It shows patients' images: it stays in the hospital."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.adaptation import Adaptation, cooled_out_of_fold
from client.adapted_model import AdaptedModel, Measured, in_figures, told
from client.calibration import confidence
from client.cross_validation import ARMS, META
from client.explain import explanation
from client.spending import day_and_time
from client.subgroups import rightness
from common import pictures
from common.files import write_atomically
from common.metrics import lead_metric, metrics_of
from common.pages import INK, render, svg

_TEMPLATES = Path(__file__).parent / "templates"
_COLOURS = ("#0072b2", "#e69f00", "#8a8a8a")  # of the arms; told apart by all forms of colour blindness
_BINS = 5
_PICTURES = 8


def write_page(path: Path, adaptation: Adaptation) -> None:
    """The page; whole or absent. Raises OSError."""
    facts, lead = adaptation.facts, lead_metric(adaptation.facts.kind)
    page = render(
        _TEMPLATES / "adaptation.html",
        facts=facts,
        sentence=told(facts),
        arms=ARMS,
        own=META,
        metrics=metrics_of(facts.kind),
        lead=lead,
        lead_name=metrics_of(facts.kind)[lead][0],
        show=in_figures,
        arms_figure=svg(lambda _, axes: _draw_arms(axes, adaptation, lead), name="arms", width=6.4, height=1.9),
        calibration_figure=_calibration(adaptation),
        pictures=[(pictures.png_address(image), words) for image, words in _examples(adaptation)],
        written=day_and_time(time.time()),
    )
    write_atomically(path, page.encode())


def _examples(adaptation: Adaptation) -> Iterator[tuple[np.ndarray, str]]:
    """Patients who are not in the support set, under what speaks for the answer."""
    data, facts = adaptation.data, adaptation.facts
    rows = adaptation.unseen(_PICTURES)
    if not len(rows):
        return
    model = AdaptedModel(facts, adaptation.plan, adaptation.params, adaptation.support)
    learner, inputs = model.learner, data.inputs(rows)
    answers = model.answers(learner, inputs)
    heat = explanation(model, learner, inputs, answers)
    for place, row in enumerate(rows.tolist()):
        image = np.moveaxis(data.images[row].numpy(), 0, -1).squeeze()
        if heat is None:
            found = answers[place].argmax(dim=0).numpy().astype(np.uint8)
            truth = data.targets_at(torch.tensor([row]))[0].numpy()
            yield pictures.agreement(image, truth, found), "found and true blue, wrongly found red, missed yellow"
            continue
        panel = pictures.outlined(image, None), pictures.heated(image, heat[place].numpy(), None)
        said = (
            f"score {answers[place]:.2f}" if facts.kind == "anomaly" else f"said: {_said(adaptation, answers[place])}"
        )
        yield np.concatenate(panel, axis=1), f"true: {_truth(adaptation, row)}; {said}"


def _truth(adaptation: Adaptation, row: int) -> str:
    label, names = adaptation.data.labels[row], adaptation.data.label_names
    return names[int(label)] if label.dim() == 0 else _findings(label > 0.5, names)


def _said(adaptation: Adaptation, answer: Tensor) -> str:
    names = adaptation.data.label_names
    return _findings(answer > 0, names) if adaptation.facts.kind == "multilabel" else names[int(answer.argmax())]


def _findings(shown: Tensor, names: tuple[str, ...]) -> str:
    return ", ".join(name for name, here in zip(names, shown.tolist(), strict=True) if here) or "none"


def _draw_arms(axes: Any, adaptation: Adaptation, lead: str) -> None:
    facts = adaptation.facts
    for place, (arm, title) in enumerate(ARMS.items()):
        value = facts.metrics[arm][lead]
        each = [fold.metrics[lead] for fold in adaptation.crossed.folds if fold.arm == arm]
        axes.plot(each, [place] * len(each), "o", color=_COLOURS[place], alpha=0.3, markersize=4, markeredgewidth=0)
        if value.mean is not None:
            axes.errorbar(value.mean, place, xerr=_half(value), fmt="o", color=_COLOURS[place], capsize=4, label=title)
    if not math.isnan(facts.chance):
        axes.axvline(facts.chance, linestyle=":", color=INK, linewidth=1)
    axes.set_yticks(range(len(ARMS)), ARMS.values())
    axes.set_ylim(len(ARMS) - 0.5, -0.5)
    axes.set_xlabel(metrics_of(facts.kind)[lead][0])


def _half(value: Measured) -> float:
    return 0.0 if value.high is None or value.mean is None else value.high - value.mean


def _calibration(adaptation: Adaptation) -> str:
    """How often answers of a confidence are right, out of fold; nothing for anomalies and masks."""
    if adaptation.facts.kind in ("anomaly", "segmentation"):
        return ""
    seen = adaptation.crossed.seen
    data = adaptation.data.rows(seen.rows)
    sure = confidence(cooled_out_of_fold(data, seen), data.kind)
    right = rightness(data, seen.answers)
    parts = sure.argsort().tensor_split(_BINS)
    points = [(float(sure[part].mean()), float(right[part].mean())) for part in parts if len(part)]

    def draw(_: Any, axes: Any) -> None:
        axes.plot([0, 1], [0, 1], ":", color=INK, linewidth=1)
        axes.plot(*zip(*points, strict=True), "o-", color=_COLOURS[0])
        axes.set(xlabel="stated confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))

    return svg(draw, name="calibration", width=6.4, height=3.0)
