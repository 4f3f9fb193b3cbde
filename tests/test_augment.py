"""Random views: what may change in an image, and what never does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common import augment as views
from common.augment import augment, augment_with_masks


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 1000))
def test_a_view_has_the_image_s_shape_and_stays_in_range(count: int, channels: int, free: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand((count, channels, 16, 16), generator=rng)
    masks = torch.randint(3, (count, 16, 16), generator=rng)
    lies = torch.rand(count, generator=rng) < 0.5 if free else None
    seen, moved = augment_with_masks(images, masks, rng, free=lies)
    for shown in (seen, augment(images, rng, free=lies)):
        assert shown.shape == images.shape
        assert float(shown.min()) >= 0.0
        assert float(shown.max()) <= 1.0
    assert moved.dtype == torch.int64
    assert moved.shape == masks.shape
    assert set(moved.unique().tolist()) <= set(masks.unique().tolist())


def quadrants() -> Tensor:
    """(1, 32, 32) whose quarters differ so that its eight lies are eight different images."""
    return torch.tensor([[0.8, 0.2], [0.6, 0.4]]).repeat_interleave(16, 0).repeat_interleave(16, 1).unsqueeze(0)


def lies_of(images: Tensor) -> Tensor:
    """Which of the eight lies of `quadrants` each image shows (0: as it was); by the highest correlation."""
    image = quadrants()[0]
    turned = [image.rot90(k) for k in range(4)]
    templates = torch.stack([*turned, *(one.flip(1) for one in turned)]).flatten(1)
    centred = images.flatten(1) - images.flatten(1).mean(dim=1, keepdim=True)
    return (centred @ (templates - templates.mean(dim=1, keepdim=True)).T).argmax(dim=1)


def test_a_fixed_image_is_never_turned_over_and_a_free_one_lies_in_all_eight_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(views, "_INVERTED", 0.0)  # the negative of `quadrants` is its mirror image
    rng = torch.Generator().manual_seed(0)
    images = quadrants().expand(1600, 1, 32, 32)
    assert set(lies_of(augment(images, rng)).tolist()) == {0}
    free = torch.arange(1600) < 800
    seen = lies_of(augment(images, rng, free=free))
    assert set(seen[~free].tolist()) == {0}
    counts = seen[free].bincount(minlength=8)
    assert counts.shape == (8,)
    assert int(counts.min()) > 60  # of 800 that lie evenly: 100 each, deviation 9
    assert int(counts.max()) < 140


def test_a_view_is_never_mirrored() -> None:
    """A bright left half stays on the left in every view: laterality is a label."""
    image = torch.zeros(64, 1, 32, 32)
    image[..., :16] = 0.8
    image[..., 16:] = 0.4
    seen = augment(image, torch.Generator().manual_seed(0))
    left, right = seen[..., :8].mean(dim=(1, 2, 3)), seen[..., -8:].mean(dim=(1, 2, 3))
    inverted = left < right  # photographic inversion swaps them in some views, mirroring would in half
    assert float(inverted.float().mean()) < 0.4


@pytest.mark.parametrize("free", [False, True])
def test_a_mask_moves_as_its_image_does(monkeypatch: pytest.MonkeyPatch, free: bool) -> None:
    """The lesion is the bright part: after any view, the mask still marks the bright part."""
    monkeypatch.setattr(views, "_INVERTED", 0.0)
    rng = torch.Generator().manual_seed(1)
    masks = torch.zeros(64, 32, 32, dtype=torch.int64)
    masks[:, 3:13, 5:20] = 1
    images = 0.2 + 0.6 * masks.float().unsqueeze(1)
    lies = torch.ones(64, dtype=torch.bool) if free else None

    def agreement(seen: Tensor, marked: Tensor) -> float:
        middle = (seen.amin(dim=(1, 2, 3)) + seen.amax(dim=(1, 2, 3))) / 2
        return float(((seen[:, 0] > middle.reshape(-1, 1, 1)) == (marked > 0)).float().mean())

    seen, moved = augment_with_masks(images, masks, rng, free=lies)
    assert agreement(seen, moved) > 0.97
    assert agreement(seen, masks) < 0.93  # a mask left where it was
