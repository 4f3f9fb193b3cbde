"""Metrics against figures worked out by hand, and the interval against a table of Student's t."""

import math

import pytest
import torch

from common.metrics import METRICS, classification_metrics
from common.trials import Estimate, interval, split_means


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
    assert metrics.keys() == METRICS.keys()


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
