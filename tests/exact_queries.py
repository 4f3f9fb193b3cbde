"""Learners whose right answers are known, and private queries without clipping, noise or chance."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

from common.algorithms.interface import ClassSums
from common.episodes import Batch, Episode, MetaLoss, evenly, meta_gradients
from common.learner import Learner
from common.models import Network, build_model, parameters
from common.params import Params
from common.plan import ModelSpec, TaskSpec
from common.tasks import TASKS, Task

WAYS = 3
CLASSES = TaskSpec(kind="classification", image_size=16, label_sets={"organs": ["liver", "lung", "heart"]})


class _Point(nn.Module):
    """The parameter itself, whatever the image."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.w.expand(len(inputs), -1)


def point_learner(size: int = 3) -> Learner:
    """L(w) = 0.5 ||w - y||^2 for each row, y its target, w the parameter 'body.w'."""
    task = Task(loss=lambda w, y: 0.5 * (w - y).square().sum(dim=1), score=lambda w, y: torch.zeros(len(w)))
    return Learner(Network(_Point(size), nn.Identity()), task)


def towards(y: Tensor, rows: int = 2) -> Batch:
    """A batch for `point_learner` whose loss is least at `y`."""
    return evenly(torch.zeros(rows, 1, 1, 1), y.expand(rows, -1))


def conv_learner(trainable: str = "film", *, double: bool = True, ways: int = WAYS) -> tuple[Learner, Params]:
    """A small Conv-4 and its parameters, with a head that is not zero; in float64 unless said otherwise."""
    spec = ModelSpec.model_validate({"name": "conv4", "width": 8, "trainable": trainable})
    network = build_model(spec, CLASSES, ways=ways, seed=3)
    params = parameters(network)
    rng = torch.Generator().manual_seed(1)
    for name, value in params.items():
        if name.startswith(("head.", "mapping.")):
            params[name] = value + 0.3 * torch.randn(value.shape, generator=rng)
    if double:
        network, params = network.double(), {name: value.double() for name, value in params.items()}
    return Learner(network, TASKS["classification"]), params


def images(rows: int, seed: int, *, ways: int = WAYS, double: bool = True) -> Batch:
    """Random images 16 x 16, of all labels in turn, with weights that differ."""
    rng = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if double else torch.float32
    inputs = torch.randn(rows, 1, 16, 16, generator=rng, dtype=dtype)
    weights = 0.5 + torch.rand(rows, generator=rng, dtype=dtype)
    return Batch(inputs, torch.arange(rows) % ways, weights)


def episode(support: int, query: int, seed: int, *, double: bool = True) -> Episode:
    return Episode(images(support, seed, double=double), images(query, seed + 1000, double=double))


def written_out_loss(network: nn.Module, params: Params, batch: Batch) -> Tensor:
    """The weighted mean cross-entropy, by torch alone."""
    own = {name: value for name, value in params.items() if name in dict(network.named_parameters())}
    losses = cross_entropy(functional_call(network, own, (batch.inputs,)), batch.targets, reduction="none")
    return (losses * batch.weights).sum() / batch.weights.sum()


@dataclass
class ExactQueries:
    """What `client.private_data` answers, exactly; counts its queries."""

    learner: Learner
    public: Params
    batch: Batch
    episodes: list[Episode] = field(default_factory=list)
    asked: int = 0
    fixed: list[Params | None] = field(default_factory=list)

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        self.asked += 1
        self.fixed.append(fixed)
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        loss = written_out_loss(self.learner.network, self.public | (fixed or {}) | leaves, self.batch)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def episode_gradient(self, params: Params, meta_loss: MetaLoss, fixed: Params | None = None) -> Params:
        self.asked += 1
        others = {name: value for name, value in (self.public | (fixed or {})).items() if name not in params}
        found = list(meta_gradients(self.learner, params, others, self.episodes, meta_loss))
        return {name: torch.stack([gradient[name] for gradient in found]).mean(dim=0) for name in params}

    def class_sums(self, params: Params) -> ClassSums:
        self.asked += 1
        features = self.learner.features(self.public | params, self.batch.inputs)
        shares = one_hot(self.batch.targets, WAYS).to(features) / len(features)
        return ClassSums(shares.T @ features, shares.sum(dim=0), 0.0)
