"""Adaptation, the inner loop:  phi_0 = theta;  phi_{k+1} = phi_k - a grad L(phi_k; support),  k = 0 .. K-1.

Plain full-batch gradient descent, parameters in, parameters out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear

from common.models import HEAD, part_names
from common.params import Params
from common.plan import AdaptationSpec

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, labels) -> scalar
_BODY = "body."


def adapt(
    network: nn.Module,
    params: Params,
    images: Tensor,
    labels: Tensor,
    spec: AdaptationSpec,
    *,
    loss: Loss = cross_entropy,
    create_graph: bool = False,
) -> Params:
    """`params` after `spec.steps` steps on the support set; only `spec.trainable` moves.

    `images` (B, C, H, W) normalised, `labels` (B,) int64. With `create_graph` the result is a differentiable
    function of `params` (second-order MAML); without it the result is detached, and a gradient taken there is
    the first-order meta-gradient. `network` gives the architecture alone: its own values are neither read nor
    changed.
    """
    if spec.trainable == "head":
        return _adapt_head(network, params, images, labels, spec, loss, create_graph)

    def objective(moving: Params) -> Tensor:
        return loss(functional_call(network, params | moving, (images,)), labels)

    return params | _descend(objective, _part(network, params, spec), spec, create_graph)


def _adapt_head(
    network: nn.Module, params: Params, images: Tensor, labels: Tensor, spec: AdaptationSpec, loss: Loss, graph: bool
) -> Params:
    """The body does not move, so it runs once."""
    body = {name.removeprefix(_BODY): value for name, value in params.items() if name.startswith(_BODY)}
    with torch.set_grad_enabled(graph):
        features = functional_call(network.get_submodule("body"), body, (images,))

    def objective(head: Params) -> Tensor:
        return loss(linear(features, head["head.weight"], head["head.bias"]), labels)

    return params | _descend(objective, _part(network, params, spec), spec, graph)


def _part(network: nn.Module, params: Params, spec: AdaptationSpec) -> Params:
    return {name: params[name] for name in part_names(network, spec.trainable)}


def _descend(objective: Callable[[Params], Tensor], phi: Params, spec: AdaptationSpec, graph: bool) -> Params:
    """K steps from `phi`; the head moves by `head_lr` where the plan gives one."""
    head_lr = spec.lr if spec.head_lr is None else spec.head_lr
    for _ in range(spec.steps):
        if not graph:
            phi = {name: value.detach().requires_grad_() for name, value in phi.items()}
        gradients = torch.autograd.grad(objective(phi), list(phi.values()), create_graph=graph)
        phi = {
            name: value - (head_lr if name.startswith(HEAD) else spec.lr) * gradient
            for (name, value), gradient in zip(phi.items(), gradients, strict=True)
        }
    return phi if graph else {name: value.detach() for name, value in phi.items()}
