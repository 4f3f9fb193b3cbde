"""Calibration against closed forms and laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.calibration import (
    MAX_PIXELS,
    confidence,
    least_confidence,
    nearest_distance,
    pixels_evenly,
    pooled,
    probabilities,
    temperature,
    usual_distance,
)


def planted(margin: float, right: int, wrong: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers of one margin, of which so many are right and wrong."""
    logits = torch.tensor([[margin, 0.0]]).repeat(right + wrong, 1)
    return logits, torch.tensor([0] * right + [1] * wrong)


@pytest.mark.parametrize("margin", [0.5, 2.0, 8.0])
@pytest.mark.parametrize(("right", "wrong"), [(9, 1), (6, 4)])
def test_the_temperature_says_what_is_true(margin: float, right: int, wrong: int) -> None:
    """sigmoid(margin / T) = right / (right + wrong)."""
    heat = temperature(*planted(margin, right, wrong))
    assert heat == pytest.approx(margin / math.log(right / wrong), rel=1e-9)


def test_the_temperature_of_findings_says_what_is_true() -> None:
    logits = torch.tensor([[3.0, -3.0]] * 10)
    found = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 2)
    assert temperature(logits, found, several=True) == pytest.approx(3.0 / math.log(4), rel=1e-9)


def test_no_other_temperature_has_less_cross_entropy() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(60, 3, generator=rng)
    labels = (logits / 3).softmax(dim=1).multinomial(1, generator=rng).squeeze(1)

    def loss(heat: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / heat, labels))

    best = temperature(logits, labels)
    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.98, 1.02, 2.0))


@pytest.mark.parametrize(("right", "wrong", "extreme"), [(10, 0, 1e-3), (0, 10, 1e3)])
def test_without_an_optimum_the_temperature_stays_finite(right: int, wrong: int, extreme: float) -> None:
    assert temperature(*planted(1.0, right, wrong)) == pytest.approx(extreme)


@given(st.floats(0.01, 100.0), st.integers(0, 2**31))
def test_a_temperature_changes_no_answer(heat: float, seed: int) -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.equal(probabilities(logits, "classification", heat).argmax(1), logits.argmax(1))


@pytest.mark.parametrize(
    ("kind", "shares", "sure"),
    [
        ("classification", torch.tensor([[0.2, 0.8]]), 0.8),
        ("multilabel", torch.tensor([[0.9, 0.4]]), 0.6),
        ("segmentation", torch.tensor([[[[0.9, 0.3]], [[0.1, 0.7]]]]), 0.8),
    ],
    ids=["classification", "multilabel", "segmentation"],
)
def test_confidence_is_that_of_the_answer(kind: str, shares: torch.Tensor, sure: float) -> None:
    assert confidence(shares, kind).tolist() == pytest.approx([sure])


def test_the_least_confidence_keeps_the_asked_share_right() -> None:
    sure = torch.tensor([0.95, 0.9, 0.85, 0.8, 0.7, 0.6])
    right = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    assert least_confidence(sure, right, share=0.8, least=1) == pytest.approx(0.7)
    assert least_confidence(sure, right, share=0.9, least=1) == pytest.approx(0.85)
    assert least_confidence(sure, right, share=0.9, least=4) is None
    assert least_confidence(sure, 1 - right, share=0.9, least=1) is None


def test_equal_confidences_are_answered_together() -> None:
    """The first two are right, but nothing tells them from the third."""
    sure, right = torch.tensor([0.9, 0.9, 0.9, 0.5]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert least_confidence(sure, right, share=0.9, least=1) is None
    assert least_confidence(sure, right, share=0.6, least=1) == pytest.approx(0.9)


def test_no_images_have_no_least_confidence() -> None:
    assert least_confidence(torch.zeros(0), torch.zeros(0), share=0.5, least=1) is None


def test_the_usual_distance_is_the_conformal_quantile() -> None:
    """ceil(100 * 0.95) = 95th of 99; 19 images are the fewest that bear an alarm rate of 0.05."""
    assert usual_distance(torch.arange(1.0, 100.0).flip(0), alarms=0.05) == 95.0
    assert usual_distance(torch.arange(19.0), alarms=0.05) == 18.0
    assert usual_distance(torch.arange(18.0), alarms=0.05) is None


def test_few_new_images_like_the_old_ones_raise_an_alarm() -> None:
    rng = torch.Generator().manual_seed(0)
    alarms = []
    for _ in range(400):
        distances = torch.rand(60, generator=rng)
        limit = usual_distance(distances[:40], alarms=0.1)
        assert limit is not None
        alarms.append(float((distances[40:] > limit).double().mean()))
    assert 0.07 < sum(alarms) / len(alarms) <= 0.105  # exactly 4/41 on average


def test_distances_are_to_the_nearest_support_image() -> None:
    support = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert nearest_distance(torch.tensor([[0.0, 1.0], [3.0, 5.0]]), support).tolist() == [1.0, 1.0]
    assert pooled(torch.ones(2, 3, 4, 4)).shape == (2, 3)


def test_pixels_are_rows_that_keep_their_truth() -> None:
    logits, masks = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    rows, truth = pixels_evenly(logits, masks)
    assert torch.equal(rows[27], logits[1, :, 1, 2])
    assert int(truth[27]) == int(masks[1, 1, 2])
    assert len(pixels_evenly(torch.zeros(3, 2, 300, 300), torch.zeros(3, 300, 300))[0]) <= MAX_PIXELS
