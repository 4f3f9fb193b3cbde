"""The plan in words says of every kind of task and every algorithm what is so."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from common.accounting import queries_per_round
from common.algorithms import ALGORITHMS, ClassSums
from common.episodes import MetaLoss
from common.learner import Learner
from common.metrics import score_name
from common.models import head_names, parameters
from common.params import Params, select, zeros_like
from common.plan import StudyPlan, TaskKind
from common.plan_in_words import arm_titles, plan_in_words
from common.starting_point import network_of, starting, travelling

NETWORKS = {"segmentation": {"name": "unet"}, "anomaly": {"name": "autoencoder", "head": "shared"}}


def plan_of(kind: TaskKind = "classification", **changes: Any) -> StudyPlan:
    document = {
        "study": "test",
        "task": {"kind": kind, "image_size": 16, "label_sets": {"two": ["no", "yes"]}},
        "sites": {"alder": {"labels": "two", "patients": 100}},
        "model": {"width": 8} | NETWORKS.get(kind, {}),
        "rounds": 3,
        "quorum": 1,
        "privacy": "none",
        "evaluation": {"shots": [1, 5], "compare": []},
    }
    return StudyPlan.model_validate(document | changes)


def words_of(plan: StudyPlan) -> dict[str, str]:
    """The sentences by their first words."""
    return dict(sentence.split(": ", 1) for sentence in plan_in_words(plan, [], shared_numbers=640))


def algorithm_plan(name: str, **algorithm: Any) -> StudyPlan:
    settings = {"name": name, "proximal": 0.1 if name in ("fedprox", "mrmtl") else 0.0, **algorithm}
    model = {"width": 8, "trainable": "mapping" if name == "mapping" else "film"}
    return plan_of(algorithm=settings, model=model)


class Asked:
    """Private queries that write down what they were asked for, and answer nothing."""

    def __init__(self, plan: StudyPlan) -> None:
        self.asked: list[str] = []
        network = network_of(plan, "alder")
        self.learner = Learner(network, task=None)  # type: ignore[arg-type]  # no loss is ever taken
        self.public = dict(starting(plan, network))

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        self.asked.append("patients")
        return zeros_like(params)

    def episode_gradient(self, params: Params, meta_loss: MetaLoss, fixed: Params | None = None) -> Params:
        self.asked.append("episodes")
        return zeros_like(params)

    def class_sums(self, params: Params) -> ClassSums:
        self.asked.append("classes")
        return ClassSums(torch.ones(2, self.learner.network.head.in_features), torch.ones(2), 0.1)


def asked_by(plan: StudyPlan) -> list[str]:
    network = network_of(plan, "alder")
    kept = zeros_like(select(parameters(network), head_names(network, plan.model)))
    queries = Asked(plan)
    ALGORITHMS[plan.algorithm.name].local_update(travelling(plan, network), kept, queries, plan.algorithm)
    return queries.asked


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_questions_are_those_that_the_algorithm_asks(name: str) -> None:
    plan = algorithm_plan(name, meta_steps=3, inner_steps=4, episodes=6)
    asked, how = asked_by(plan), words_of(plan)["How"]
    assert len(asked) == queries_per_round(plan)
    assert (f"{len(asked)} question" in how) == bool(asked)
    assert ("The first question adds up by label" in how) == (asked[:1] == ["classes"])
    assert ("3 of the questions are put to 6 episodes" in how) == (asked.count("episodes") == 3)
    assert "episodes" in asked or "episode" not in how
    assert ("the sums by label" in words_of(plan)["What leaves a hospital"]) == ("classes" in asked)


def test_one_episode_question_is_said_in_the_singular() -> None:
    how = words_of(algorithm_plan("maml", meta_steps=1, episodes=1))["How"]
    assert "One question is put to 1 episode: a patient who joins" in how


@pytest.mark.parametrize(
    ("kind", "learned", "shots", "stays"),
    [
        (
            "classification",
            "a start for classification from",
            "1, 5 images per class",
            "Images, labels, counts and",
        ),
        ("multilabel", "several findings in one image from", "1, 5 images per class", "Images, labels, counts and"),
        ("segmentation", "a start for segmentation,", "1, 5 images,", "Images, masks, counts and the last layer stay."),
        ("anomaly", "from healthy images of", "1, 5 healthy images", "Images, labels and counts stay."),
    ],
)
def test_every_kind_of_task_has_its_words(kind: TaskKind, learned: str, shots: str, stays: str) -> None:
    words = words_of(plan_of(kind))
    assert learned in words["What is learned"]
    assert f"adaptation to {shots}" in words["What a simulation measures"]
    assert stays in words["What leaves a hospital"]
    assert "score" not in words["What leaves a hospital"]  # without privacy nobody asks for one


@pytest.mark.parametrize("kind", ["classification", "multilabel", "segmentation", "anomaly"])
def test_a_score_that_is_the_weight_is_said_to_be(kind: TaskKind) -> None:
    weighted = words_of(plan_of(kind, outer={"weights": "score"}))
    assert f", and one {score_name(kind)}, which is the update's weight." in weighted["What leaves a hospital"]
    assert "Reptile, weighted by score" in weighted["What is learned"]


def test_the_mapping_is_what_is_learned() -> None:
    assert "the mapping that sets the scales and shifts" in words_of(algorithm_plan("mapping"))["What is learned"]


def test_metasgd_learns_its_rates_as_well() -> None:
    assert (
        "layers with their learning rates of a conv4 network" in words_of(algorithm_plan("metasgd"))["What is learned"]
    )
    assert "rates" not in words_of(algorithm_plan("maml"))["What is learned"]


def test_what_stays_with_a_personal_network() -> None:
    assert words_of(algorithm_plan("mrmtl"))["What leaves a hospital"].endswith(
        "Images, labels, counts, the last layer and the hospital's own network stay."
    )


def test_modalities_and_views_are_named() -> None:
    task = {
        "kind": "classification",
        "image_size": 16,
        "label_sets": {"two": ["no", "yes"]},
        "modalities": ["CT", "MR"],
    }
    words = words_of(plan_of(task=task, sampling={"views": 3}))
    assert words["What is learned"].endswith(" The network is told the modality of each image: CT, MR.")
    assert "at most 4 images, each in 3 random views." in words["How"]
    plain = words_of(plan_of())
    assert "modality" not in plain["What is learned"]
    assert "views" not in plain["How"]


def test_arms_are_named_apart_in_the_comparison() -> None:
    compare = [
        {"name": "fedavg"},
        {"name": "fedavg", "label": "weighting", "outer": {"weights": "score"}},
        {"name": "fedavg", "label": "slower", "outer": {"lr": 0.1}},
    ]
    evaluation = {
        "shots": [5],
        "compare": compare,
        "subgroups": {"women": {"sex": ["F"]}},
        "fuse": "patient",
    }
    plan = plan_of(evaluation=evaluation)
    assert arm_titles(plan) == {
        "fedavg": "Federated averaging",
        "weighting": "Model weighting",
        "slower": "Federated averaging (slower)",
    }
    measured = words_of(plan)["What a simulation measures"]
    assert ", Federated averaging, Model weighting, Federated averaging (slower). Measured apart" in measured
    assert "Measured apart as well: women. A patient gets one answer" in measured


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_sentence_is_left_with_a_hole(name: str) -> None:
    for sentence in plan_in_words(algorithm_plan(name), [], shared_numbers=640):
        assert sentence.endswith(".")
        assert not re.search(r"None|  |\{|\}| \.| ,", sentence), sentence
