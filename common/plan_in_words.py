"""A study plan in sentences that a physician or an ethics board can follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.accounting import PrivacyCost, queries_per_round
from common.algorithms import ALGORITHMS
from common.metrics import score_name
from common.plan import AlgorithmSpec, OuterSpec, StudyPlan
from common.records import DISCLOSURES
from common.trials import shots_unit

_TASKS = {
    "classification": "classification",
    "multilabel": "telling several findings in one image",
    "segmentation": "segmentation, the outlining of what is looked for,",
    "anomaly": "anomaly detection",
}
_PARTS = {
    "all": "all parameters",
    "film": "the scales and shifts of the normalisation layers",
    "head": "the last layer",
    "mapping": "the mapping that sets the scales and shifts of the normalisation layers for each task",
}
_ASK_CLASS_SUMS = ("prototypes", "mapping")


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


def arm_titles(plan: StudyPlan) -> dict[str, str]:
    """A name for a reader of everything that the plan is compared with, by arm; no two are the same."""
    compared = plan.evaluation.compare
    titles = [algorithm_title(other.algorithm(plan.algorithm), other.outer or plan.outer) for other in compared]
    return {
        other.arm: title if other.label is None or titles.count(title) == 1 else f"{title} ({other.label})"
        for other, title in zip(compared, titles, strict=True)
    }


def algorithm_title(algorithm: AlgorithmSpec, outer: OuterSpec) -> str:
    """An algorithm's name for a reader, with the rule by which the server weighs the hospitals if that is its point."""
    if algorithm.name == "local_only":
        return "Warm start alone"
    title = ALGORITHMS[algorithm.name].title
    if outer.weights != "score":
        return title
    return "Model weighting" if algorithm.name == "fedavg" else f"{title}, weighted by score"


def _learned(plan: StudyPlan, shared_numbers: int) -> str:
    size, channels, start = plan.task.image_size, plan.task.channels, plan.model.warm_start
    if queries_per_round(plan) == 0:
        return f"What is learned: nothing in common; each hospital starts from {start or 'random values'} by itself."
    healthy = "healthy " if plan.task.kind == "anomaly" else ""
    rates = " with their learning rates" if plan.algorithm.name == "metasgd" else ""
    article = "an" if plan.model.name == "autoencoder" else "a"
    modalities = f" The network is told the modality of each image: {', '.join(plan.task.modalities)}."
    return (
        f"What is learned: {algorithm_title(plan.algorithm, plan.outer)} trains a start for {_TASKS[plan.task.kind]}"
        f" from {healthy}images of {size} x {size} pixels and {channels} channel{_s(channels)}:"
        f" {_PARTS[plan.model.trainable]}{rates} of {article} {plan.model.name} network"
        f" ({shared_numbers:,} numbers), beginning from {f'the warm start {start}' if start else 'random values'}."
        + (modalities if plan.task.modalities else "")
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
    queries, images, views = queries_per_round(plan), plan.sampling.max_images_per_patient, plan.sampling.views
    if queries == 0:
        return f"How: in none of the {plan.rounds} rounds is a patient's image looked at."
    return (
        f"How: in each of {plan.rounds} rounds a hospital asks its images {queries} question{_s(queries)}; each patient"
        f" joins a question with probability {plan.sampling.sample_rate:g}, with at most {images} image{_s(images)}"
        f"{f', each in {views} random views' if views > 1 else ''}.{_unusual_questions(plan)}"
    )


def _unusual_questions(plan: StudyPlan) -> str:
    """What is asked beside the mean of a gradient over patients."""
    if plan.algorithm.name in _ASK_CLASS_SUMS:
        return " The first question adds up by label what the network makes of the images; these sums stay."
    if ALGORITHMS[plan.algorithm.name].asks == "episodes":
        steps, episodes = plan.algorithm.meta_steps, plan.algorithm.episodes
        return (
            f" {f'{steps} of the questions are' if steps > 1 else 'One question is'} put to {episodes} episode"
            f"{_s(episodes)}: a patient who joins is in one of them, drawn at random; an episode adapts to some of its"
            " patients and is judged on the others."
        )
    return ""


def _leaves(plan: StudyPlan, shared_numbers: int) -> str:
    if queries_per_round(plan) == 0:
        return f"What leaves a hospital: nothing that depends on a patient. {_stays(plan)}"
    noisy = "noisy " if plan.privacy else ""
    scored = f", and one {noisy}{score_name(plan.task.kind)}" if plan.monitored else ""
    weighed = ", which is the update's weight" if plan.outer.weights == "score" else ""
    update = f"one {noisy}update of {shared_numbers:,} numbers{scored}{weighed}"
    if plan.outer.secure_sum:
        update += ", masked: the lab can read only the sum over all hospitals of a round, and no risk is lowered for it"
    beside = [disclosure.words for disclosure in DISCLOSURES.values() if not disclosure.charged]
    independent = f"Beside it go, whatever the data: {', '.join(beside[:-1])} and {beside[-1]}."
    return f"What leaves a hospital: in each round {update}. {independent} {_stays(plan)}"


def _stays(plan: StudyPlan) -> str:
    kept = ["Images", "masks" if plan.task.kind == "segmentation" else "labels", "counts"]
    kept += ["the last layer"] if plan.model.head == "site" else []
    kept += ["the sums by label"] if plan.algorithm.name in _ASK_CLASS_SUMS else []
    kept += ["the hospital's own network"] if plan.algorithm.name == "mrmtl" else []
    return f"{', '.join(kept[:-1])} and {kept[-1]} stay."


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
    unit = shots_unit(plan.task.kind, count=evaluation.shots[-1])
    against = ", ".join(["a random start", *arm_titles(plan).values()])
    apart = f" Measured apart as well: {', '.join(evaluation.subgroups)}." if evaluation.subgroups else ""
    fused = (
        " A patient gets one answer, fused over all of the patient's images." if evaluation.fuse == "patient" else ""
    )
    return (
        f"What a simulation measures: adaptation to {shots} {unit},"
        f" {evaluation.splits * evaluation.draws} draws, against {against}.{apart}{fused} Each of these federations has"
        " a budget of its own: with real patients each would be charged as well."
    )


def _guesses_per_error(cost: PrivacyCost) -> float:
    """What the best balanced membership guess reaches against (epsilon, delta) (Kairouz, Oh, Viswanath 2015)."""
    return (1 + math.exp(min(cost.epsilon, 700.0))) / (1 - cost.delta)


def _up(bound: float, digits: int) -> str:
    """An upper bound stays one when it is rounded."""
    return f"{math.ceil(bound * 10**digits) / 10**digits:,.{digits}f}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
