"""A model adapted at a hospital, for its own use: a folder that stays there.

adapted.json           what it answers and how well: `Facts`
model.safetensors      the whole network
support.safetensors    the images that it was adapted to and their features: patients' images, never exported
report.html            what `adapt` found
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from torch import Tensor

from client.answers import answers_of
from client.cross_validation import ARMS
from client.question import own_question
from common.checkpoint import load_checkpoint, save_checkpoint, shapes
from common.episodes import Batch, evenly
from common.errors import CheckpointError, Problem
from common.files import write_atomically
from common.images import normalise, with_modality
from common.learner import Learner
from common.metrics import lead_metric, metrics_of
from common.models import build_model, parameters
from common.params import Params, digest, to_arrays
from common.plan import StudyPlan, TaskKind, plan_from_json
from common.starting_point import outputs_of
from common.tasks import task_of
from common.validation import Strict

FACTS, MODEL, SUPPORT, PAGE = "adapted.json", "model.safetensors", "support.safetensors", "report.html"


class Measured(Strict):
    """A mean and its 95 % interval; None where nothing could be told."""

    mean: float | None
    low: float | None
    high: float | None


class MeasuredGroup(Strict):
    """The lead metric among some held-out patients."""

    detail: str
    name: str
    patients: int
    images: int
    value: Measured


class Facts(Strict):
    """What is known of an adapted model. Counts are exact: they stay at the hospital."""

    format: Literal["1"] = "1"
    site: str
    phantom: bool
    version: str
    time: float  # seconds since 1970
    plan: str  # the study's plan, canonical JSON
    labels: str | None  # the plan's label set that was asked for
    own: list[str]  # or the hospital's own labels
    kind: TaskKind
    label_names: list[str]
    image_size: int
    channels: int
    start: str  # SHA-256 of the meta-initialization's parameters
    start_study: str  # digest of the plan that it was learned under
    start_privacy: str
    model: str  # SHA-256 of the adapted parameters
    shots: int
    support_images: int
    steps: int
    lr: float
    head_lr: float | None
    patients: int
    images: int
    images_of_label: dict[str, int]
    folds: int
    repeats: int
    chance: float
    metrics: dict[str, dict[str, Measured]]  # arm -> metric
    gains: dict[str, dict[str, Measured]]  # over arm -> metric
    groups: list[MeasuredGroup]
    temperature: float | None  # None for anomalies
    calibration_before: float | None
    calibration_after: float | None
    asked_share: float  # of the answers that are given, so many shall be right
    least_confidence: float | None  # None: no confidence is high enough
    alarms: float
    usual_distance: float | None  # None: too few images to say
    healthy_scores: list[float]  # anomalies: of held-out healthy images, sorted
    notes: list[str]
    seconds: float


@dataclass(frozen=True)
class Support:
    """The images of the support set."""

    images: Tensor  # float (n, C, S, S), 0 to 255
    targets: Tensor  # float: as the task's, int64 but for findings
    features: Tensor  # (n, F)
    modalities: Tensor  # float (n,); empty if the plan names none


@dataclass(frozen=True)
class AdaptedModel:
    """Ready to answer."""

    facts: Facts
    plan: StudyPlan  # asks the hospital's own question
    params: Params
    support: Support

    @property
    def learner(self) -> Learner:
        ways = outputs_of(self.plan, self.facts.site)
        return Learner(build_model(self.plan.model, self.plan.task, ways=ways), task_of(self.plan, self.facts.site))

    def inputs(self, images: Tensor, modalities: Tensor) -> Tensor:
        """What the network is shown of images (n, C, S, S), 0 to 255."""
        shown = normalise(images)
        return with_modality(shown, modalities.long()) if self.plan.task.modalities else shown

    def support_batch(self) -> Batch:
        return evenly(self.inputs(self.support.images, self.support.modalities), self.support.targets)

    def answers(self, learner: Learner, inputs: Tensor) -> Tensor:
        """As `client.answers.answers_of`."""
        return answers_of(learner, self.params, self.support_batch(), inputs, self.plan)


def question_of(facts: Facts) -> StudyPlan:
    """The plan that asks the hospital's own question."""
    return own_question(plan_from_json(facts.plan), facts.site, labels=facts.labels, own=facts.own)


def save_adapted(folder: Path, facts: Facts, params: Params, support: Support) -> None:
    """Write the model; `adapted.json` last, so that a folder with it is whole. Raises CheckpointError, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    save_checkpoint(folder / MODEL, params, {"start": facts.start, "site": facts.site})
    save_checkpoint(folder / SUPPORT, vars(support), {"model": facts.model})
    write_atomically(folder / FACTS, facts.model_dump_json(indent=1).encode())


def load_adapted(folder: Path) -> AdaptedModel:
    """Read a folder that `adapt` wrote. Raises CheckpointError if it is not whole, or its parts do not fit."""
    facts = read_facts(folder)
    try:
        plan = question_of(facts)
    except ValueError as error:
        raise _error(folder / FACTS, f"holds no valid plan ({type(error).__name__})") from None
    template = parameters(build_model(plan.model, plan.task, ways=outputs_of(plan, facts.site)))
    params = load_checkpoint(folder / MODEL, shapes(template)).tensors
    kept = load_checkpoint(folder / SUPPORT)
    if digest(to_arrays(params)) != facts.model or kept.metadata.get("model") != facts.model:
        raise _error(folder, "its files are not of one adaptation")
    tensors = kept.tensors
    if tensors.keys() != Support.__dataclass_fields__.keys():
        raise _error(folder / SUPPORT, "holds no support set")
    return AdaptedModel(facts, plan, params, Support(**tensors))


def told(facts: Facts) -> str:
    """Whether a gain over both other ways is shown, in one honest sentence."""
    lead = lead_metric(facts.kind)
    title = metrics_of(facts.kind)[lead][0]
    gains = {arm: facts.gains[arm][lead] for arm in facts.gains}
    shown = [arm for arm, gain in gains.items() if gain.low is not None and gain.low > 0]
    worse = [arm for arm, gain in gains.items() if gain.high is not None and gain.high < 0]
    if len(shown) == len(gains):
        least = min((gain for gain in gains.values() if gain.mean is not None), key=lambda gain: gain.mean or 0.0)
        return f"A gain is shown: {title} is {in_figures(least)} higher than by the better of the other two ways."
    if worse:
        return f"The meta-initialization is worse here than {' and '.join(ARMS[arm] for arm in worse)}: do not use it."
    if shown:
        rest = " and ".join(ARMS[arm] for arm in gains if arm not in shown)
        return f"A gain is shown over {ARMS[shown[0]]}, and none over {rest}."
    return "No gain is shown: on these patients nothing tells the meta-initialization from a random initialization."


def in_figures(value: Measured) -> str:
    """'0.71 [0.65, 0.77]'; a dash where nothing could be told."""
    if value.mean is None:
        return "–"
    return f"{value.mean:.2f}" + ("" if value.low is None else f" [{value.low:.2f}, {value.high:.2f}]")


def read_facts(folder: Path) -> Facts:
    """Raises CheckpointError if the folder holds no adapted model."""
    try:
        return Facts.model_validate_json((folder / FACTS).read_text())
    except FileNotFoundError:
        raise _error(folder, f"holds no adapted model: there is no {FACTS}") from None
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _error(folder / FACTS, f"cannot be read ({type(error).__name__})") from None


def _error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(str(Problem(str(path), what, "make it with `consilium-site adapt`")))
