"""What each kind of task optimises and counts, per image, so that it can be averaged inside a patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """Both functions map (logits (B, ways), labels (B,)) to one float per image, (B,)."""

    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]  # in [0, 1]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float()


TASKS: dict[str, Task] = {"classification": Task(loss=_cross_entropy, score=_correct)}
