"""`adapt`: from a meta-initialization and a few labelled images to a tested model of the hospital's own question.

Local use: nothing leaves the hospital, so no private query is asked and nothing is charged (privacy.md, section 1).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client.adapt import Learned, spread, whole_start
from client.adapted_model import Facts, Measured, MeasuredGroup, Support
from client.calibration import (
    confidence,
    least_confidence,
    pixels_evenly,
    probabilities,
    temperature,
    usual_distance,
)
from client.cross_validation import (
    ARMS,
    META,
    REPEATS,
    CrossValidation,
    OutOfFold,
    Watch,
    adapted_here,
    cross_validate,
    features_of,
)
from client.data.dataset import SiteData
from client.data.kept import ImageStore
from client.data.load import load_site
from client.question import own_question, read_plan, read_start
from client.site import load_site_config
from client.splits import Split, rng_of, shortage, support_groups, support_rows
from client.subgroups import groups_of, rightness
from common.errors import DataError, Problem
from common.metrics import classification_metrics, metrics_of, multilabel_metrics
from common.models import build_model, parameters
from common.params import Params, digest, select, to_arrays
from common.plan import StudyPlan
from common.records import software_version
from common.trials import Estimate

SHARE_RIGHT = 0.9  # of the answers that are given
SHARE_RIGHT_MASKS = 0.8  # mean Dice of the masks that count as sure
ALARMS = 0.05  # of images like those seen, taken for unlike them
_LEAST_ANSWERED = 10  # images, out of which a share can be said


@dataclass(frozen=True)
class Adaptation:
    """A model that is adapted and measured; what of it is for the hospital's own eyes included."""

    facts: Facts
    plan: StudyPlan
    params: Params
    support: Support
    data: SiteData
    crossed: CrossValidation
    support_rows: Tensor

    def unseen(self, count: int) -> Tensor:
        """`count` rows of patients who are not in the support set, the labels in turn."""
        known = torch.isin(self.data.patients, self.data.patients[self.support_rows])
        rows = torch.nonzero(~known).flatten()
        return spread(self.data, rows, count)


def adapt_site(
    folder: Path,
    meta: Path,
    *,
    plan_file: Path | None,
    labels: str | None,
    own: list[str],
    shots: int | None,
    share_right: float | None,
    watch: Watch,
) -> Adaptation:
    """Adapt META to the site in `folder`, and measure what that is worth.

    Raises PlanError, DataError, UsageError, CheckpointError.
    """
    began = time.monotonic()
    config = load_site_config(folder)
    study = read_plan(meta, plan_file)
    start = read_start(meta, study)
    plan = own_question(study, config.name, labels=labels, own=own)
    data = load_site(folder, plan, site=config.name, store=ImageStore(folder / config.state))
    notes = []
    if start.study and config.name in study.training_sites:
        data = _patients_who_did_not_train(folder, data)
        notes.append("this hospital trained the meta-initialization: only its test patients are used here")
    count = shots or plan.evaluation.lead_shots
    crossed = cross_validate(start.params, data, plan, shots=count, watch=watch)
    watch(1.0, "the model itself")
    learned = Learned.of(start.params, data, plan)
    groups = support_groups(data, Split(torch.arange(len(data)), torch.arange(0)), rng_of(plan.seed, "own", data.site))
    rows = support_rows(groups, count)
    phi, support, spec = adapted_here(learned, rows)
    whole = whole_start(start.params, data, plan) | phi
    params = select(whole, parameters(build_model(plan.model, plan.task, ways=data.ways)))  # no rates of Meta-SGD
    kind = plan.task.kind
    notes += sorted({fold.note for fold in crossed.folds if fold.note} | set(filter(None, [shortage(groups, count)])))
    share = share_right or (SHARE_RIGHT_MASKS if kind == "segmentation" else SHARE_RIGHT)
    calibrated = _calibrated(data, crossed.seen, share)
    seen = crossed.seen
    facts = Facts(
        site=config.name,
        phantom=config.phantom,
        version=software_version(),
        time=time.time(),
        plan=study.to_json(),
        labels=labels,
        own=own,
        kind=kind,
        label_names=list(data.label_names),
        image_size=plan.task.image_size,
        channels=plan.task.channels,
        start=start.digest,
        start_study=start.study,
        start_privacy=start.privacy,
        model=digest(to_arrays(params)),
        shots=count,
        support_images=len(rows),
        steps=spec.steps,
        lr=spec.lr,
        head_lr=spec.head_lr,
        patients=len(data.patients.unique()),
        images=len(data),
        images_of_label=_counts(data),
        folds=crossed.count,
        repeats=REPEATS,
        chance=next(fold.chance for fold in crossed.folds),
        metrics={arm: {m: _measured(crossed.metric(arm, m)) for m in metrics_of(kind)} for arm in ARMS},
        gains={arm: {m: _measured(crossed.gain(arm, m)) for m in metrics_of(kind)} for arm in ARMS if arm != META},
        groups=[
            MeasuredGroup(
                detail=group.detail,
                name=group.name,
                patients=group.patients,
                images=group.images,
                value=_measured(group.value),
            )
            for group in groups_of(data.rows(seen.rows), seen.answers, seed=plan.seed)
        ],
        asked_share=share,
        alarms=ALARMS,
        usual_distance=usual_distance(seen.distances, alarms=ALARMS),
        healthy_scores=sorted(seen.answers[data.labels[seen.rows] == 0].tolist()) if kind == "anomaly" else [],
        notes=notes,
        seconds=time.monotonic() - began,
        temperature=calibrated.temperature,
        calibration_before=calibrated.before,
        calibration_after=calibrated.after,
        least_confidence=calibrated.least_confidence,
    )
    features = features_of(learned, phi, support.inputs)
    modalities = torch.zeros(0) if data.modalities is None else data.modalities[rows].float()
    kept = Support(data.images[rows].float(), data.targets_at(rows).float(), features, modalities)
    return Adaptation(facts, plan, params, kept, data, crossed, rows)


def _patients_who_did_not_train(folder: Path, data: SiteData) -> SiteData:
    held = data.of_split("test")
    if not len(held):
        what = "this hospital trained the meta-initialization, and keeps no patient in split 'test'"
        raise DataError(Problem(str(folder), what, "nobody is left to measure on; start from another hospital's run"))
    return held


@dataclass(frozen=True)
class _Calibrated:
    """What held-out patients say of stated probabilities; None for anomalies, which have none."""

    temperature: float | None
    before: float | None  # calibration error
    after: float | None
    least_confidence: float | None


def _calibrated(data: SiteData, seen: OutOfFold, share: float) -> _Calibrated:
    if data.kind == "anomaly":
        return _Calibrated(None, None, None, None)
    held = data.rows(seen.rows)
    heat = _temperature(held, seen.answers)
    sure = confidence(probabilities(seen.answers, data.kind, heat), data.kind)
    least = least_confidence(sure, rightness(held, seen.answers), share=share, least=_LEAST_ANSWERED)
    return _Calibrated(heat, *_calibration_errors(held, seen), least)


def _temperature(data: SiteData, answers: Tensor) -> float:
    if data.kind == "segmentation":
        return temperature(*pixels_evenly(answers, data.targets))
    return temperature(answers, data.targets, several=data.kind == "multilabel")


def _calibration_errors(data: SiteData, seen: OutOfFold) -> tuple[float | None, float | None]:
    """Before and after; the temperature of each fold comes from the other folds."""
    if data.kind == "segmentation":
        return None, None
    metrics = multilabel_metrics if data.kind == "multilabel" else classification_metrics
    cooled = cooled_out_of_fold(data, seen)
    raw = probabilities(seen.answers, data.kind, 1.0)
    return metrics(raw, data.targets)["calibration_error"], metrics(cooled, data.targets)["calibration_error"]


def cooled_out_of_fold(data: SiteData, seen: OutOfFold) -> Tensor:
    """Probabilities of each held-out image at the temperature of the other folds; `data` has the rows of `seen`."""
    shares = torch.empty_like(seen.answers)
    for fold in seen.folds.unique():
        here = seen.folds == fold
        heat = _temperature(data.rows(torch.nonzero(~here).flatten()), seen.answers[~here])
        shares[here] = probabilities(seen.answers[here], data.kind, heat)
    return shares


def _counts(data: SiteData) -> dict[str, int]:
    if data.kind == "segmentation":
        return {}
    if data.kind == "multilabel":
        return {name: int(data.labels[:, i].sum()) for i, name in enumerate(data.label_names)}
    return {name: int((data.labels == i).sum()) for i, name in enumerate(data.label_names)}


def _measured(estimate: Estimate) -> Measured:
    mean, low, high = (None if math.isnan(v) else v for v in (estimate.mean, estimate.low, estimate.high))
    return Measured(mean=mean, low=low, high=high)
