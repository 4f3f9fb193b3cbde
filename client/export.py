"""`export`: an adapted model as files that other software reads, with a model card.

The card's counts are rounded (`common.disclosure`) and patients' images stay behind. The weights come from patients
without noise: they are for use inside the hospital, and the card says so.

    model.safetensors   the network
    model.json          how to ask it
    MODEL_CARD.md       for whom it is, how well it does, and what it must not be used for
    model.onnx          images to calibrated probabilities, or anomaly scores, checked against torch; where asked for
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from common.images import normalise, standardise, with_modality
from common.metrics import HEALTHY_SHARE, lead_metric, metrics_of

WEIGHTS, CONFIG, CARD, ONNX = "model.safetensors", "model.json", "MODEL_CARD.md", "model.onnx"
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
AGREEMENT = 1e-4  # of probabilities, and of scores relative to the largest, onnxruntime against torch
NOTICE = "Not a medical device. Adapted to patients' images without differential privacy: it stays in the hospital."

_CHECKED = (1, 7)  # images at once


def export(model: AdaptedModel, out: Path, *, onnx: bool) -> tuple[str, ...]:
    """Write the model's files into `out`, new or empty; returns their names.

    Raises UsageError if `out` is not empty, or ONNX is asked for and its packages are not there; RunError if the ONNX
    model does not answer as torch does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(Problem(str(out), "is not empty", "name another folder, or remove it"))
    if onnx:
        _require_onnx()
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
        "preprocessing": "8 bits; one channel: luminance (ITU-R 601); the whole image, shrunk to the square by Lanczos",
        "input": "(pixels / 255 - 0.5) / 0.25, pixels 0 to 255",
        "network": model.plan.model.model_dump(mode="json", include={"name", "width"}),
        "temperature": facts.temperature,
        "least_confidence": facts.least_confidence,
        "unusual_above": _unusual_above(facts),
        "phantom": facts.phantom,
        "model": facts.model,
        "start": facts.start,
    }


def _unusual_above(facts: Facts) -> float | None:
    """The score beyond which `predict` calls an image unusual; None where there are no scores."""
    ranked = enumerate(facts.healthy_scores, start=1)
    return next((score for rank, score in ranked if rank / len(facts.healthy_scores) > HEALTHY_SHARE), None)


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
    gives = "scores" if facts.kind == "anomaly" else "calibrated probabilities"
    network = f"; `model.onnx` takes pixels from 0 to 255 and gives {gives}; it never abstains" if onnx else ""
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
    """Images (n, C, S, S) of 0 to 255, and their modalities (n,) where the plan names some, to what `predict` says of
    them: calibrated probabilities, or how unusual each image is, (n,); all in one module."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.network = model.learner.network
        self.network.load_state_dict(model.params)
        self._kind, self._heat = model.facts.kind, model.facts.temperature or 1.0
        self._redraws = model.plan.model.name == "autoencoder"
        if self._kind == "anomaly" and not self._redraws:
            with torch.no_grad():
                self.register_buffer("healthy", self.network.body(model.support_batch().inputs).mean(dim=0))

    def forward(self, images: Tensor, modalities: Tensor | None = None) -> Tensor:
        inputs = normalise(images) if modalities is None else with_modality(normalise(images), modalities)
        if self._kind != "anomaly":
            return probabilities(self.network(inputs), self._kind, self._heat)
        if self._redraws:
            unusual: Tensor = (self.network(inputs) - standardise(inputs)).square().mean(dim=(1, 2, 3))
        else:
            unusual = (self.network.body(inputs) - self.healthy).norm(dim=1)
        return unusual


def _require_onnx() -> None:
    if missing := [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]:
        remedy = "pip install 'consilium[export]', or leave --onnx out"
        raise UsageError(Problem("--onnx", f"not installed: {', '.join(missing)}", remedy))


def _write_onnx(model: AdaptedModel, path: Path) -> None:
    """Write `path`, without the paths and lines of code that the exporter notes at every node."""
    images, modalities = model.support.images, model.support.modalities.long()
    inputs = {"images": images} | ({"modalities": modalities} if model.plan.task.modalities else {})
    batch = torch.export.Dim("images")
    with _quietly():
        made = torch.onnx.export(
            Answering(model).eval(),
            tuple(value[torch.arange(2) % len(value)] for value in inputs.values()),  # one alone would be a constant
            input_names=list(inputs),
            output_names=[_output(model)],
            dynamic_shapes={name: {0: batch} for name in inputs},
            dynamo=True,
            verbose=False,
        )
    if made is None:
        raise RunError(str(Problem(str(path), "torch made no ONNX of it", "report it; the safetensors are right")))
    made.model.metadata_props.update(_metadata(model))
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()
    made.save(path)
    check_onnx(model, path, inputs)


def _output(model: AdaptedModel) -> str:
    return "scores" if model.facts.kind == "anomaly" else "probabilities"


def _metadata(model: AdaptedModel) -> dict[str, str]:
    """What the file says of itself."""
    size, channels = model.facts.image_size, model.facts.channels
    told = config_of(model) | {
        "input": f"images: float32 (n, {channels}, {size}, {size}), 0 to 255; modalities: int64 (n,), where there are",
        "notice": f"{NOTICE} It answers about every image: to abstain is left to who asks it.",
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}


def check_onnx(model: AdaptedModel, path: Path, inputs: dict[str, Tensor]) -> None:
    """See that onnxruntime says of one image and of several what `predict` says; `inputs` by their names in the file.

    Raises RunError, and removes the file, if it does not.
    """
    import onnxruntime

    session, learner = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]), model.learner
    for count in _CHECKED:
        some = {name: value[torch.arange(count) % len(value)] for name, value in inputs.items()}
        (found,) = session.run([_output(model)], {name: value.numpy() for name, value in some.items()})
        true = model.answers(learner, model.inputs(some["images"], some.get("modalities", torch.zeros(count))))
        if model.facts.kind != "anomaly":
            true = probabilities(true, model.facts.kind, model.facts.temperature or 1.0)
        apart = float((torch.from_numpy(found) - true).abs().max() / true.abs().max().clamp(min=1))
        if not apart <= AGREEMENT:
            path.unlink()
            what = f"onnxruntime and torch differ by {apart:.2g} in an answer"
            raise RunError(str(Problem(str(path), what, "report it; the safetensors are right")))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's words about packages that nobody needs here."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
