"""`export`: an adapted model as files that other software reads, with a model card.

The card's counts are rounded (`common.disclosure`) and patients' images stay behind. The weights come from patients
without noise: they are for use inside the hospital, and the card says so.

    model.safetensors   the network
    model.json          how to ask it
    MODEL_CARD.md       for whom it is, how well it does, and what it must not be used for
    model.onnx          images to calibrated probabilities, checked against torch; where asked for
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.adapted_model import AdaptedModel, Facts, Measured, in_figures, told
from client.calibration import probabilities
from client.cross_validation import ARMS
from client.spending import day_and_time
from client.subgroups import EVERYONE
from common.checkpoint import save_checkpoint
from common.disclosure import LEAST_COUNT, shown
from common.errors import Problem, RunError, UsageError
from common.files import write_atomically
from common.images import normalise
from common.learner import Learner
from common.metrics import lead_metric, metrics_of

WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "model.json", "MODEL_CARD.md", "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
AGREEMENT = 1e-4  # of probabilities, onnxruntime against torch


def export(model: AdaptedModel, out: Path, *, onnx: bool) -> tuple[str, ...]:
    """Write the model's files into `out`, new or empty; returns their names.

    Raises UsageError if `out` is not empty, or ONNX is asked for and its packages or the kind of task are not there;
    RunError if the ONNX model does not answer as torch does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(Problem(str(out), "is not empty", "name another folder, or remove it"))
    if onnx:
        _require_onnx(model)
    facts = model.facts
    save_checkpoint(out / WEIGHTS, model.params, {"start": facts.start, "labels": json.dumps(facts.label_names)})
    write_atomically(out / CONFIG, json.dumps(config_of(model), indent=1).encode())
    if onnx:
        _write_onnx(model, out / ONNX)
    write_atomically(out / CARD, model_card(facts, onnx=onnx).encode())
    return (WEIGHTS, CONFIG, CARD, *([ONNX] if onnx else []))


def config_of(model: AdaptedModel) -> dict[str, Any]:
    """What software needs to ask the network; no counts."""
    facts = model.facts
    return {
        "format": "1",
        "task": facts.kind,
        "labels": facts.label_names,
        "image_size": facts.image_size,
        "channels": facts.channels,
        "modalities": model.plan.task.modalities,
        "input": "(pixels / 255 - 0.5) / 0.25, pixels 0 to 255",
        "network": model.plan.model.model_dump(mode="json", include={"name", "width"}),
        "temperature": facts.temperature,
        "least_confidence": facts.least_confidence,
        "model": facts.model,
        "start": facts.start,
    }


def model_card(facts: Facts, *, onnx: bool = False) -> str:
    """Markdown. Counts in tens; groups of fewer than ten patients are not there."""
    return "\n".join(_card(facts, onnx)) + "\n"


def _card(facts: Facts, onnx: bool) -> Iterator[str]:
    lead = lead_metric(facts.kind)
    yield f"# {', '.join(facts.label_names)}: a model adapted at {facts.site}"
    yield ""
    if facts.phantom:
        yield "**PHANTOMS: drawn images, no patients. No figure here says anything about people.**"
        yield ""
    yield "**Not a medical device.** Not for diagnosis or treatment; no authority has examined it."
    yield ""
    yield "**It stays in the hospital.** Its weights were adapted to patients' images without differential privacy, and"
    yield "may give away that a patient was among them. Nothing was charged to the privacy budget, because nothing is"
    yield "to leave. These figures are of few patients, too: they are no release either."
    yield ""
    yield "## Task"
    yield ""
    yield f"* {facts.kind}: {', '.join(facts.label_names)}"
    yield f"* images of {facts.image_size}x{facts.image_size} pixels, {facts.channels} channel(s), 8 bits"
    network = "; `model.onnx` takes pixels from 0 to 255 and gives calibrated probabilities" if onnx else ""
    yield f"* made {day_and_time(facts.time)} with Consilium {facts.version}{network}"
    yield ""
    yield "## Data"
    yield ""
    yield f"* {shown(facts.patients)} patients, {shown(facts.images)} images of one hospital"
    for label, count in facts.images_of_label.items():
        yield f"* {label}: {shown(count)} images"
    yield f"* adapted to {facts.shots} images of each kind; all others only measured it"
    yield ""
    yield "## How well"
    yield ""
    yield told(facts)
    yield ""
    yield f"{facts.repeats} times {facts.folds} folds by patient; mean and 95 % interval."
    yield ""
    yield from _table(["", *(title for title, _ in metrics_of(facts.kind).values())], _arm_rows(facts))
    yield ""
    yield f"### {metrics_of(facts.kind)[lead][0]} by group"
    yield ""
    yield f"Held-out patients, bootstrapped by patient. Groups of fewer than {LEAST_COUNT} patients are not shown."
    yield ""
    yield from _table(["group", "patients", "mean [95 %]"], _group_rows(facts))
    yield ""
    yield "### Calibration"
    yield ""
    yield from _calibration(facts)
    yield ""
    yield "## Where it comes from"
    yield ""
    yield f"* meta-initialization `{facts.start}`"
    yield f"* its privacy: {facts.start_privacy}"
    yield f"* adapted model `{facts.model}`"
    yield ""
    yield "## Limits"
    yield ""
    yield "* Measured on patients of this hospital alone: another scanner or population may differ without a sign."
    yield "* Labels were taken as they stand; what was labelled wrongly is learned and measured wrongly."
    yield "* A heat map shows what speaks for an answer, in spots of 16 pixels, not why or whether it is right."
    for note in facts.notes:
        yield f"* {note}"


def _arm_rows(facts: Facts) -> Iterator[list[str]]:
    for arm, values in facts.metrics.items():
        yield [ARMS[arm], *_cells(values, facts)]
    for arm, values in facts.gains.items():
        yield [f"gain over {ARMS[arm]}", *_cells(values, facts)]


def _cells(values: dict[str, Measured], facts: Facts) -> list[str]:
    return [in_figures(values[name]) for name in metrics_of(facts.kind)]


def _group_rows(facts: Facts) -> Iterator[list[str]]:
    for group in facts.groups:
        name = EVERYONE if group.detail == EVERYONE else f"{group.detail}: {group.name}"
        if group.patients >= LEAST_COUNT:
            yield [name, shown(group.patients), in_figures(group.value)]


def _calibration(facts: Facts) -> Iterator[str]:
    if facts.temperature is None:
        yield "Scores, no probabilities: an image is called unusual if it scores above 95 % of the healthy ones."
        return
    yield f"Temperature {facts.temperature:.3g}, from held-out patients."
    if facts.calibration_before is not None and facts.calibration_after is not None:
        yield f"Calibration error (ECE) {facts.calibration_before:.3f} before, {facts.calibration_after:.3f} after;"
        yield "each fold at the temperature of the others."
    if facts.least_confidence is None:
        yield f"At no confidence are {facts.asked_share:.0%} of the answers right: it should answer nothing by itself."
    else:
        yield f"From a confidence of {facts.least_confidence:.2f} on {facts.asked_share:.0%} of the answers were right."


def _table(titles: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + " --- |" * len(titles)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


class Answering(nn.Module):
    """Images (n, C, S, S) of 0 to 255 to calibrated probabilities, all in one module."""

    def __init__(self, model: AdaptedModel, learner: Learner) -> None:
        super().__init__()
        self.network = learner.network
        self.network.load_state_dict(model.params)
        self._kind, self._heat = model.facts.kind, model.facts.temperature or 1.0

    def forward(self, images: Tensor) -> Tensor:
        return probabilities(self.network(normalise(images)), self._kind, self._heat)


def _require_onnx(model: AdaptedModel) -> None:
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        remedy = "pip install 'consilium[export]', or leave --onnx out"
        raise UsageError(Problem("--onnx", f"not installed: {', '.join(missing)}", remedy))
    if model.facts.kind == "anomaly" or model.plan.task.modalities:
        what = "an anomaly score, or a network that is told the modality, has no ONNX form here"
        raise UsageError(Problem("--onnx", what, "leave --onnx out: the safetensors hold the network"))


def _write_onnx(model: AdaptedModel, path: Path) -> None:
    """Write `path` and see that onnxruntime answers as torch does, for one image and for several."""
    import onnxruntime

    asked = Answering(model, model.learner).eval()
    images = model.support.images
    batch = torch.export.Dim("images")
    torch.onnx.export(
        asked,
        (images[:2],),
        str(path),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: batch}},
        dynamo=True,
        external_data=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for some in (images[:1], images):
        (found,) = session.run(["probabilities"], {"images": some.numpy()})
        with torch.no_grad():
            apart = float((torch.from_numpy(found) - asked(some)).abs().max())
        if not apart <= AGREEMENT:
            path.unlink()
            what = f"onnxruntime and torch differ by {apart:.2g} in a probability"
            raise RunError(str(Problem(str(path), what, "report it; the safetensors are right")))
