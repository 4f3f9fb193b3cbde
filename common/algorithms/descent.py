"""The inner step that every algorithm here shares."""

from __future__ import annotations

from common.params import Params
from common.plan import AlgorithmSpec


def step(params: Params, gradient: Params, spec: AlgorithmSpec) -> Params:
    """params - inner_lr * gradient; the head's entries move by `head_lr` where the plan gives one."""
    head_lr = spec.inner_lr if spec.head_lr is None else spec.head_lr
    return {
        name: value - (head_lr if name.startswith("head.") else spec.inner_lr) * gradient[name]
        for name, value in params.items()
    }
