"""What hospitals and lab agree on for a sum of which the lab sees no part: fixed point, and who takes part.

    y_i = encode(u_i) + sum_{j > i} m_ij - sum_{j < i} m_ji   (mod 2^32);   sum_i y_i = sum_i encode(u_i)

m_ij is a pseudo-random stream that only i and j can make (`client.secure_sum`; Bonawitz 2017). Every pair masks and
no secret is shared for those who drop out: a site that does ends the round, and the next one has new masks. No privacy
is counted for it: each site's update carries its full noise as it would without.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.plan import StudyPlan

LARGEST_ROSTER = 100_000  # characters


@dataclass(frozen=True)
class FixedPoint:
    """Numbers within +-`range` as integers modulo 2^32 of which `sites` together cannot overflow."""

    range: float
    sites: int

    @property
    def step(self) -> float:
        """The power of two by which neighbouring integers differ: range / step <= (2^31 - 1) / sites."""
        return 2.0 ** math.ceil(math.log2(self.range / ((2**31 - 1) // self.sites)))

    def encode(self, values: np.ndarray) -> np.ndarray:
        """uint32: two's complement of the nearest integers; what is outside the range is cut to it.

        Raises ValueError if a number is not finite.
        """
        if not np.isfinite(values).all():
            raise ValueError("an update that is not finite cannot be summed")
        cut = np.clip(values.astype(np.float64), -self.range, self.range)
        return np.rint(cut / self.step).astype(np.int64).astype(np.uint32)

    def decode(self, total: np.ndarray) -> np.ndarray:
        """float64: the sum that the unmasked total stands for."""
        return total.view(np.int32).astype(np.float64) * self.step


def fixed_point(plan: StudyPlan) -> FixedPoint | None:
    """The plan's encoding, from its public constants alone; None if its updates are not masked."""
    secure = plan.outer.secure_sum
    return None if secure is None else FixedPoint(secure.range, len(plan.training_sites))


def roster_of(keys: Mapping[str, str]) -> str:
    """Who takes part in a round, and their signed masking keys, as one text for all of them."""
    return json.dumps(dict(sorted(keys.items())), separators=(",", ":"))


def roster_digest(roster: str) -> str:
    """SHA-256, hex; a masked update says by it whose masks it carries. Empty for no roster."""
    return hashlib.sha256(roster.encode(errors="backslashreplace")).hexdigest() if roster else ""
