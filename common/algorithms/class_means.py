"""Class means of features as a linear head.

    log p(c | x) = -t ||f(x) - m_c||^2 + const  =  2 t m_c . f(x) - t ||m_c||^2 + const

so the nearest-mean classifier is the linear head with weight 2 t m_c and bias -t ||m_c||^2 (Snell 2017, section 2.4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.episodes import Batch
from common.learner import Learner
from common.params import Params
from common.plan import AdaptationSpec, AlgorithmSpec

SHARPNESS = 8.0  # t; features have a mean square norm near 1, and distances among them are small
_ABSENT = -1e4  # the logit of a class that the support set does not show


def means_of(learner: Learner, params: Params, support: Batch) -> tuple[Tensor, Tensor]:
    """Weighted class means (ways, F) of the support's features, and the weight of each class (ways,)."""
    features = learner.features(params, support.inputs)
    labels = torch.arange(params["head.bias"].shape[0], device=features.device)  # one_hot does not go under vmap
    shares = (support.targets.unsqueeze(1) == labels).to(features) * support.weights.unsqueeze(1)
    counts = shares.sum(dim=0)
    return shares.T @ features / counts.clamp(min=1e-6).unsqueeze(1), counts


def head_of(means: Tensor, counts: Tensor) -> Params:
    """The nearest-mean classifier as a head; a class without a count is never chosen."""
    bias = -SHARPNESS * means.square().sum(dim=1)
    return {
        "head.weight": 2 * SHARPNESS * means,
        "head.bias": torch.where(counts > 0, bias, torch.full_like(bias, _ABSENT)),
    }


def adapt_by_class_means(
    learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, algorithm: AlgorithmSpec
) -> Params:
    """No step at all: the head is read off the support's class means."""
    return params | {name: value.detach() for name, value in head_of(*means_of(learner, params, support)).items()}
