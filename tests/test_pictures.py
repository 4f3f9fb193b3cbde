"""Drawings of masks and heat maps, pixel by pixel."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from common.pictures import COLOURS, agreement, heated, outlined, png_address

SIDE = 96  # so that an image is drawn twice as large
GREY = np.full((SIDE, SIDE), 100, dtype=np.uint8)


def mask_of(*squares: tuple[int, int, int, int]) -> np.ndarray:
    """Class 1, 2, ... in squares of (top, bottom, left, right)."""
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for number, (top, bottom, left, right) in enumerate(squares, 1):
        mask[top:bottom, left:right] = number
    return mask


def drawn(picture: np.ndarray) -> np.ndarray:
    """Which pixels are not the grey of the image, bool (2 SIDE, 2 SIDE)."""
    changed: np.ndarray = (picture != 100).any(axis=2)
    return changed


def test_a_contour_is_thinner_than_a_pixel_and_inside() -> None:
    found = drawn(outlined(GREY, mask_of((10, 20, 30, 40))))
    expected = np.zeros_like(found)
    expected[20:40, 60:80] = True
    expected[21:39, 61:79] = False
    assert (found == expected).all()


def test_a_contour_is_closed_at_the_border_and_between_classes() -> None:
    found = drawn(outlined(GREY, mask_of((0, 10, 0, 10), (0, 10, 10, 20))))
    assert found[0, :40].all()
    assert found[:20, 0].all()
    assert found[:20, 39].all()
    assert found[5, 20]  # where class 2 begins
    assert found.sum() == 2 * 40 + 3 * 18


def test_without_a_mask_the_image_is_as_it_is() -> None:
    colours = np.arange(SIDE * SIDE * 3, dtype=np.uint64).reshape(SIDE, SIDE, 3).astype(np.uint8)
    assert (outlined(colours, None)[::2, ::2] == colours).all()
    assert not drawn(outlined(GREY, np.zeros_like(GREY))).any()


def test_agreement_has_a_colour_for_each_case() -> None:
    truth, found = mask_of((0, 4, 0, 4), (20, 24, 0, 4)), mask_of((0, 4, 2, 6))
    found[20:24, 0:2] = 1  # class 1 where class 2 is
    picture = agreement(GREY, truth, found)[::2, ::2]
    right, wrong, missed = (np.round(0.4 * 100 + 0.6 * np.array(colour)) for colour in COLOURS.values())
    assert (picture[0:4, 2:4] == right).all()
    assert (picture[0:4, 4:6] == wrong).all()
    assert (picture[0:4, 0:2] == missed).all()
    assert (picture[20:24, 0:2] == wrong).all()
    assert (picture[20:24, 2:4] == missed).all()
    assert (picture[40:] == 100).all()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_three_colours_differ_although_a_kind_of_cone_is_missing(gone: int) -> None:
    """Machado 2009, severity 1: protanopia, deuteranopia, tritanopia."""
    matrices = [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    seen = [np.array(matrices[gone]) @ (0.6 * np.array(colour) + 0.4 * 100) for colour in COLOURS.values()]
    distances = [np.linalg.norm(a - b) for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2]))]
    assert min(distances) > 60


def test_heat_covers_what_is_unusual_and_leaves_the_rest() -> None:
    heat = np.zeros((SIDE, SIDE), dtype=np.float32)
    heat[10:20, 10:20] = 1.0
    heat[30:40, 30:40] = 0.5
    picture = heated(GREY, heat, mask_of((50, 60, 50, 60)))
    changed = drawn(picture)
    assert changed[20:40, 20:40].all()
    assert not changed[:20].any()
    assert picture[30, 30].sum() > picture[70, 70].sum(), "more heat, brighter"
    assert changed[100, 100:120].all(), "the contour"


def test_a_data_address_holds_the_image() -> None:
    image = outlined(GREY, mask_of((10, 20, 30, 40)))
    address = png_address(image)
    kind, _, code = address.partition(",")
    assert kind == "data:image/png;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))) == image).all()
