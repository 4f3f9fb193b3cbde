"""`predict`: what an adapted model says about a folder of images, when it should say nothing, and what it looks at.

Local use: nothing leaves the hospital.

    predictions.csv    a line for each image
    overlays/          what speaks for each answer (Grad-CAM, or the contour of a mask), and the nearest support image
    masks/             segmentation: class indices as grey values, at the image's own size; of DICOM also a segmentation
                       object for each series, of a NIfTI volume also a NIfTI
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

from client.adapted_model import AdaptedModel, Facts
from client.calibration import confidence, pooled, probabilities
from client.data.intake import Target, read_rows
from client.data.readers import UnreadableImageError, fit_image, kind_of, require_extra
from client.data.stacks import count_images, read_stack
from client.explain import explanation, scale_in_words
from client.masks import Origin, write_whole_masks
from client.overlays import Heat, Nearest, Overlay, draw
from client.site import SITE_FILE, load_site_config
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

    name: str  # the file inside the folder, and which of its images ("film.dcm#3", from 0); or the row of the site
    pixels: np.ndarray  # uint8 (H, W) or (H, W, 3), as it was read
    fitted: np.ndarray  # uint8 (C, S, S)
    modality: int  # index into the plan's; 0 if it names none
    origin: Origin | None = None  # None: a site's row


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
    needed = model.facts.least_confidence if least is None else least
    learner, counts = model.learner, dict.fromkeys((ANSWERED, UNSURE, UNLIKE), 0)
    images, rows = _images(source, model, modality, problems), list[_Row]()
    while chunk := list(islice(images, _BATCH)):
        first = sum(counts.values())
        answers, lines = answer(model, learner, chunk, least=least)
        drawn = _draw(out, model, learner, lines, answers, first, needed) if overlays else [""] * len(lines)
        masks = _write_masks(out, lines, answers, first) if model.facts.kind == "segmentation" else [""] * len(lines)
        for line, picture, mask in zip(lines, drawn, masks, strict=True):
            counts[line.status] += 1
            rows.append((line.shown.origin, _cells(line, picture, mask)))
    if not rows:
        raise DataError(problems[:20] or [Problem(str(source), "holds no image", "check the path")])
    found = [(origin, out / cells[-1]) for origin, cells in rows if origin and cells[-1]]
    whole = write_whole_masks(out / MASKS, found, model.facts, problems)
    _write_table(out, model, rows, whole)
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
    said = ["image", "status", "answer", "confidence"]
    return [*said, *columns, "distance", "nearest support", "overlay", "mask", "whole mask"]


_Row = tuple[Origin | None, list[str]]  # where an image is from, and what is said of it; the mask's file last


def _write_table(out: Path, model: AdaptedModel, rows: list[_Row], whole: dict[Path, Path]) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_titles(model))
    for origin, cells in rows:
        held = whole.get(origin.path) if origin and cells[-1] else None
        writer.writerow([*cells, held.relative_to(out).as_posix() if held else ""])
    write_atomically(out / TABLE, table.getvalue().encode())


def _cells(line: Line, overlay: str, mask: str) -> list[str]:
    sure = "" if math.isnan(line.confidence) else f"{line.confidence:.4f}"
    shares = [f"{share:.4f}" for share in line.shares]
    near = [f"{line.distance:.4f}", str(line.nearest)]
    return [line.shown.name, line.status, line.answer, sure, *shares, *near, overlay, mask]


def _inputs(model: AdaptedModel, chunk: list[Shown]) -> Tensor:
    images = torch.from_numpy(np.stack([shown.fitted for shown in chunk]))
    return model.inputs(images, torch.tensor([shown.modality for shown in chunk]))


def _draw(
    out: Path,
    model: AdaptedModel,
    learner: Learner,
    lines: list[Line],
    answers: Tensor,
    first: int,
    needed: float | None,
) -> list[str]:
    """A picture of each image, as `client.overlays` lays it out."""
    (out / OVERLAYS).mkdir(parents=True, exist_ok=True)
    heat = explanation(model, learner, _inputs(model, [line.shown for line in lines]), answers)
    names = []
    for place, line in enumerate(lines):
        glow = None if heat is None else Heat(heat[place].numpy(), _about(model, answers[place]), scale_in_words(model))
        found = answers[place].argmax(dim=0).numpy().astype(np.uint8) if heat is None else None
        answered = line.status == ANSWERED
        overlay = Overlay(
            image=line.shown.pixels,
            said=f"answer: {line.answer}" if answered else f"NO ANSWER: {line.status}",
            answered=answered,
            why=_why(model, line, needed),
            heat=glow,
            mask=found if answered else None,
            classes=model.facts.label_names[1:],
            nearest=_nearest(model, line),
        )
        names.append(f"{OVERLAYS}/{first + place:05d}.png")
        draw(overlay).save(out / names[-1], compress_level=1)
    return names


def _about(model: AdaptedModel, raw: Tensor) -> str:
    """What the heat map is of."""
    if model.facts.kind == "anomaly":
        return "what is unusual"
    return f"what speaks for '{model.facts.label_names[int(raw.argmax())]}'"


def _why(model: AdaptedModel, line: Line, needed: float | None) -> str:
    """Probabilities, and what they would have to be."""
    facts = model.facts
    if facts.kind == "anomaly":
        return f"more unusual than {line.shares[0]:.0%} of the healthy images; unusual: more than {HEALTHY_SHARE:.0%}"
    if facts.kind == "segmentation":
        shares = f"confidence {line.confidence:.2f}"
    else:
        named = zip(facts.label_names, line.shares, strict=True)
        shares = "probability of " + ", ".join(f"{name} {share:.2f}" for name, share in named)
    if line.status == UNLIKE:
        return f"{shares}; distance {line.distance:.2f} from the nearest support image, usual up to {_usual(facts)}"
    needs = "no confidence was found high enough" if needed is None else f"answered from confidence {needed:.2f} on"
    return f"{shares}; {needs}"


def _nearest(model: AdaptedModel, line: Line) -> Nearest:
    facts, target = model.facts, model.support.targets[line.nearest]
    picture = _picture(model.support.images[line.nearest].numpy().astype(np.uint8))
    words = f"distance {line.distance:.2f}; usual up to {_usual(facts)}"
    if facts.kind == "segmentation":
        mask = target.numpy().astype(np.uint8)
        return Nearest(picture, mask, (f"support image {line.nearest}, its mask by the hospital", words))
    if facts.kind == "multilabel":
        label = "|".join(n for n, here in zip(facts.label_names, target.tolist(), strict=True) if here) or "none"
    else:
        label = facts.label_names[int(target)]
    return Nearest(picture, None, (f"support image {line.nearest}, labelled '{label}'", words))


def _usual(facts: Facts) -> str:
    return "any" if facts.usual_distance is None else f"{facts.usual_distance:.2f}"


def _write_masks(out: Path, lines: list[Line], answers: Tensor, first: int) -> list[str]:
    """Of the images that are answered: a mask is an answer."""
    (out / MASKS).mkdir(parents=True, exist_ok=True)
    names = []
    for place, line in enumerate(lines):
        if line.status != ANSWERED:
            names.append("")
            continue
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
    for name, pixels, told, origin in found:
        kind = modality or told
        if known and kind not in known:
            problems.append(Problem(name, "its modality is not known", f"--modality {' | '.join(known)}"))
            continue
        try:
            fitted = fit_image(pixels, size=facts.image_size, channels=facts.channels)
        except UnreadableImageError as error:
            problems.append(Problem(name, str(error), "export larger images"))
            continue
        yield Shown(name, pixels, fitted, known.index(kind) if known else 0, origin)


_Found = tuple[str, np.ndarray, str, Origin | None]  # name, pixels, modality


def _rows(folder: Path, problems: list[Problem]) -> Iterator[_Found]:
    """A site's images, labelled or not."""
    target = Target(1, 1, None, kind="segmentation")  # the kind that asks for no label
    for row in read_rows(folder, load_site_config(folder), problems, target):
        yield row.where, row.pixels, row.details.modality, None


def _files(folder: Path, problems: list[Problem]) -> Iterator[_Found]:
    """Every image of every file below `folder`, each slice of a volume; hidden files and links are left out."""
    if not folder.is_dir():
        raise DataError(Problem(str(folder), "is no folder", "check the path"))
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        try:
            kind = kind_of(path)
            if kind in ("dicom", "nifti"):
                require_extra()
            count = count_images(path, kind)
            for frame, pixels in enumerate(read_stack(path, kind, range(count))):
                name = str(inside) if count == 1 else f"{inside}#{frame}"
                yield name, pixels, "", Origin(path, kind, frame, count)
        except UnreadableImageError as error:
            problems.append(Problem(str(inside), str(error), "it was left out"))
