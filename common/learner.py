"""A network and its task as functions of parameters: what inner loops and meta-losses are written in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import functional_call, grad

from common.models import BODY, HEAD, Network
from common.params import Params, within, zeros_like
from common.tasks import Task

if TYPE_CHECKING:
    from common.episodes import Batch


@dataclass(frozen=True)
class Learner:
    """The network gives the architecture alone: its own values are neither read nor changed."""

    network: Network
    task: Task
    sparing: bool = False  # of memory, at the cost of time: `common.inner_loop.adapt`

    def outputs(self, params: Params, inputs: Tensor) -> Tensor:
        """(n, ...) of inputs (n, C, H, W)."""
        outputs: Tensor = self.head(params, self.features(params, inputs))
        return outputs

    def features(self, params: Params, inputs: Tensor) -> Tensor:
        """The body's (n, F), or (n, F, H, W)."""
        features: Tensor = functional_call(self.network.body, within(params, BODY), (inputs,))
        return features

    def head(self, params: Params, features: Tensor) -> Tensor:
        """The outputs of features."""
        outputs: Tensor = functional_call(self.network.head, within(params, HEAD), (features,))
        return outputs

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of the batch's rows, each counting by its weight; scalar."""
        return (self.task.loss(outputs, batch.targets) * batch.weights).sum() / batch.weights.sum()

    def twin(self) -> Learner:
        """The same for another thread, since a functional call puts its parameters into the modules while it runs; and
        sparing, since there are several."""
        shared = {id(parameter): parameter for parameter in self.network.parameters()}
        return replace(self, network=copy.deepcopy(self.network, shared), sparing=True)


def gradient_at(params: Params, loss: Callable[[Params], Tensor], *, differentiable: bool = False) -> Params:
    """The gradient of a scalar `loss`, zero where it does not depend on a parameter; with `differentiable`, and outside
    of `no_grad`, a function of `params` whose own gradient can be taken.

    Plain autograd takes a fifth less time on a CPU than `torch.func.grad`, which is what goes under vmap.
    """
    differentiable = differentiable and torch.is_grad_enabled()
    if torch._C._are_functorch_transforms_active():
        gradient: Params = grad(loss)(params)
        return gradient
    with torch.enable_grad():
        leaves = {name: _leaf(value, differentiable) for name, value in params.items()}
        value = loss(leaves)
        if not value.requires_grad:
            return zeros_like(params)
        found = torch.autograd.grad(value, list(leaves.values()), create_graph=differentiable, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _leaf(value: Tensor, differentiable: bool) -> Tensor:
    return value if differentiable and value.requires_grad else value.detach().requires_grad_()
