"""Model mapping, M(T_i, K_i): one network learns the parameters of another.

    T_i    = encoder(class prototypes of task i)                    the task vector
    h      = tanh(W T_i + w)
    phi_i  = K * (1 + U h) + V h                                    the backbone's scales and shifts, K the shared ones

The encoder is a set network over classes (Zaheer 2017, arXiv:1703.06114), so neither the order nor the number of labels
matters; it is pre-trained on public images by supervised contrastive learning and then fixed. U and V start at zero:
the mapping begins as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from common.params import Params, within

MAPPING, ENCODER = "mapping.", "encoder."  # prefixes of parameter names
TASK_NUMBERS = 16  # of a task vector
_RANK = 4  # of the modulations
_HIDDEN = 64


class TaskEncoder(nn.Module):
    """Class prototypes (ways, F) to a task vector (TASK_NUMBERS,) of norm 1."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.of_class = nn.Sequential(nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU())
        self.of_task = nn.Linear(_HIDDEN, TASK_NUMBERS)

    def forward(self, prototypes: Tensor) -> Tensor:
        task: Tensor = self.of_task(self.of_class(prototypes).mean(dim=-2))
        return nn.functional.normalize(task, dim=-1)


class Modulation(nn.Module):
    """A task vector and the shared scales and shifts K (n,) to this task's (n,)."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        count = sum(sizes.values())
        self.code = nn.Linear(TASK_NUMBERS, _RANK)
        self.factor = nn.Linear(_RANK, count, bias=False)
        self.shift = nn.Linear(_RANK, count, bias=False)
        nn.init.zeros_(self.factor.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, task: Tensor, shared: Tensor) -> Tensor:
        code = torch.tanh(self.code(task))
        modulated: Tensor = shared * (1 + self.factor(code)) + self.shift(code)
        return modulated


def add_mapping(network: nn.Module, features: int, sizes: dict[str, int]) -> None:
    """Give `network` its task encoder and the mapping to the parameters named in `sizes` (name -> numbers)."""
    network.add_module(ENCODER.rstrip("."), TaskEncoder(features))
    network.add_module(MAPPING.rstrip("."), Modulation(sizes))


def task_vector(network: nn.Module, params: Params, prototypes: Tensor) -> Tensor:
    """(TASK_NUMBERS,) of prototypes (ways, F)."""
    encoder = network.get_submodule(ENCODER.rstrip("."))
    vector: Tensor = functional_call(encoder, within(params, ENCODER), (prototypes,))
    return vector


def modulate(network: nn.Module, params: Params, task: Tensor) -> Params:
    """The scales and shifts that the mapping in `params` gives to a task; differentiable in the mapping."""
    mapping = network.get_submodule(MAPPING.rstrip("."))
    if not isinstance(mapping, Modulation):
        raise TypeError(f"the network's mapping is a {type(mapping).__name__}")
    sizes = mapping.sizes
    shared = torch.cat([params[name].flatten() for name in sizes])
    values = functional_call(mapping, within(params, MAPPING), (task, shared)).split(list(sizes.values()))
    return {name: value.reshape(params[name].shape) for name, value in zip(sizes, values, strict=True)}
