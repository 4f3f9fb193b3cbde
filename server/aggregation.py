"""The weighted mean of the sites' updates, and what an update must be to enter it.

    u = sum_i w_i u_i / sum_i w_i    over the sites i whose reply was accepted

The weights are constants of the plan: a site's own count of examples would be a release that nobody charged. In a
secure sum the u_i come masked, and only their sum can be read (`common.secure_sum`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from common.accounting import plan_cost
from common.params import Arrays, Params
from common.plan import StudyPlan
from common.records import SiteReply
from common.secure_sum import FixedPoint

Template = Mapping[str, Sequence[int]]  # name -> shape

_LEAST_SCORE = 0.01


def site_weights(plan: StudyPlan, sites: Iterable[str]) -> dict[str, float]:
    """The sites' weights by the plan's rule, summing to 1.

    equal: 1; patients: declared N; precision: B^2/z^2 with B = q N, the inverse variance of the noise in G; score: 1,
    to be multiplied by the score that the site releases with its update (`weight_of`).
    """
    raw = {name: _raw_weight(plan, name) for name in sites}
    total = math.fsum(raw.values())
    return {name: value / total for name, value in raw.items()}


def _raw_weight(plan: StudyPlan, site: str) -> float:
    if plan.outer.weights in ("equal", "score"):
        return 1.0
    if plan.outer.weights == "patients":
        return float(plan.sites[site].patients)
    cost = plan_cost(plan, site)
    if cost is None or math.isinf(cost.noise_multiplier):  # no noise, at no site
        return 1.0
    return (cost.expected_batch / cost.noise_multiplier) ** 2


def weight_of(plan: StudyPlan, reply: SiteReply, weight: float) -> float:
    """Model weighting: a site whose adapted parameters answer its own query patients better counts more.

    The score is a private statistic in [0, 1] that the site was charged for; noise may have made it 0.
    """
    return weight * max(reply.accuracy, _LEAST_SCORE) if plan.outer.weights == "score" else weight


class RunningMean:
    """The mean of the updates seen so far; holds one sum in float64, however many sites there are.

    Float64, so that the order of arrival shows in the last bit of a float32 at most.
    """

    def __init__(self, template: Template) -> None:
        self._sum = {name: torch.zeros(tuple(shape), dtype=torch.float64) for name, shape in template.items()}
        self._weight = 0.0

    def add(self, update: Arrays, *, weight: float) -> None:
        """Take in one accepted update."""
        for name, total in self._sum.items():
            total.add_(torch.from_numpy(update[name]), alpha=weight)
        self._weight += weight

    def mean(self) -> Params:
        """float32 tensors. Raises ValueError if no update was taken in."""
        if not self._weight:
            raise ValueError("the mean of no update")
        return {name: (total / self._weight).float() for name, total in self._sum.items()}


class MaskedMean:
    """The same of masked updates, which are numbers only once every site of the round's roster has been added."""

    def __init__(self, template: Template, encoding: FixedPoint) -> None:
        self._sum = {name: np.zeros(tuple(shape), dtype=np.uint32) for name, shape in template.items()}
        self._encoding, self._sites = encoding, 0

    def add(self, update: Arrays, *, weight: float) -> None:
        """Take in one accepted update; all weights are equal."""
        for name, total in self._sum.items():
            total += update[name]  # modulo 2^32
        self._sites += 1

    def mean(self) -> Params:
        """float32 tensors. Raises ValueError if no update was taken in."""
        if not self._sites:
            raise ValueError("the mean of no update")
        decoded = {name: self._encoding.decode(total) / self._sites for name, total in self._sum.items()}
        return {name: torch.from_numpy(value).float() for name, value in decoded.items()}


def reason_to_reject(
    reply: SiteReply,
    *,
    site: str,
    plan_digest: str,
    round: int,
    template: Template,
    scored: bool = False,
    masked_for: str = "",
) -> str | None:
    """Why this reply may not enter the mean, without any of its values; None if it may.

    `scored`: its weight is its score, which must be there. `masked_for`: digest of the secure sum's roster.
    """
    if reply.site != site:
        return "the reply names another site"
    if reply.plan_digest != plan_digest:
        return "the reply belongs to another plan"
    if reply.round != round:
        return f"the reply is for round {reply.round}"
    if not (_is_amount(reply.epsilon) and _is_amount(reply.seconds)) or math.isinf(reply.accuracy):
        return "epsilon, seconds or accuracy is not a finite number"
    if scored and not 0 <= reply.accuracy <= 1:
        return "the reply has no score between 0 and 1, which would be its weight"
    if reply.masked_for != masked_for:
        return "the update does not carry the masks of this round's sites"
    if reply.update.keys() != template.keys():
        names = sorted(reply.update.keys() ^ template.keys())
        return f"the update's names differ from the shared parameters' in {len(names)}, as {names[0][:80]!r}"
    for name, value in reply.update.items():
        if value.shape != tuple(template[name]):
            return f"{name} has shape {value.shape}, not {tuple(template[name])}"
        if value.dtype != (np.uint32 if masked_for else np.float32):
            return f"{name} is {value.dtype}"
        if not masked_for and not np.isfinite(value).all():
            return f"{name} is not finite"
    return None


def _is_amount(value: float) -> bool:
    return math.isfinite(value) and value >= 0
