"""`predict`: what an adapted model says about a folder of images, when it should say nothing, and what it looks at.

Local use: nothing leaves the hospital.

    predictions.csv    a line for each image
    overlays/          what speaks for each answer (Grad-CAM, or the contour of a mask), and the nearest support image
    masks/             segmentation: class indices as grey values, at the image's own size
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from client.adaptation_page import explanation
from client.adapted_model import AdaptedModel
from client.calibration import confidence, pooled, probabilities
from client.data.intake import Target, read_rows
from client.data.readers import UnreadableImageError, fit_image, read_image
from client.site import SITE_FILE, load_site_config
from common import pictures
from common.errors import DataError, Problem, UsageError
from common.files import write_atomically
from common.learner import Learner
from common.metrics import HEALTHY_SHARE

TABLE, OVERLAYS, MASKS = "predictions.csv", "overlays", "masks"
ANSWERED, UNSURE, UNLIKE = "answered", "unsure", "unlike the images it was tested on"
_BATCH = 64  # images in memory at once


@dataclass(frozen=True)
class Shown:
    """One image to be answered about."""

    name: str  # the file inside the folder, or the row of the site
    pixels: np.ndarray  # uint8 (H, W) or (H, W, 3), as it was read
    fitted: np.ndarray  # uint8 (C, S, S)
    modality: int  # index into the plan's; 0 if it names none


@dataclass(frozen=True)
class Line:
    """What is said about one image."""

    shown: Shown
    status: str
    answer: str  # empty unless answered
    confidence: float  # nan for anomalies
    shares: tuple[float, ...]  # calibrated probability of each label; anomalies: share of healthy images below
    distance: float
    nearest: int  # row of the support set


@dataclass(frozen=True)
class Predictions:
    """How it went."""

    counts: dict[str, int]  # status -> images
    problems: tuple[Problem, ...]  # images that were left out
    seconds: float

    @property
    def images(self) -> int:
        return sum(self.counts.values())

    @property
    def speed(self) -> float:
        """Images per second, reading and drawing included."""
        return self.images / max(self.seconds, 1e-9)


def predict(
    source: Path, model: AdaptedModel, out: Path, *, modality: str | None, least: float | None, overlays: bool
) -> Predictions:
    """Answer about every readable image in `source`, a site's folder or any folder of images; write into `out`.

    `least` replaces the confidence from which on there is an answer. Raises DataError if no image can be read,
    UsageError if `out` is not empty or the modality is not one of the plan's.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(Problem(str(out), "is not empty", "name another folder, or remove it"))
    began, problems = time.monotonic(), list[Problem]()
    learner, counts = model.learner, dict.fromkeys((ANSWERED, UNSURE, UNLIKE), 0)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_titles(model))
    images = _images(source, model, modality, problems)
    while chunk := list(islice(images, _BATCH)):
        first = sum(counts.values())
        answers, lines = answer(model, learner, chunk, least=least)
        drawn = _draw(out, model, learner, lines, answers, first) if overlays else [""] * len(lines)
        masks = _write_masks(out, lines, answers, first) if model.facts.kind == "segmentation" else [""] * len(lines)
        for line, picture, mask in zip(lines, drawn, masks, strict=True):
            counts[line.status] += 1
            writer.writerow(_cells(line, picture, mask))
    if not sum(counts.values()):
        raise DataError(problems[:20] or [Problem(str(source), "holds no image", "check the path")])
    write_atomically(out / TABLE, table.getvalue().encode())
    return Predictions(counts, tuple(problems), time.monotonic() - began)


def answer(
    model: AdaptedModel, learner: Learner, images: Iterable[Shown], *, least: float | None = None
) -> tuple[Tensor, list[Line]]:
    """The model's raw answers, and what is said, in the order of `images`."""
    chunk, facts = list(images), model.facts
    inputs = _inputs(model, chunk)
    answers = model.answers(learner, inputs)
    with torch.no_grad():
        apart = torch.cdist(pooled(learner.features(model.params, inputs)), model.support.features)
    nearest = apart.min(dim=1)
    needed = facts.least_confidence if least is None else least
    lines = []
    for place, shown in enumerate(chunk):
        said, sure, shares = _say(model, answers[place])
        far = facts.usual_distance is not None and float(nearest.values[place]) > facts.usual_distance
        timid = facts.kind != "anomaly" and (needed is None or sure < needed)
        status = UNLIKE if far and facts.kind != "anomaly" else UNSURE if timid else ANSWERED
        told = said if status == ANSWERED else ""
        near = float(nearest.values[place]), int(nearest.indices[place])
        lines.append(Line(shown, status, told, sure, shares, *near))
    return answers, lines


def _say(model: AdaptedModel, raw: Tensor) -> tuple[str, float, tuple[float, ...]]:
    """Answer, confidence, probabilities."""
    facts, names = model.facts, model.facts.label_names
    if facts.kind == "anomaly":
        below = sum(score < float(raw) for score in facts.healthy_scores) / max(1, len(facts.healthy_scores))
        return "unusual" if below > HEALTHY_SHARE else "usual", math.nan, (below,)
    shares = probabilities(raw.unsqueeze(0), facts.kind, facts.temperature or 1.0)
    sure = float(confidence(shares, facts.kind))
    if facts.kind == "segmentation":
        found = raw.argmax(dim=0)
        areas = tuple(float((found == way).double().mean()) for way in range(len(names)))
        return "|".join(n for n, area in zip(names[1:], areas[1:], strict=True) if area > 0) or "nothing", sure, areas
    row = tuple(shares[0].tolist())
    if facts.kind == "multilabel":
        return "|".join(n for n, share in zip(names, row, strict=True) if share > 0.5) or "none", sure, row
    return names[int(raw.argmax())], sure, row


def _titles(model: AdaptedModel) -> list[str]:
    facts = model.facts
    word = "area" if facts.kind == "segmentation" else "probability"
    columns = [f"{word} of {name}" for name in facts.label_names]
    if facts.kind == "anomaly":
        columns = ["share of healthy images that are more usual"]
    return ["image", "status", "answer", "confidence", *columns, "distance", "nearest support", "overlay", "mask"]


def _cells(line: Line, overlay: str, mask: str) -> list[str]:
    sure = "" if math.isnan(line.confidence) else f"{line.confidence:.4f}"
    shares = [f"{share:.4f}" for share in line.shares]
    near = [f"{line.distance:.4f}", str(line.nearest)]
    return [line.shown.name, line.status, line.answer, sure, *shares, *near, overlay, mask]


def _inputs(model: AdaptedModel, chunk: list[Shown]) -> Tensor:
    images = torch.from_numpy(np.stack([shown.fitted for shown in chunk]))
    return model.inputs(images, torch.tensor([shown.modality for shown in chunk]))


def _draw(
    out: Path, model: AdaptedModel, learner: Learner, lines: list[Line], answers: Tensor, first: int
) -> list[str]:
    """A picture of each image: as it is, under its explanation, and the support image nearest to it."""
    (out / OVERLAYS).mkdir(parents=True, exist_ok=True)
    heat = explanation(model, learner, _inputs(model, [line.shown for line in lines]), answers)
    names = []
    for place, line in enumerate(lines):
        image = _picture(line.shown.fitted)
        if heat is None:
            over = pictures.outlined(image, answers[place].argmax(dim=0).numpy().astype(np.uint8))
        else:
            over = pictures.heated(image, heat[place].numpy(), None)
        nearest = _picture(model.support.images[line.nearest].numpy().astype(np.uint8))
        panel = np.concatenate([pictures.outlined(image, None), over, pictures.outlined(nearest, None)], axis=1)
        names.append(f"{OVERLAYS}/{first + place:05d}.png")
        Image.fromarray(panel).save(out / names[-1])
    return names


def _write_masks(out: Path, lines: list[Line], answers: Tensor, first: int) -> list[str]:
    (out / MASKS).mkdir(parents=True, exist_ok=True)
    names = []
    for place, line in enumerate(lines):
        found = Image.fromarray(answers[place].argmax(dim=0).numpy().astype(np.uint8))
        height, width = line.shown.pixels.shape[:2]
        names.append(f"{MASKS}/{first + place:05d}.png")
        found.resize((width, height), Image.Resampling.NEAREST).save(out / names[-1])
    return names


def _picture(fitted: np.ndarray) -> np.ndarray:
    return np.moveaxis(fitted, 0, -1).squeeze(-1) if fitted.shape[0] == 1 else np.moveaxis(fitted, 0, -1)


def _images(source: Path, model: AdaptedModel, modality: str | None, problems: list[Problem]) -> Iterator[Shown]:
    """Every image that can be read and is large enough; the others add to `problems`."""
    facts, known = model.facts, model.plan.task.modalities
    if modality is not None and modality not in known:
        among = ", ".join(known) or "the model knows none"
        raise UsageError(Problem("--modality", f"{modality!r} is no modality of the model", among))
    found = _rows(source, problems) if (source / SITE_FILE).is_file() else _files(source, problems)
    for name, pixels, told in found:
        kind = modality or told
        if known and kind not in known:
            problems.append(Problem(name, "its modality is not known", f"--modality {' | '.join(known)}"))
            continue
        try:
            fitted = fit_image(pixels, size=facts.image_size, channels=facts.channels)
        except UnreadableImageError as error:
            problems.append(Problem(name, str(error), "export larger images"))
            continue
        yield Shown(name, pixels, fitted, known.index(kind) if known else 0)


def _rows(folder: Path, problems: list[Problem]) -> Iterator[tuple[str, np.ndarray, str]]:
    """(row, pixels, modality) of a site's images, labelled or not."""
    target = Target(1, 1, None, kind="segmentation")  # the kind that asks for no label
    for row in read_rows(folder, load_site_config(folder), problems, target):
        yield row.where, row.pixels, row.details.modality


def _files(folder: Path, problems: list[Problem]) -> Iterator[tuple[str, np.ndarray, str]]:
    """(path, pixels, modality) of every file below `folder`; hidden ones and links are not."""
    if not folder.is_dir():
        raise DataError(Problem(str(folder), "is no folder", "check the path"))
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        try:
            yield str(inside), read_image(path), ""
        except UnreadableImageError as error:
            problems.append(Problem(str(inside), str(error), "it was left out"))
