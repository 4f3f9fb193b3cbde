"""`study check`: what a plan costs every patient, and whether it can be met at all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.accounting import PrivacyCost, plan_cost
from common.algorithms import ALGORITHMS
from common.errors import PlanError, Problem
from common.models import parameters, part_names
from common.params import select
from common.plan import StudyPlan, load_plan
from common.plan_in_words import plan_in_words
from common.starting_point import network_of, travelling
from common.yaml_lines import YamlDocument, read_yaml

_EMPTY_PROMISE = 10.0  # epsilon


@dataclass(frozen=True)
class SiteCost:
    """One row of the table."""

    privacy: PrivacyCost
    noise_to_signal: float  # in one gradient query: expected norm of the noise over the largest norm of the mean, C


@dataclass(frozen=True)
class StudyCheck:
    """A plan that can be met."""

    plan: StudyPlan
    sentences: tuple[str, ...]
    costs: tuple[SiteCost, ...]  # of the training sites; empty without privacy
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite noise (nothing is asked) as null."""
        return {
            "study": self.plan.study,
            "digest": self.plan.digest,
            "privacy": "none" if self.plan.privacy is None else self.plan.privacy.model_dump(mode="json"),
            "sentences": self.sentences,
            "warnings": self.warnings,
            "sites": [_finite(asdict(row.privacy) | {"noise_to_signal": row.noise_to_signal}) for row in self.costs],
        }


def check_study(path: Path) -> StudyCheck:
    """Load the plan and count what it costs.

    Raises PlanError, with every reason and its file and line, for a plan that is not valid or cannot be met.
    """
    plan, document = load_plan(path), read_yaml(path)
    costs, problems = _costs(plan, document)
    problems += [*_too_small(plan, document), *_careless_delta(plan, document), *_missing_start(plan, document)]
    if problems:
        raise PlanError(problems)
    rows = tuple(SiteCost(cost, _noise_to_signal(plan, cost)) for cost in costs)
    return StudyCheck(
        plan=plan,
        sentences=tuple(plan_in_words(plan, costs, shared_numbers=_shared_numbers(plan))),
        costs=rows,
        warnings=tuple(_warnings(plan, rows)),
    )


def _costs(plan: StudyPlan, document: YamlDocument) -> tuple[list[PrivacyCost], list[Problem]]:
    costs, problems = [], []
    blamed = "epsilon" if plan.privacy is None or plan.privacy.noise_multiplier is None else "noise_multiplier"
    for site in plan.training_sites:
        try:
            cost = plan_cost(plan, site)
        except PlanError as error:
            where = document.where(("privacy", blamed))
            problems += [Problem(where, f"{p.where}: {p.what}", p.remedy) for p in error.problems]
            continue
        if cost is not None:
            costs.append(cost)
    return costs, problems


def _too_small(plan: StudyPlan, document: YamlDocument) -> Iterator[Problem]:
    """Sites with too few patients for what the plan wants of them."""
    for name, site in plan.sites.items():
        where = document.where(("sites", name, "patients"))
        expected = plan.sampling.sample_rate * site.patients
        if site.role == "train" and expected < 1:
            what = f"site {name}: {expected:g} patients join a query on average (sample_rate * patients)"
            yield Problem(where, what, "raise sampling.sample_rate or enrol more: at least one")
        least = max(2 * len(plan.labels_of(name)), *plan.evaluation.shots)
        if (site.role == "held_out" or name in plan.evaluation.leave_one_out) and site.patients < least:
            what = f"site {name}: {site.patients} patients are too few to evaluate {max(plan.evaluation.shots)} shots"
            yield Problem(where, what, f"at least {least}: one per shot, and two per label")


def _careless_delta(plan: StudyPlan, document: YamlDocument) -> Iterator[Problem]:
    """A delta that allows to publish one patient in N."""
    delta = plan.privacy.delta if plan.privacy else None
    largest = max(plan.sites[name].patients for name in plan.training_sites)
    if delta is not None and delta >= 1 / largest:
        what = f"privacy.delta {delta:g} is not below 1/{largest}: it allows to publish one patient of the largest site"
        yield Problem(document.where(("privacy", "delta")), what, "leave it out (1/(10 N) at each site), or give less")


def _missing_start(plan: StudyPlan, document: YamlDocument) -> Iterator[Problem]:
    start = plan.model.warm_start
    if start is not None and not (document.path.parent / start).is_file():
        what = f"model.warm_start: there is no file {document.path.parent / start}"
        yield Problem(document.where(("model", "warm_start")), what, "the path is relative to the plan's folder")


def _warnings(plan: StudyPlan, rows: tuple[SiteCost, ...]) -> Iterator[str]:
    if plan.privacy is None:
        yield "WITHOUT PRIVACY: for simulation only; every real site refuses this plan, and every output is marked."
    if any(row.privacy.epsilon > _EMPTY_PROMISE for row in rows):
        yield f"An epsilon above {_EMPTY_PROMISE:g} promises a patient next to nothing."
    remaining = _noise_in_the_mean(rows)
    if remaining > 1:
        yield (
            "The noise is too strong to learn anything: the mean of all gradients of the study still holds"
            f" {remaining:.1f} times as much noise as a signal can have. Enrol more patients, train a smaller part, or"
            " ask for a larger epsilon."
        )
    for name in plan.held_out_sites:
        wanted, there = max(plan.evaluation.shots) * len(plan.labels_of(name)), plan.sites[name].patients // 2
        if there < wanted:
            yield (
                f"Site {name}: half of its patients are {there}; {max(plan.evaluation.shots)} shots per class want"
                f" {wanted} images, so patients will give several, or some draws will have fewer."
            )


def _noise_in_the_mean(rows: tuple[SiteCost, ...]) -> float:
    """Noise over largest signal in the mean of all sites' gradient queries: what averaging can still mend."""
    noises = [row.noise_to_signal for row in rows if math.isfinite(row.noise_to_signal)]
    if not noises:
        return 0.0
    queries = sum(row.privacy.queries for row in rows)
    return math.sqrt(sum(noise**2 for noise in noises) / len(noises) / queries)


def _noise_to_signal(plan: StudyPlan, cost: PrivacyCost) -> float:
    """z sqrt(d) / B, d numbers in a gradient: the noise's norm is z C sqrt(d) / B, the mean's at most C.

    Over m episodes the noise's norm is 2 z C sqrt(d) / m.
    """
    network = network_of(plan, cost.site)
    asked = "film" if plan.model.trainable == "mapping" else plan.model.trainable
    values = select(parameters(network), part_names(network, asked))
    noise = cost.noise_multiplier * math.sqrt(sum(value.numel() for value in values.values()))
    if ALGORITHMS[plan.algorithm.name].asks == "episodes":
        return 2 * noise / plan.algorithm.episodes
    return noise / cost.expected_batch


def _shared_numbers(plan: StudyPlan) -> int:
    shared = travelling(plan, network_of(plan, plan.training_sites[0]))
    return sum(value.numel() for value in shared.values())


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value == math.inf else value for key, value in row.items()}
