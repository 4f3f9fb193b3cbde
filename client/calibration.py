"""What a hospital may believe of stated probabilities, learned from its own held-out images.

Temperature scaling (Guo et al. 2017, arXiv:1706.04599): p = softmax(z / T), one T for all, which changes no answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_LEAST, _MOST = 1e-3, 1e3  # of 1 / T; answers that are never wrong, or no better than guessing, have no optimum
_HALVINGS = 60
MAX_PIXELS = 200_000  # of masks that a temperature is fitted on; they are drawn evenly


def temperature(logits: Tensor, targets: Tensor, *, several: bool = False) -> float:
    """The T with the least cross-entropy of logits (n, ways) / T against labels (n,), or, where `several` findings may
    come together, against (n, findings) of 0 and 1.

    The cross-entropy is convex in 1 / T: its derivative rises, and is halved down to its zero.
    """
    z = logits.double()
    low, high = math.log(_LEAST), math.log(_MOST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _slope(z, targets, math.exp(middle), several) > 0:
            high = middle
        else:
            low = middle
    return math.exp(-(low + high) / 2)


def _slope(z: Tensor, targets: Tensor, inverse: float, several: bool) -> float:
    """The derivative of the mean cross-entropy in 1 / T."""
    if several:
        return float(((z * inverse).sigmoid() - targets.double()).mul(z).mean())
    expected = ((z * inverse).softmax(dim=1) * z).sum(dim=1)
    return float((expected - z.gather(1, targets.reshape(-1, 1)).squeeze(1)).mean())


def pixels_evenly(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, ways, H, W) and masks (n, H, W) as at most MAX_PIXELS rows (m, ways) and (m,)."""
    every = max(1, math.ceil(masks.numel() / MAX_PIXELS))
    return logits.movedim(1, -1).flatten(0, 2)[::every], masks.flatten()[::every]


def probabilities(logits: Tensor, kind: str, heat: float) -> Tensor:
    """Calibrated probabilities, of the shape of the logits, at temperature `heat`."""
    return (logits / heat).sigmoid() if kind == "multilabel" else (logits / heat).softmax(dim=1)


def confidence(shares: Tensor, kind: str) -> Tensor:
    """(n,): how sure the answer is: the probability of the label that is given; of findings that of the least sure
    one; of a mask the mean over its pixels."""
    if kind == "multilabel":
        return torch.maximum(shares, 1 - shares).amin(dim=1)
    surest = shares.amax(dim=1)
    return surest if surest.dim() == 1 else surest.mean(dim=(1, 2))


def least_confidence(sure: Tensor, right: Tensor, *, share: float, least: int) -> float | None:
    """The lowest confidence from which on at least `share` of the images are answered right; None if there is none
    that `least` images reach.

    `right` is in [0, 1]: whether, or how well, each image (n,) was answered. Equal confidences are answered together.
    """
    order = sure.argsort(descending=True)
    ranked = sure[order]
    running = right[order].double().cumsum(dim=0) / torch.arange(1, len(order) + 1)
    last_of_equals = torch.cat([ranked[1:] != ranked[:-1], torch.tensor([True])]) if len(order) else ranked > 0
    good = torch.nonzero(last_of_equals & (running >= share)).flatten() + 1
    good = good[good >= least]
    return float(ranked[good.max() - 1]) if len(good) else None


def usual_distance(distances: Tensor, *, alarms: float) -> float | None:
    """Beyond this distance an image counts as unlike those seen: of new images like the n held-out ones at most the
    share `alarms` lies beyond; None if n is too small to say.

    The ceil((n + 1)(1 - alarms))-th smallest: the conformal quantile (Vovk 2005; Angelopoulos, Bates 2021, 1.1).
    """
    rank = math.ceil((len(distances) + 1) * (1 - alarms) - 1e-9)
    return float(distances.sort().values[rank - 1]) if rank <= len(distances) else None


def nearest_distance(features: Tensor, support: Tensor) -> Tensor:
    """(n,): from each row to the nearest row of the support."""
    return torch.cdist(features, support).amin(dim=1)


def pooled(features: Tensor) -> Tensor:
    """(n, F) of features (n, F), or (n, F, H, W): their mean over the image."""
    return features if features.dim() == 2 else functional.adaptive_avg_pool2d(features, 1).flatten(1)
