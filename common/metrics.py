"""What a classifier is worth: metrics of class probabilities against labels.

Every metric is over the labels that occur among the queries. torchmetrics counts an absent class as 0, which
would punish a network for a query pool that happens to lack a label.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CALIBRATION_BINS = 15

METRICS = {  # name -> (title, one line for a reader who has never met it)
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
    "calibration_error": (
        "Calibration error",
        f"how far stated probabilities lie from the truth on average ({CALIBRATION_BINS} bins); 0 is best",
    ),
}


def classification_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The five `METRICS` of probabilities (n, ways) against labels (n,) int64, each in [0, 1].

    A metric that the labels cannot tell is nan: AUROC where a single label occurs, sensitivity to the second of
    two labels where that one does not.

    Raises ValueError for no rows, shapes that disagree, a label outside [0, ways) or a row that is no
    distribution.
    """
    _check(probabilities, labels)
    from torchmetrics.functional import classification as tm  # here: its import takes two seconds

    ways = probabilities.shape[1]
    present = labels.unique()
    recall = tm.multiclass_recall(probabilities, labels, num_classes=ways, average="none")
    f1 = tm.multiclass_f1_score(probabilities, labels, num_classes=ways, average="none")
    balanced = float(recall[present].mean())
    return {
        "balanced_accuracy": balanced,
        "auroc": _mean_auroc(probabilities, labels, present),
        "f1": float(f1[present].mean()),
        "sensitivity": balanced if ways > 2 else float(recall[1]) if 1 in present else math.nan,
        "calibration_error": float(
            tm.multiclass_calibration_error(probabilities, labels, num_classes=ways, n_bins=CALIBRATION_BINS)
        ),
    }


def _mean_auroc(probabilities: Tensor, labels: Tensor, present: Tensor) -> float:
    """One label against the rest, over the labels present; nan if there is nothing to rank against."""
    from torchmetrics.functional.classification import binary_auroc

    if len(present) < 2:
        return math.nan
    areas = [binary_auroc(probabilities[:, way], (labels == way).long()) for way in present.tolist()]
    return float(torch.stack(areas).mean())


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or not len(labels):
        raise ValueError(f"probabilities {tuple(probabilities.shape)} do not fit labels {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= probabilities.shape[1]:
        raise ValueError(f"a label lies outside 0..{probabilities.shape[1] - 1}")
    total = probabilities.sum(1)
    if not torch.isfinite(total).all() or not torch.allclose(total, torch.ones_like(total), atol=1e-3):
        raise ValueError("a row of the probabilities is not finite or does not sum to 1")
