"""What the hospital allows at all: its own limits, before any approval."""

from __future__ import annotations

import datetime

from client.site import Limits, SiteConfig
from common.accounting import PrivacyCost, delta_of, plan_cost
from common.errors import OutsideLimits, PlanError, SiteUnfit
from common.plan import StudyPlan


def require_within(config: SiteConfig, plan: StudyPlan) -> None:
    """Raise OutsideLimits unless the hospital's limits allow `plan`, SiteUnfit if it is no site of it.

    Reasons speak of the plan and the limits alone, never of the data: they reach the lab.
    """
    if config.name not in plan.training_sites:
        raise SiteUnfit(f"the plan has no training site {config.name!r}")
    limits, declared = config.limits, plan.sites[config.name].patients
    if limits.tasks is not None and plan.task.kind not in limits.tasks:
        raise OutsideLimits(f"the hospital does not allow the task {plan.task.kind}")
    if limits.algorithms is not None and plan.algorithm.name not in limits.algorithms:
        raise OutsideLimits(f"the hospital does not allow the algorithm {plan.algorithm.name}")
    if plan.privacy is not None and delta_of(plan.privacy, declared) >= 1 / declared:
        raise OutsideLimits(f"the plan's delta would allow it to publish one of {declared} patients outright")
    if declared < limits.min_patients:
        raise OutsideLimits(f"the plan declares {declared} patients here; the hospital wants {limits.min_patients}")
    cost = cost_here(plan, config.name)
    if cost is not None and limits.epsilon_per_study is not None and cost.epsilon > limits.epsilon_per_study:
        raise OutsideLimits(
            f"the plan costs epsilon {cost.epsilon:.2f} here; the hospital allows {limits.epsilon_per_study:g} a study"
        )


def require_open(limits: Limits, now: datetime.time | None = None) -> None:
    """Raise OutsideLimits outside the hospital's hours (its own clock)."""
    if limits.hours is None:
        return
    start, end = limits.opening
    at = now or datetime.datetime.now().time()
    inside = start <= at < end if start < end else (at >= start or at < end)
    if not inside:
        raise OutsideLimits(f"the hospital computes from {limits.hours} only")


def cost_here(plan: StudyPlan, site: str) -> PrivacyCost | None:
    """What the plan costs a patient of the site; None without privacy. Raises OutsideLimits if it cannot be met."""
    try:
        return plan_cost(plan, site)
    except PlanError:
        raise OutsideLimits("the plan's privacy cannot be met") from None
