"""A network and its task as functions of parameters: what inner loops and meta-losses are written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.func import functional_call

from common.models import BODY, HEAD, Network
from common.params import Params, within
from common.tasks import Task

if TYPE_CHECKING:
    from common.episodes import Batch


@dataclass(frozen=True)
class Learner:
    """The network gives the architecture alone: its own values are neither read nor changed."""

    network: Network
    task: Task

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
