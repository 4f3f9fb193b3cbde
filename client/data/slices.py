"""Which slices of a volume, or frames of a film, become images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import Problem, UsageError

RULES = "every:N, index:I,J (from 0), middle, mask, or mask:N (with N slices more on either side)"


@dataclass(frozen=True)
class SliceRule:
    """Either each `every`-th, those at `indices` (-1: the middle one), or those near where a mask marks something."""

    every: int = 1
    indices: tuple[int, ...] = ()
    margin: int | None = None  # slices around the marked ones; None: masks choose nothing

    def choose(self, count: int) -> tuple[int, ...]:
        """Of `count` slices; for masks all, for what they mark is not known yet. A single image is always taken."""
        if count == 1:
            return (0,)
        if self.indices:
            return tuple(dict.fromkeys(count // 2 if i < 0 else i for i in self.indices if i < count))
        return tuple(range((count % self.every or self.every) // 2, count, self.every))

    def marked(self, masks: Sequence[np.ndarray]) -> tuple[int, ...]:
        """The slices whose mask, or a neighbour's within the margin, marks something."""
        found = [index for index, mask in enumerate(masks) if mask.any()]
        margin = self.margin or 0
        near = {index + step for index in found for step in range(-margin, margin + 1)}
        return tuple(sorted(index for index in near if 0 <= index < len(masks)))


EVERY_SLICE = SliceRule()


def parse_rule(text: str) -> SliceRule:
    """Raises UsageError."""
    kind, _, argument = text.partition(":")
    try:
        if kind == "every" and int(argument) > 0:
            return SliceRule(every=int(argument))
        if kind == "index" and all(int(index) >= 0 for index in argument.split(",")):
            return SliceRule(indices=tuple(int(index) for index in argument.split(",")))
        if kind == "mask" and int(argument or 0) >= 0:
            return SliceRule(margin=int(argument or 0))
    except ValueError:
        pass
    if text == "middle":
        return SliceRule(indices=(-1,))
    raise UsageError(Problem("--rule", f"{text!r} is no rule", f"write {RULES}"))
