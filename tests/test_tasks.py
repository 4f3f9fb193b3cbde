"""What is optimised and counted for each kind of task, against other implementations, and pasted anomalies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, cross_entropy, one_hot

import common.cut_paste
from common.cut_paste import cut_paste
from common.images import split_modality, standardise, with_modality
from common.tasks import CUT_PASTE, CUT_PASTE_OF_A_MODALITY, RECONSTRUCTION, TASKS, Task, task_of
from tests.conftest import PlanMaker

SEGMENTATION, MULTILABEL, CLASSIFICATION = (TASKS[kind] for kind in ("segmentation", "multilabel", "classification"))
law = settings(max_examples=30, deadline=None)


def rng_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- losses -------------------------------------------------------------------------------------------------------


def masks_and_logits(ways: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = rng_of(seed)
    return torch.randint(0, ways, (4, 12, 10), generator=rng), 2 * torch.randn(4, ways, 12, 10, generator=rng)


@pytest.mark.parametrize("ways", [2, 4])
def test_the_segmentation_loss_is_monai_s(ways: int) -> None:
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")
    masks, logits = masks_and_logits(ways, ways)
    dice = losses.DiceLoss(
        include_background=False, softmax=True, squared_pred=True, reduction="none", smooth_nr=1.0, smooth_dr=1.0
    )
    truth = one_hot(masks, ways).movedim(-1, 1).float()
    wanted = dice(logits, truth).mean(dim=(1, 2, 3)) + cross_entropy(logits, masks, reduction="none").mean(dim=(1, 2))
    assert torch.allclose(SEGMENTATION.loss(logits, masks), wanted, atol=1e-6)
    assert not torch.allclose(SEGMENTATION.loss(logits, masks.flip(1)), wanted, atol=1e-3)


def test_the_segmentation_loss_of_each_image_is_its_own() -> None:
    masks, logits = masks_and_logits(3, 0)
    alone = torch.cat([SEGMENTATION.loss(logits[i : i + 1], masks[i : i + 1]) for i in range(4)])
    assert torch.allclose(SEGMENTATION.loss(logits, masks), alone, atol=1e-6)


def test_a_perfect_mask_costs_nothing_and_an_empty_one_has_a_finite_gradient() -> None:
    masks, _ = masks_and_logits(2, 1)
    sure = 50.0 * (one_hot(masks, 2).movedim(-1, 1).float() - 0.5)
    assert SEGMENTATION.loss(sure, masks).max() < 1e-3
    logits = torch.zeros(1, 2, 8, 8, requires_grad=True)
    SEGMENTATION.loss(logits, torch.zeros(1, 8, 8, dtype=torch.int64)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_findings_are_judged_one_by_one() -> None:
    rng = rng_of(0)
    logits, findings = torch.randn(5, 3, generator=rng), torch.randint(0, 2, (5, 3), generator=rng).float()
    wanted = binary_cross_entropy(logits.sigmoid(), findings, reduction="none").mean(dim=1)
    assert torch.allclose(MULTILABEL.loss(logits, findings), wanted, atol=1e-6)
    by_hand = [
        sum((z > 0) == (y == 1) for z, y in zip(row, found, strict=True)) / 3
        for row, found in zip(logits.tolist(), findings.tolist(), strict=True)
    ]
    assert MULTILABEL.score(logits, findings).tolist() == pytest.approx(by_hand)


def test_rare_labels_weigh_more_where_the_plan_says_how_rare_they_are(make_plan: PlanMaker) -> None:
    """Declared shares 0.8 and 0.2: weights 1/1.6 and 1/0.4; with labels so distributed the mean weight is 1."""
    sites = {
        "alder": {"labels": "lesion", "patients": 10, "prevalence": [0.8, 0.2]},
        "birch": {"labels": "lesion", "patients": 10},
    }
    plan = make_plan(sites=sites)
    logits, labels = torch.randn(10, 2, generator=rng_of(0)), torch.tensor([0] * 8 + [1] * 2)
    plain = cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(task_of(plan, "alder").loss(logits, labels), plain * torch.tensor([0.625] * 8 + [2.5] * 2))
    assert torch.allclose(task_of(plan, "birch").loss(logits, labels), plain)
    assert task_of(plan, "alder").score is CLASSIFICATION.score
    weighted = cross_entropy(logits, labels, weight=torch.tensor([0.625, 2.5]), reduction="sum")
    assert torch.allclose(task_of(plan, "alder").loss(logits, labels).sum(), weighted)


@pytest.mark.parametrize(
    ("kind", "changes", "task"),
    [
        ("classification", {}, CLASSIFICATION),
        ("multilabel", {}, MULTILABEL),
        ("segmentation", {"model": {"name": "unet", "width": 8}}, SEGMENTATION),
        ("anomaly", {}, CUT_PASTE),
        ("anomaly", {"modalities": ["ct", "mr"]}, CUT_PASTE_OF_A_MODALITY),
        ("anomaly", {"model": {"name": "autoencoder", "width": 8, "head": "shared"}}, RECONSTRUCTION),
    ],
)
def test_the_task_of_a_plan(make_plan: PlanMaker, kind: str, changes: dict[str, object], task: Task) -> None:
    settings = {"kind": kind, "image_size": 16, "label_sets": {"lesion": ["healthy", "lesion"]}}
    settings |= {key: value for key, value in changes.items() if key == "modalities"}
    plan = make_plan(task=settings, **{key: value for key, value in changes.items() if key == "model"})
    assert task_of(plan, "alder") is task


# ---- scores -------------------------------------------------------------------------------------------------------


@law
@given(
    kind=st.sampled_from(["classification", "multilabel", "segmentation", "reconstruction"]), seed=st.integers(0, 99)
)
def test_a_score_lies_between_0_and_1_for_whatever_a_network_says(kind: str, seed: int) -> None:
    """The bound is what the sensitivity of the private statistic rests on."""
    rng = rng_of(seed)
    wild = 10.0 ** torch.randint(-3, 30, (6, 1), generator=rng).float()
    flat = wild * torch.randn(6, 3, generator=rng)
    maps = wild.reshape(6, 1, 1, 1) * torch.randn(6, 3, 8, 8, generator=rng)
    scores = {
        "classification": lambda: CLASSIFICATION.score(flat, torch.randint(0, 3, (6,), generator=rng)),
        "multilabel": lambda: MULTILABEL.score(flat, torch.randint(0, 2, (6, 3), generator=rng).float()),
        "segmentation": lambda: SEGMENTATION.score(maps, torch.randint(0, 3, (6, 8, 8), generator=rng)),
        "reconstruction": lambda: RECONSTRUCTION.score(maps, torch.randn(6, 3, 8, 8, generator=rng)),
    }[kind]()
    assert scores.shape == (6,)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_the_dice_score_by_hand() -> None:
    """Foreground {a, b} found as {b, c}: 2 * 1 / (2 + 2); the right place under the wrong label is no overlap."""
    truth = torch.zeros(4, 2, 2, dtype=torch.int64)
    truth[0, 0] = 1
    truth[1, 0] = 1
    found = torch.zeros(4, 2, 2, dtype=torch.int64)
    found[0, 0, 1], found[0, 1, 1] = 1, 1
    found[1, 0] = 2
    found[3, 0, 0] = 1
    logits = one_hot(found, 3).movedim(-1, 1).float()
    assert SEGMENTATION.score(logits, truth).tolist() == [0.5, 0.0, 1.0, 0.0]


def test_a_drawing_is_judged_against_the_standardised_image() -> None:
    images = torch.randn(3, 1, 8, 8, generator=rng_of(0))
    drawn = standardise(images)
    assert RECONSTRUCTION.loss(drawn, images).tolist() == [0.0, 0.0, 0.0]
    assert RECONSTRUCTION.score(drawn, images).tolist() == [1.0, 1.0, 1.0]
    assert RECONSTRUCTION.loss(drawn + 0.5, images).tolist() == pytest.approx([0.25] * 3, rel=1e-5)
    assert RECONSTRUCTION.score(drawn + 0.5, images).tolist() == pytest.approx([math.exp(-0.25)] * 3, rel=1e-5)
    inputs, targets = RECONSTRUCTION.views(images, torch.zeros(3), rng_of(0))
    assert inputs is images
    assert targets is images


# ---- pasted anomalies ---------------------------------------------------------------------------------------------


def changed_box(before: Tensor, after: Tensor) -> tuple[int, int, int]:
    """Height and width of the least rectangle around all changed pixels, and how many of its pixels changed."""
    changed = (before != after).any(dim=0)
    rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1), int(changed.sum())


@law
@given(
    size=st.sampled_from([16, 28, 64]), channels=st.sampled_from([1, 3]), seed=st.integers(0, 10_000)
)  # fmt: skip
def test_a_paste_changes_one_rectangle_of_every_image_within_its_bounds(size: int, channels: int, seed: int) -> None:
    images = torch.randn(5, channels, size, size, generator=rng_of(seed))
    pasted = cut_paste(images, rng_of(seed))
    for before, after in zip(images, pasted, strict=True):
        height, width, changed = changed_box(before, after)
        assert changed >= 0.9 * height * width
        tallest = math.sqrt(0.15 * 3.0)  # the largest area at the widest aspect
        assert height <= round(size * tallest)
        assert width <= round(size * tallest)
        assert 0.5 * 0.02 * size**2 <= height * width <= 0.15 * size**2 + 2 * size


def test_a_paste_is_another_place_of_the_image_made_lighter_or_darker() -> None:
    images = torch.randn(20, 1, 32, 32, generator=rng_of(1))
    pasted = cut_paste(images, rng_of(2))
    for before, after in zip(images, pasted, strict=True):
        rows, columns = ((before != after)[0].any(dim=d).nonzero().flatten() for d in (1, 0))
        patch = after[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        places = before[0].unfold(0, len(patch), 1).unfold(1, patch.shape[1], 1) - patch
        spread = places.amax(dim=(2, 3)) - places.amin(dim=(2, 3))
        top, left = divmod(int(spread.argmin()), spread.shape[1])
        assert float(spread[top, left]) < 1e-5
        assert float(places[top, left].abs().max()) <= 0.4 + 1e-5


def test_pastes_follow_from_the_generator_alone_and_leave_the_images_as_they_are() -> None:
    images = torch.randn(4, 1, 16, 16, generator=rng_of(0))
    before = images.clone()
    torch.manual_seed(0)
    one = cut_paste(images, rng_of(5))
    torch.manual_seed(1)
    assert torch.equal(one, cut_paste(images, rng_of(5)))
    assert not torch.equal(one, cut_paste(images, rng_of(6)))
    assert torch.equal(images, before)
    assert cut_paste(images[:0], rng_of(0)).shape == (0, 1, 16, 16)


def test_patches_beyond_their_bounds_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.cut_paste, "_AREA", (0.3, 0.6))
    images = torch.randn(20, 1, 32, 32, generator=rng_of(0))
    pasted = cut_paste(images, rng_of(0))
    sides = [changed_box(before, after)[:2] for before, after in zip(images, pasted, strict=True)]
    assert all(h * w > 0.15 * 32**2 + 2 * 32 for h, w in sides)


def test_clean_and_pasted_images_stand_view_by_view() -> None:
    images = torch.randn(3, 1, 16, 16, generator=rng_of(0))
    views, labels = CUT_PASTE.views(images, torch.tensor([7, 7, 7]), rng_of(1))
    assert torch.equal(views[:3], images)
    assert torch.equal(views[3:], cut_paste(images, rng_of(1)))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_paste_leaves_the_modality_alone() -> None:
    images, modalities = torch.randn(3, 1, 16, 16, generator=rng_of(0)), torch.tensor([2, 0, 1])
    inputs = with_modality(images, modalities)
    views, labels = CUT_PASTE_OF_A_MODALITY.views(inputs, torch.zeros(3), rng_of(1))
    seen, told = split_modality(views)
    assert told.tolist() == [2, 0, 1, 2, 0, 1]
    assert torch.equal(seen, CUT_PASTE.views(images, torch.zeros(3), rng_of(1))[0])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_other_tasks_learn_from_images_as_they_are() -> None:
    inputs, targets = torch.randn(2, 1, 4, 4), torch.tensor([0, 1])
    for task in TASKS.values():
        assert task.views(inputs, targets, rng_of(0)) == (inputs, targets)
