"""Adaptation, the inner loop:  phi_0 = theta;  phi_{k+1} = phi_k - a grad L(phi_k; support),  k = 0 .. K-1.

Plain full-batch gradient descent, parameters in, parameters out; every algorithm's way to a new task goes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.episodes import Batch
from common.learner import Learner, gradient_at
from common.models import HEAD, part_names
from common.params import Params, detach, select
from common.plan import AdaptationSpec


def adapt(
    learner: Learner,
    params: Params,
    support: Batch,
    spec: AdaptationSpec,
    *,
    moving: Collection[str] | None = None,
    rates: Params | None = None,
    pull: float = 0.0,
    second_order: bool = False,
) -> Params:
    """`params` after `spec.steps` steps on the support set; only `spec.trainable` moves, or the names in `moving`.

    `rates` replaces the plan's rates where it has the name (Meta-SGD). `pull` draws back to where the loop began
    (MR-MTL); not the head, whose zero start means nothing. With `second_order` the result is a differentiable function
    of `params`, its own gradients included; without, it is detached, and a gradient taken there is the first-order
    meta-gradient. Where the learner is sparing, a step that depends on nothing else that is differentiated is taken a
    second time on the way back.
    """
    names = part_names(learner.network, spec.trainable) if moving is None else moving
    loss = _loss_of(learner, params, support, names, second_order)
    start = select(params, names)

    def step(phi: Params) -> Params:
        gradient = gradient_at(phi, loss, differentiable=second_order)
        if pull:
            gradient |= {name: gradient[name] + pull * (phi[name] - start[name]) for name in phi if not _is_head(name)}
        return {name: value - _step_size(name, spec, rates) * gradient[name] for name, value in phi.items()}

    others = [value for name, value in params.items() if name not in start] + list((rates or {}).values())
    again = learner.sparing and second_order and not pull and not any(value.requires_grad for value in others)
    phi = start if second_order else detach(start)
    for number in range(spec.steps):
        last = number == spec.steps - 1  # the way back begins with it
        phi = _again(step, phi) if again and not last else step(phi)
        if not second_order:
            phi = {name: value.detach() for name, value in phi.items()}
    return params | phi


def _again(step: Callable[[Params], Params], phi: Params) -> Params:
    moved = _Again.apply(step, tuple(phi), *phi.values())  # type: ignore[no-untyped-call]
    return dict(zip(phi, moved, strict=True))


class _Again(torch.autograd.Function):
    """A step that keeps only where it began, and is taken again when its derivative is asked for: the graphs of K steps
    are never in memory together."""

    @staticmethod
    def forward(ctx: Any, step: Callable[[Params], Params], names: tuple[str, ...], *values: Tensor) -> Any:
        ctx.step, ctx.names = step, names
        ctx.save_for_backward(*values)
        return tuple(step(dict(zip(names, values, strict=True))).values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        begun = {
            name: value.detach().requires_grad_() for name, value in zip(ctx.names, ctx.saved_tensors, strict=True)
        }
        with torch.enable_grad():
            moved = ctx.step(begun)
        pulled_back = torch.autograd.grad(list(moved.values()), list(begun.values()), gradients, materialize_grads=True)
        return None, None, *pulled_back


def _loss_of(
    learner: Learner, params: Params, support: Batch, names: Collection[str], second_order: bool
) -> Callable[[Params], Tensor]:
    """The support loss of the parameters that move. Where the body does not move, it runs once."""
    if not all(map(_is_head, names)):
        return lambda phi: learner.loss(learner.outputs(params | phi, support.inputs), support)
    with torch.set_grad_enabled(second_order):
        features = learner.features(params, support.inputs)
    return lambda phi: learner.loss(learner.head(params | phi, features), support)


def rate(name: str, spec: AdaptationSpec) -> float:
    """The plan's inner rate for the parameter of this name."""
    return spec.head_lr if spec.head_lr is not None and _is_head(name) else spec.lr


def _step_size(name: str, spec: AdaptationSpec, rates: Params | None) -> Tensor | float:
    return rates[name] if rates is not None and name in rates else rate(name, spec)


def _is_head(name: str) -> bool:
    return name.startswith(HEAD)
