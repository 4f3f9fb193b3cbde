"""What a network is worth at a kind of task: metrics of its answers against the truth, and what guessing would give.

Metrics of classes are over those that occur among the queries: counting an absent class as 0 would punish a network
for a query pool that happens to lack it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CALIBRATION_BINS = 15
HEALTHY_SHARE = 0.95  # of the healthy scores lie below the threshold that an anomaly must pass to be found

_CALIBRATION_ERROR = (
    "Calibration error",
    f"how far stated probabilities lie from the truth on average ({CALIBRATION_BINS} bins); 0 is best",
)
_METRICS = {  # kind of task -> name -> (title, one line for a reader who has never met it); the first one leads
    "classification": {
        "balanced_accuracy": (
            "Balanced accuracy",
            "the share of images recognised, averaged over the labels, so that a frequent label counts no more than "
            "a rare one; guessing gives 1 / number of labels",
        ),
        "auroc": (
            "AUROC",
            "the chance that an image with a label is ranked above one without it, averaged over the labels; guessing "
            "gives 0.5, and no threshold is needed",
        ),
        "f1": ("F1", "the harmonic mean of precision and sensitivity, averaged over the labels"),
        "sensitivity": (
            "Sensitivity",
            "with two labels the share of images with the second one (the disease) that is found; with more labels "
            "the mean over labels, which is the balanced accuracy",
        ),
        "calibration_error": _CALIBRATION_ERROR,
    },
    "multilabel": {
        "balanced_accuracy": (
            "Balanced accuracy",
            "the mean of the share of images with a finding that are recognised and the share of those without it, "
            "averaged over the findings; guessing gives 0.5",
        ),
        "auroc": (
            "AUROC",
            "the chance that an image with a finding is ranked above one without it, averaged over the findings; "
            "guessing gives 0.5, and no threshold is needed",
        ),
        "f1": ("F1", "the harmonic mean of precision and sensitivity, averaged over the findings"),
        "sensitivity": ("Sensitivity", "the share of images with a finding that is found, averaged over the findings"),
        "calibration_error": _CALIBRATION_ERROR,
    },
    "segmentation": {
        "dice": (
            "Dice score",
            "twice the overlap of the marked area and the true one over the sum of both, averaged over the classes of "
            "an image, then over images; 1 is a perfect match, and guessing is to mark the whole image",
        ),
        "iou": (
            "Overlap (IoU)",
            "what marked and true area share, over what either covers; averaged like the Dice score",
        ),
        "sensitivity": ("Sensitivity", "the share of all pixels of the classes looked for that is found"),
    },
    "anomaly": {
        "auroc": (
            "AUROC",
            "the chance that an image with an anomaly is ranked above a healthy one; guessing gives 0.5, and no "
            "threshold is needed",
        ),
        "average_precision": (
            "Average precision",
            "the share of anomalies among the images ranked at least as high as one, averaged over the anomalies; "
            "guessing gives the share of anomalies among all images",
        ),
        "sensitivity": (
            "Sensitivity",
            f"the share of anomalies that score above {HEALTHY_SHARE * 100:g} % of the healthy images; guessing gives "
            f"{1 - HEALTHY_SHARE:.2g}",
        ),
    },
}
_SCORES = {
    "classification": "accuracy",
    "multilabel": "share of findings told right",
    "segmentation": "Dice score",
    "anomaly": "score in the stand-in exercise",
}


def metrics_of(kind: str) -> dict[str, tuple[str, str]]:
    """The metrics of a kind of task: name -> (title, one line for a reader who has never met it)."""
    return _METRICS[kind]


def lead_metric(kind: str) -> str:
    """The metric that headlines, curves and ceilings of a kind of task speak of."""
    return next(iter(_METRICS[kind]))


def score_name(kind: str) -> str:
    """What the score is that training sites release: `common.tasks.Task.score`, averaged."""
    return _SCORES[kind]


def chance_of(kind: str, targets: Tensor, ways: int) -> float:
    """What guessing gives in the lead metric against `targets`, which are as the kind's metrics take them.

    1 / number of labels that occur for classification, 0.5 for multilabel and anomaly; for segmentation the Dice score
    of the best single foreground class everywhere.
    """
    if kind == "classification":
        return 1 / len(targets.unique())
    if kind == "segmentation":
        everywhere = (torch.full_like(targets, way) for way in range(1, ways))
        return max(segmentation_metrics(marked, targets, ways)["dice"] for marked in everywhere)
    return 0.5


def classification_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of probabilities (n, ways) against labels (n,) int64, each in [0, 1].

    A metric that the labels cannot tell is nan: AUROC where a single label occurs, sensitivity to the second of
    two labels where that one does not.

    Raises ValueError for no rows, shapes that disagree, a label outside [0, ways) or a row that is no
    distribution.
    """
    _check_classes(probabilities, labels)
    from torchmetrics.functional import classification as tm  # here: its import takes two seconds

    ways = probabilities.shape[1]
    present = labels.unique()
    recall = tm.multiclass_recall(probabilities, labels, num_classes=ways, average="none")
    f1 = tm.multiclass_f1_score(probabilities, labels, num_classes=ways, average="none")
    balanced = float(recall[present].mean())
    return {
        "balanced_accuracy": balanced,
        "auroc": _mean([_auroc(probabilities[:, way], labels == way) for way in present.tolist()]),
        "f1": float(f1[present].mean()),
        "sensitivity": balanced if ways > 2 else float(recall[1]) if 1 in present else math.nan,
        "calibration_error": float(
            tm.multiclass_calibration_error(probabilities, labels, num_classes=ways, n_bins=CALIBRATION_BINS)
        ),
    }


def multilabel_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Metrics of probabilities (n, findings) against labels (n, findings) of 0 and 1, each in [0, 1].

    A finding is told where its probability is above 0.5. Balanced accuracy and AUROC are over the findings that some
    images show and others do not, F1 and sensitivity over those that some show; nan if there is none. The calibration
    error is over all findings of all images together.

    Raises ValueError for no rows, shapes that disagree, a label that is neither 0 nor 1 or a value that is no
    probability.
    """
    _check_findings(probabilities, labels)
    from torchmetrics.functional.classification import binary_calibration_error  # here: its import takes two seconds

    shown, told = labels > 0.5, probabilities > 0.5
    hits, shows, tells = (shown & told).sum(0).double(), shown.sum(0), told.sum(0)
    recall = hits / shows
    quiet = (~shown & ~told).sum(0).double() / (~shown).sum(0)
    return {
        "balanced_accuracy": _mean([value for value in ((recall + quiet) / 2).tolist() if not math.isnan(value)]),
        "auroc": _mean([_auroc(*column) for column in zip(probabilities.T, shown.T, strict=True) if _both(column[1])]),
        "f1": _mean((2 * hits / (shows + tells))[shows > 0].tolist()),
        "sensitivity": _mean(recall[shows > 0].tolist()),
        "calibration_error": float(
            binary_calibration_error(probabilities.flatten(), shown.long().flatten(), n_bins=CALIBRATION_BINS)
        ),
    }


def segmentation_metrics(predicted: Tensor, masks: Tensor, ways: int) -> dict[str, float]:
    """Metrics of class indices `predicted` (n, H, W) against `masks` (n, H, W), both int64; class 0 is the background.

    Dice and IoU are means over the foreground classes that an image's prediction or truth shows, then over images; an
    image with neither counts 1. Sensitivity is the share of all foreground pixels that is found, nan without any.

    Raises ValueError for no rows, shapes that disagree or a class outside [0, ways).
    """
    _check_masks(predicted, masks, ways)
    columns = [_overlaps(predicted == way, masks == way) for way in range(1, ways)]
    both, marked, true = (torch.stack(column, dim=1).double() for column in zip(*columns, strict=True))  # (n, ways - 1)
    return {
        "dice": _mean_over_images(2 * both / (marked + true)),
        "iou": _mean_over_images(both / (marked + true - both)),
        "sensitivity": float(both.sum() / true.sum()),
    }


def anomaly_metrics(scores: Tensor, anomalous: Tensor) -> dict[str, float]:
    """Metrics of scores (n,), higher for what is less usual, against anomalous (n,) bool.

    All are nan where healthy images or anomalies are missing.

    Raises ValueError for no rows, shapes that disagree, truth that is not bool or a score that is not finite.
    """
    _check_scores(scores, anomalous)
    if not _both(anomalous):
        return dict.fromkeys(_METRICS["anomaly"], math.nan)
    found, healthy = scores[anomalous].double(), scores[~anomalous].double()
    precision = _at_least(found, found) / _at_least(found, scores.double())
    return {
        "auroc": _auroc(scores, anomalous),
        "average_precision": float(precision.mean()),
        "sensitivity": float((found > healthy.quantile(HEALTHY_SHARE)).double().mean()),
    }


def _auroc(scores: Tensor, positive: Tensor) -> float:
    """The share of pairs (positive, other) in order, a tie counting half; nan without a pair."""
    if not _both(positive):
        return math.nan
    others = scores[~positive].sort().values
    below = torch.searchsorted(others, scores[positive].contiguous(), right=False)
    up_to = torch.searchsorted(others, scores[positive].contiguous(), right=True)
    return float((below + up_to).double().mean() / (2 * len(others)))


def _at_least(thresholds: Tensor, scores: Tensor) -> Tensor:
    """How many scores reach each threshold."""
    return len(scores) - torch.searchsorted(scores.sort().values, thresholds, right=False)


def _overlaps(marked: Tensor, true: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each image (n,) in both, in the marked and in the true area."""
    return (marked & true).sum((1, 2)), marked.sum((1, 2)), true.sum((1, 2))


def _mean_over_images(of_class: Tensor) -> float:
    """(n, classes); nan is a class that an image has nothing of, and an image of nan alone counts 1."""
    return float(of_class.nanmean(dim=1).nan_to_num(1.0).mean())


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _both(truth: Tensor) -> bool:
    return bool(truth.any()) and not bool(truth.all())


def _check_classes(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or not len(labels):
        raise ValueError(f"probabilities {tuple(probabilities.shape)} do not fit labels {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
        raise ValueError(f"a label lies outside 0..{probabilities.shape[1] - 1}")
    total = probabilities.sum(1)
    if not torch.isfinite(total).all() or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ValueError("a row of the probabilities is not finite or does not sum to 1")


def _check_findings(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or probabilities.shape != labels.shape or not probabilities.numel():
        raise ValueError(f"probabilities {tuple(probabilities.shape)} do not fit labels {tuple(labels.shape)}")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("a label is neither 0 nor 1")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("a probability is not finite or outside 0..1")


def _check_masks(predicted: Tensor, masks: Tensor, ways: int) -> None:
    if predicted.ndim != 3 or predicted.shape != masks.shape or not predicted.numel():
        raise ValueError(f"predictions {tuple(predicted.shape)} do not fit masks {tuple(masks.shape)}")
    for values, name in ((predicted, "a prediction"), (masks, "a mask")):
        if int(values.min()) < 0 or int(values.max()) >= ways:
            raise ValueError(f"{name} holds a class outside 0..{ways - 1}")


def _check_scores(scores: Tensor, anomalous: Tensor) -> None:
    if scores.ndim != 1 or scores.shape != anomalous.shape or not len(scores):
        raise ValueError(f"scores {tuple(scores.shape)} do not fit truth {tuple(anomalous.shape)}")
    if anomalous.dtype != torch.bool:
        raise ValueError(f"the truth is {anomalous.dtype}, not bool")
    if not torch.isfinite(scores).all():
        raise ValueError("a score is not finite")
