"""A study plan in sentences that a physician or an ethics board can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.accounting import PrivacyCost, queries_per_round
from common.algorithms import ALGORITHMS
from common.plan import StudyPlan

_PARTS = {
    "all": "all parameters",
    "film": "the scales and shifts of the normalisation layers",
    "head": "the last layer",
}


def plan_in_words(plan: StudyPlan, costs: Sequence[PrivacyCost], *, shared_numbers: int) -> list[str]:
    """One sentence or two on each question: what is learned, from whom, what leaves, what a patient risks."""
    return [
        _learned(plan, shared_numbers),
        _from_whom(plan),
        _one_round(plan),
        _leaves(plan, shared_numbers),
        _risk(plan, costs),
        _evaluated(plan),
    ]


def _learned(plan: StudyPlan, shared_numbers: int) -> str:
    size, channels, start = plan.task.image_size, plan.task.channels, plan.model.warm_start
    if queries_per_round(plan) == 0:
        return f"What is learned: nothing in common; each hospital starts from {start or 'random values'} by itself."
    return (
        f"What is learned: {ALGORITHMS[plan.algorithm.name].title} trains a start for {plan.task.kind} from images of"
        f" {size} x {size} pixels and {channels} channel{_s(channels)}: {_PARTS[plan.model.trainable]}"
        f" of a {plan.model.name} network ({shared_numbers:,} numbers), beginning from"
        f" {f'the warm start {start}' if start else 'random values'}."
    )


def _from_whom(plan: StudyPlan) -> str:
    training, held_out = plan.training_sites, plan.held_out_sites
    sentence = (
        f"From whom: {len(training)} hospital{_s(len(training))} ({', '.join(training)}); a round counts if"
        f" {plan.quorum} of them answer within {plan.round_timeout_s:g} s."
    )
    if held_out:
        sentence += f" {', '.join(held_out)} never train{'s' if len(held_out) == 1 else ''}, and only adapt the result."
    return sentence


def _one_round(plan: StudyPlan) -> str:
    queries, images = queries_per_round(plan), plan.sampling.max_images_per_patient
    if queries == 0:
        return f"How: in none of the {plan.rounds} rounds is a patient's image looked at."
    return (
        f"How: in each of {plan.rounds} rounds a hospital asks its images {queries} question{_s(queries)}; each patient"
        f" joins a question with probability {plan.sampling.sample_rate:g}, with at most {images} image{_s(images)}."
    )


def _leaves(plan: StudyPlan, shared_numbers: int) -> str:
    stays = "Images, labels, counts" + (" and the last layer" if plan.model.head == "site" else "") + " stay."
    if queries_per_round(plan) == 0:
        return f"What leaves a hospital: nothing that depends on a patient. {stays}"
    noisy = "noisy " if plan.privacy else ""
    monitored = ", and one noisy accuracy" if plan.privacy and plan.privacy.monitor else ""
    return f"What leaves a hospital: in each round one {noisy}update of {shared_numbers:,} numbers{monitored}. {stays}"


def _risk(plan: StudyPlan, costs: Sequence[PrivacyCost]) -> str:
    if plan.privacy is None:
        return "What a patient risks: WITHOUT PRIVACY. Updates may give images away; only a simulation runs this plan."
    worst = max(costs, key=lambda cost: cost.epsilon)
    errors = _guesses_per_error(worst)
    if worst.epsilon == 0:
        return "What a patient risks: nothing, since nothing that depends on a patient leaves."
    return (
        f"What a patient risks: epsilon is at most {_up(worst.epsilon, 2)} for all that a hospital sends, all images of"
        " a patient together. Who sees all of it, knows every other patient, and guesses whether this one took part,"
        f" errs in at least 1 of {_up(errors, 0 if errors > 100 else 1)} guesses; without it, in 1 of 2."
    )


def _evaluated(plan: StudyPlan) -> str:
    evaluation = plan.evaluation
    shots = ", ".join(str(k) for k in evaluation.shots)
    others = [ALGORITHMS[other.name].title for other in evaluation.compare]
    against = ", ".join(["a random start", *others])
    return (
        f"What a simulation measures: adaptation to {shots} image{_s(evaluation.shots[-1])} per class,"
        f" {evaluation.splits * evaluation.draws} draws, against {against}. Each of these federations has a budget of"
        " its own: with real patients each would be charged as well."
    )


def _guesses_per_error(cost: PrivacyCost) -> float:
    """What the best balanced membership guess reaches against (epsilon, delta) (Kairouz, Oh, Viswanath 2015)."""
    return (1 + math.exp(min(cost.epsilon, 700.0))) / (1 - cost.delta)


def _up(bound: float, digits: int) -> str:
    """An upper bound stays one when it is rounded."""
    return f"{math.ceil(bound * 10**digits) / 10**digits:,.{digits}f}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
