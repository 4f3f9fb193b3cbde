"""Metrics against figures worked out by hand and other implementations, the interval against Student's table."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_iou
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    binary_recall,
    binary_specificity,
    multiclass_auroc,
)

from common.metrics import (
    anomaly_metrics,
    chance_of,
    classification_metrics,
    lead_metric,
    metrics_of,
    multilabel_metrics,
    score_name,
    segmentation_metrics,
)
from common.plan import TaskKind
from common.tasks import TASKS
from common.trials import Estimate, interval, shots_unit, split_means

KINDS: tuple[TaskKind, ...] = ("classification", "multilabel", "segmentation", "anomaly")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def certain(predicted: list[int], ways: int) -> torch.Tensor:
    """Probabilities that are sure of `predicted`."""
    return torch.eye(ways)[predicted]


def test_two_classes_by_hand() -> None:
    # label 0: 3 of 4 found; label 1: 1 of 2 found. F1: 2*3/(2*3+1+1) = .75 and 2*1/(2*1+1+1) = .5
    metrics = classification_metrics(certain([0, 0, 0, 1, 1, 0], 2), torch.tensor([0, 0, 0, 0, 1, 1]))
    assert metrics == pytest.approx(
        {
            "balanced_accuracy": (3 / 4 + 1 / 2) / 2,
            "auroc": (3 / 4 + 1 / 2) / 2,  # of a step with one corner it is the balanced accuracy
            "f1": (0.75 + 0.5) / 2,
            "sensitivity": 1 / 2,  # of the second label, not the mean
            "calibration_error": 2 / 6,  # sure of six, wrong on two
        },
        abs=1e-6,
    )
    assert metrics.keys() == metrics_of("classification").keys()


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    positive = torch.tensor([0.9, 0.4, 0.35, 0.8])  # labels 1, 1, 0, 0: three of four pairs in order
    probabilities = torch.stack([1 - positive, positive], dim=1)
    assert classification_metrics(probabilities, torch.tensor([1, 1, 0, 0]))["auroc"] == pytest.approx(0.75)


def test_calibration_error_by_hand() -> None:
    # four answers with .65 of which two are right, four with .95 all right, in bins of their own
    positive = torch.tensor([0.65] * 4 + [0.95] * 4)
    probabilities = torch.stack([1 - positive, positive], dim=1)
    error = classification_metrics(probabilities, torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]))["calibration_error"]
    assert error == pytest.approx((0.15 + 0.05) / 2, abs=1e-6)


def test_an_absent_class_is_not_counted_as_missed() -> None:
    labels = torch.tensor([0, 0, 2, 2])
    metrics = classification_metrics(certain([0, 0, 2, 1], 3), labels)
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["sensitivity"] == metrics["balanced_accuracy"]
    assert metrics["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics["auroc"] == pytest.approx((1 + 3 / 4) / 2)


def test_one_class_alone_leaves_auroc_and_sensitivity_open() -> None:
    metrics = classification_metrics(certain([0, 0, 1], 2), torch.tensor([0, 0, 0]))
    assert math.isnan(metrics["auroc"])
    assert math.isnan(metrics["sensitivity"])
    assert metrics["balanced_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "do not fit"),
        (torch.full((3, 2), 0.5), torch.tensor([0, 1]), "do not fit"),
        (torch.full((2, 2), 0.5), torch.tensor([0, 2]), "outside 0..1"),
        (torch.full((2, 2), 0.7), torch.tensor([0, 1]), "sum to 1"),
        (torch.full((2, 2), math.nan), torch.tensor([0, 1]), "not finite"),
    ],
)
def test_nonsense_is_refused(probabilities: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, labels)


def test_auroc_of_many_classes_is_that_of_torchmetrics() -> None:
    probabilities = torch.rand(60, 4, generator=rng()).mul(3).softmax(dim=1)
    labels = torch.randint(4, (60,), generator=rng(1))
    expected = multiclass_auroc(probabilities, labels, num_classes=4)
    assert classification_metrics(probabilities, labels)["auroc"] == pytest.approx(float(expected))


def test_two_findings_by_hand() -> None:
    # finding 0: of 2 shown 1 told, of 2 not shown 2 left alone; finding 1: of 1 shown 1 told, of 3 not shown 2
    labels = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    told = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert multilabel_metrics(told, labels) == pytest.approx(
        {
            "balanced_accuracy": ((1 / 2 + 1) / 2 + (1 + 2 / 3) / 2) / 2,
            "auroc": ((1 / 2 + 1) / 2 + (1 + 2 / 3) / 2) / 2,
            "f1": (2 / 3 + 2 / 3) / 2,
            "sensitivity": (1 / 2 + 1) / 2,
            "calibration_error": 2 / 8,  # sure of eight, wrong on two
        }
    )


def test_findings_are_judged_as_torchmetrics_judges_each() -> None:
    probabilities, labels = torch.rand(80, 3, generator=rng()), (torch.rand(80, 3, generator=rng(1)) > 0.7).float()
    columns = [(p, y.long()) for p, y in zip(probabilities.T, labels.T, strict=True)]

    def over_findings(metric: Callable[..., torch.Tensor]) -> float:
        return float(torch.stack([metric(p, y) for p, y in columns]).mean())

    found = multilabel_metrics(probabilities, labels)
    recall, specificity = over_findings(binary_recall), over_findings(binary_specificity)
    assert found["balanced_accuracy"] == pytest.approx((recall + specificity) / 2)
    assert found["balanced_accuracy"] != pytest.approx(over_findings(binary_accuracy), abs=1e-3)
    assert found["auroc"] == pytest.approx(over_findings(binary_auroc))
    assert found["f1"] == pytest.approx(over_findings(binary_f1_score))
    assert found["sensitivity"] == pytest.approx(recall)


def test_a_finding_that_nobody_or_everybody_shows_is_left_out() -> None:
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    probabilities = torch.tensor([[0.9, 0.9, 0.9], [0.2, 0.2, 0.2]])
    found = multilabel_metrics(probabilities, labels)
    assert (found["balanced_accuracy"], found["auroc"]) == (1, 1)  # of the first finding alone
    assert found["sensitivity"] == pytest.approx((1 + 1 / 2) / 2)  # of the first and the last
    alone = multilabel_metrics(probabilities[:, 1:2].clone(), labels[:, 1:2])
    assert all(math.isnan(alone[name]) for name in ("balanced_accuracy", "auroc", "f1", "sensitivity"))


def squares() -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and masks (3, 4, 4): 4 pixels of which 2 are right, the second class found once, nothing at all."""
    predicted, masks = torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(3, 4, 4, dtype=torch.int64)
    predicted[0, 0, :], masks[0, :2, :2] = 1, 1
    predicted[1, 0, 0], masks[1, 0, :2], masks[1, 3, :] = 1, 1, 2
    return predicted, masks


def test_segmentation_by_hand() -> None:
    # image 0: 2*2/(4+4) and 2/6; image 1: class 1 has 2*1/(1+2) and 1/2, class 2 has 0; image 2 has nothing: 1
    assert segmentation_metrics(*squares(), ways=3) == pytest.approx(
        {
            "dice": (1 / 2 + (2 / 3 + 0) / 2 + 1) / 3,
            "iou": (1 / 3 + (1 / 2 + 0) / 2 + 1) / 3,
            "sensitivity": (2 + 1) / (4 + 2 + 4),
        }
    )


def test_segmentation_is_judged_as_monai_judges_it() -> None:
    predicted, masks = (torch.randint(3, (6, 8, 8), generator=rng(seed)) for seed in (0, 1))
    masks[0][masks[0] == 2] = 0  # a class that this image's truth lacks, and its prediction has
    hot = [torch.nn.functional.one_hot(m, 3).movedim(-1, 1) for m in (predicted, masks)]
    found = segmentation_metrics(predicted, masks, 3)
    dice = compute_dice(*hot, include_background=False, ignore_empty=False)
    iou = compute_iou(*hot, include_background=False, ignore_empty=False)
    assert found["dice"] == pytest.approx(float(dice.mean()))
    assert found["iou"] == pytest.approx(float(iou.mean()))


def test_two_classes_agree_with_the_score_that_sites_release() -> None:
    predicted, masks = (torch.randint(2, (5, 8, 8), generator=rng(seed)) for seed in (0, 1))
    logits = torch.nn.functional.one_hot(predicted, 2).movedim(-1, 1).float()
    score = TASKS["segmentation"].score(logits, masks).mean()
    assert segmentation_metrics(predicted, masks, 2)["dice"] == pytest.approx(float(score))


def test_without_foreground_there_is_nothing_to_be_sensitive_to() -> None:
    nothing = torch.zeros(2, 4, 4, dtype=torch.int64)
    found = segmentation_metrics(nothing, nothing, 2)
    assert (found["dice"], found["iou"]) == (1, 1)
    assert math.isnan(found["sensitivity"])
    assert segmentation_metrics(nothing + 1, nothing, 2)["dice"] == 0


def test_anomalies_by_hand() -> None:
    # healthy 0..19: their 95th percentile is 18.05. Anomalies: 18.02 below it, 30 above, 5 tied with a healthy one
    scores = torch.tensor([*range(20), 18.02, 30.0, 5.0])
    anomalous = torch.tensor([False] * 20 + [True] * 3)
    assert anomaly_metrics(scores, anomalous) == pytest.approx(
        {
            "auroc": (19 + 20 + 5.5) / 60,
            "average_precision": (2 / 3 + 1 / 1 + 3 / 18) / 3,
            "sensitivity": 1 / 3,
        }
    )


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30))
@settings(max_examples=40, deadline=None)
def test_anomaly_scores_are_ranked_as_torchmetrics_ranks_them(pairs: list[tuple[int, bool]]) -> None:
    scores, anomalous = torch.tensor([s for s, _ in pairs]).float(), torch.tensor([a for _, a in pairs])
    found = anomaly_metrics(scores * 1e4, anomalous)  # squashed to 0..1 these would all be tied
    if anomalous.all() or not anomalous.any():
        assert all(map(math.isnan, found.values()))
        return
    assert found["auroc"] == pytest.approx(float(binary_auroc(scores / 10, anomalous.long())), abs=1e-6)
    precision = float(binary_average_precision(scores / 10, anomalous.long()))
    assert found["average_precision"] == pytest.approx(precision, abs=1e-6)


HALF = torch.full((2, 2), 0.5)
BLANK = torch.zeros(2, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (lambda: multilabel_metrics(HALF, torch.zeros(2, 3)), "do not fit"),
        (lambda: multilabel_metrics(HALF[:0], HALF[:0]), "do not fit"),
        (lambda: multilabel_metrics(HALF, HALF), "neither 0 nor 1"),
        (lambda: multilabel_metrics(HALF + 0.6, torch.ones(2, 2)), "outside 0..1"),
        (lambda: multilabel_metrics(HALF * math.nan, torch.ones(2, 2)), "not finite"),
        (lambda: segmentation_metrics(BLANK, BLANK[:1], 2), "do not fit"),
        (lambda: segmentation_metrics(BLANK[0], BLANK[0], 2), "do not fit"),
        (lambda: segmentation_metrics(BLANK[:0], BLANK[:0], 2), "do not fit"),
        (lambda: segmentation_metrics(BLANK + 2, BLANK, 2), "a prediction holds a class outside 0..1"),
        (lambda: segmentation_metrics(BLANK, BLANK - 1, 2), "a mask holds a class outside 0..1"),
        (lambda: anomaly_metrics(HALF, HALF > 0), "do not fit"),
        (lambda: anomaly_metrics(HALF[0], torch.tensor([0, 1])), "not bool"),
        (lambda: anomaly_metrics(HALF[0] * math.inf, torch.tensor([True, False])), "not finite"),
    ],
)
def test_nonsense_of_other_kinds_is_refused(metrics: Callable[[], dict[str, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics()


def test_each_kind_says_what_it_measures() -> None:
    measured = {
        "classification": classification_metrics(HALF, torch.tensor([0, 1])),
        "multilabel": multilabel_metrics(HALF, torch.eye(2)),
        "segmentation": segmentation_metrics(BLANK, BLANK, 2),
        "anomaly": anomaly_metrics(HALF[0], torch.tensor([True, False])),
    }
    for kind in KINDS:
        assert measured[kind].keys() == metrics_of(kind).keys()
        assert score_name(kind)
    assert {kind: lead_metric(kind) for kind in KINDS} == {
        "classification": "balanced_accuracy",
        "multilabel": "balanced_accuracy",
        "segmentation": "dice",
        "anomaly": "auroc",
    }
    assert [shots_unit(kind) for kind in KINDS] == ["images per class"] * 2 + ["images", "healthy images"]
    assert [shots_unit(kind, count=1) for kind in KINDS] == ["image per class"] * 2 + ["image", "healthy image"]


def test_chance_is_what_guessing_reaches() -> None:
    labels = torch.tensor([0, 0, 2, 2, 2])  # label 1 does not occur
    guess = torch.eye(3)[torch.zeros(5, dtype=torch.int64)]
    assert chance_of("classification", labels, 3) == classification_metrics(guess, labels)["balanced_accuracy"] == 1 / 2
    findings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for told in (torch.zeros(3, 2), torch.ones(3, 2)):
        assert chance_of("multilabel", findings, 2) == multilabel_metrics(told, findings)["balanced_accuracy"]
    assert chance_of("anomaly", labels > 0, 2) == anomaly_metrics(torch.ones(5), labels > 0)["auroc"] == 0.5


def test_chance_of_a_segmentation_is_the_best_class_everywhere() -> None:
    _, masks = squares()
    # everywhere class 1: 2*4/(16+4) in image 0; 2*2/(16+2) and 0 for class 2 in image 1; 0. Class 2: 0; 0 and 8/20; 0
    assert chance_of("segmentation", masks, 3) == pytest.approx((8 / 20 + (4 / 18) / 2 + 0) / 3)
    assert chance_of("segmentation", (masks > 0).long(), 2) == pytest.approx((8 / 20 + 2 * 6 / 22 + 0) / 3)


def test_interval_by_the_table_of_student() -> None:
    # mean 3, standard deviation sqrt(2.5), t(4, .975) = 2.7764
    half = 2.776445 * math.sqrt(2.5 / 5)
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half), abs=1e-5)


def test_interval_of_one_value_says_nothing_of_spread() -> None:
    alone = interval([0.7])
    assert alone.mean == 0.7
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)
    assert math.isnan(interval([]).mean)


def test_draws_of_one_split_are_one_unit() -> None:
    # four identical draws in each of two splits carry two values, not eight
    pairs = [(0, 0.6)] * 4 + [(1, 0.8)] * 4
    found = interval(list(split_means(pairs).values()))
    assert found == interval([0.6, 0.8]) != interval([value for _, value in pairs])


def test_split_means_leave_nan_out() -> None:
    assert split_means([(0, 0.5), (0, math.nan), (0, 0.7), (1, math.nan)]) == {0: pytest.approx(0.6)}
    assert interval([0.5, 0.5]) == Estimate(0.5, 0.5, 0.5)
