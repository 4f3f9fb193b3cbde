"""What a person at the hospital reads before approving a study."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.ledger import Ledger
from client.limits import cost_here, require_within
from client.site import load_site_config
from common.accounting import Event, PrivacyCost, queries_per_round
from common.errors import Refusal
from common.plan import StudyPlan
from common.plan_in_words import plan_in_words
from common.starting_point import network_of, travelling


@dataclass(frozen=True)
class Review:
    """A plan at this site."""

    plan: StudyPlan
    sentences: tuple[str, ...]
    cost: PrivacyCost | None  # of the study alone; None without privacy
    spent: float  # of the budget, before
    after: float  # when all rounds are done
    budget: float
    objection: Refusal | None  # the hospital's own limits

    def lines(self, lab: str) -> Iterator[str]:
        """As text."""
        yield f"Study {self.plan.study!r}, signed by {lab}; digest {self.plan.digest}"
        for sentence in self.sentences:
            yield f"  {sentence}"
        yield f"Budget of a patient here: epsilon {self.spent:.3f} of {self.budget:g} is spent;"
        yield f"  after all {self.plan.rounds} rounds of this study it would be {self.after:.3f}."
        if self.after > self.budget:
            yield "  The budget does not cover it: the site would refuse the last rounds."
        if self.objection:
            yield f"REFUSED: {self.objection.public_reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "study": self.plan.study,
            "digest": self.plan.digest,
            "sentences": self.sentences,
            "cost": asdict(self.cost) if self.cost else None,
            "epsilon_spent": self.spent,
            "epsilon_after": self.after,
            "epsilon_budget": self.budget,
            "objection": self.objection.public_reason if self.objection else None,
        }


def review(folder: Path, plan: StudyPlan) -> Review:
    """`plan` at the site in `folder`. Raises DataError or LedgerDamaged."""
    config = load_site_config(folder)
    objection: Refusal | None = None
    cost: PrivacyCost | None = None
    try:
        if config.name in plan.training_sites:
            cost = cost_here(plan, config.name)
        require_within(config, plan)
    except Refusal as refusal:
        objection = refusal
    ledger = Ledger.found(folder / config.state)
    charged = [charge.event for charge in ledger.charges()] if ledger else []
    coming = []
    if cost is not None and queries_per_round(plan):
        coming = [Event(cost.sample_rate, cost.noise_multiplier, queries_per_round(plan) * plan.rounds)]
    terms = ledger.terms if ledger else config.budget.terms()
    return Review(
        plan=plan,
        sentences=_sentences(plan, cost),
        cost=cost,
        spent=terms.spent(charged),
        after=terms.spent([*charged, *coming]),
        budget=config.budget.epsilon,
        objection=objection,
    )


def _sentences(plan: StudyPlan, cost: PrivacyCost | None) -> tuple[str, ...]:
    """The plan in words; none for one whose risk here cannot be told, which is refused anyway."""
    if cost is None and plan.privacy is not None:
        return ()
    shared = travelling(plan, network_of(plan, plan.training_sites[0]))
    numbers = sum(value.numel() for value in shared.values())
    return tuple(plan_in_words(plan, [cost] if cost else [], shared_numbers=numbers))
