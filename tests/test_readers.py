"""Image files of every kind become 8-bit pixels, or a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.readers import UnreadableImageError, fit_image, fit_mask, read_image, read_mask, to_uint8

FORMATS = Path(__file__).parents[2] / "shared" / "data" / "formats"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(folder: Path, image: Image.Image, name: str = "image.png", **options: object) -> Path:
    path = folder / name
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def test_eight_bit_grey_is_untouched(tmp_path: Path) -> None:
    for name in ("a.png", "a.tiff"):
        np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(RAMP), name)), RAMP)


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bits_are_windowed_from_their_own_darkest_to_brightest(tmp_path: Path, name: str) -> None:
    deep = (RAMP.astype(np.uint16) * 16) + 100  # twelve bits used, as in most films
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(deep), name)), RAMP)


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    read = read_image(saved(tmp_path, Image.fromarray(RAMP > 99)))
    np.testing.assert_array_equal(read, np.where(RAMP > 99, 255, 0))


def test_a_palette_gives_its_colours_not_its_indices(tmp_path: Path) -> None:
    image = Image.fromarray(np.ones((16, 16), dtype=np.uint8)).convert("P")
    image.putdata([1] * 256)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert read_image(saved(tmp_path, image))[3, 3].tolist() == [10, 200, 30]


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    pixels = np.full((16, 16, 4), 200, dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, 8:, 3] = 0
    read = read_image(saved(tmp_path, Image.fromarray(pixels)))
    assert read[0, 0].tolist() == [200, 200, 200]
    assert read[0, 15].tolist() == [0, 0, 0]


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((16, 24), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert read_image(saved(tmp_path, image, "turned.jpg", exif=exif)).shape == (24, 16)


def test_a_truncated_file_is_unreadable(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.tiff"):
        path = saved(tmp_path, Image.fromarray(noise), name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UnreadableImageError, match="damaged, or no PNG, JPEG, TIFF, DICOM or NIfTI"):
            read_image(path)


def test_other_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="damaged, or no PNG, JPEG, TIFF, DICOM or NIfTI"):
        read_image(saved(tmp_path, Image.fromarray(RAMP), "a.gif"))
    with pytest.raises(UnreadableImageError, match="no such file"):
        read_image(tmp_path / "none.png")


def test_a_stack_of_pages_is_not_one_image(tmp_path: Path) -> None:
    page = Image.fromarray(RAMP)
    with pytest.raises(UnreadableImageError, match="3 pages"):
        read_image(saved(tmp_path, page, "stack.tiff", save_all=True, append_images=[page, page]))


def test_a_mask_keeps_its_values(tmp_path: Path) -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[4:8, 4:8] = 3
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(mask))), mask)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(mask > 0))), mask > 0)
    painted = np.stack([mask * 80, mask, mask], axis=2)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.fromarray(painted))), mask > 0)
    with pytest.raises(UnreadableImageError, match="above 255"):
        read_mask(saved(tmp_path, Image.fromarray(mask.astype(np.uint16) * 1000)))


def test_windowing_refuses_what_is_no_number() -> None:
    assert to_uint8(np.full((2, 2), 7.5)).max() == 0, "a flat image has no contrast to stretch"
    assert to_uint8(np.array([[-1000, 0], [500, 1000]], dtype=np.int16)).tolist() == [[0, 128], [191, 255]]
    for bad in (np.nan, np.inf):
        with pytest.raises(UnreadableImageError, match="NaN or infinite"):
            to_uint8(np.array([[0.0, bad]]))
    with pytest.raises(UnreadableImageError, match="type bool"):
        to_uint8(np.array([[True]]))


def test_colour_to_grey_is_luminance_and_grey_to_colour_is_replication() -> None:
    green = np.zeros((16, 16, 3), dtype=np.uint8)
    green[..., 1] = 255
    assert fit_image(green, size=16, channels=1)[0, 0, 0] == 150  # ITU-R 601: 0.587
    np.testing.assert_array_equal(fit_image(RAMP, size=16, channels=3), np.stack([RAMP] * 3))


def test_shrinking_averages_instead_of_picking() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)  # picking would give 0 or 255
    shrunk = fit_image(board, size=16, channels=1)
    assert shrunk.shape == (1, 16, 16)
    assert np.abs(shrunk.astype(int) - 128).max() < 8


def test_an_image_is_never_enlarged() -> None:
    with pytest.raises(UnreadableImageError, match="40x12 pixels; the plan needs at least 16x16"):
        fit_image(np.zeros((12, 40), dtype=np.uint8), size=16, channels=1)


def test_a_shrunk_mask_gains_no_new_values() -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 20:] = 200
    assert set(np.unique(fit_mask(mask, size=16))) == {0, 200}


@pytest.mark.realdata
@pytest.mark.skipif(not FORMATS.is_dir(), reason="the original files are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bccd_BloodImage_00001.jpg", (480, 640, 3)),
        ("busi_benign_1.png", (471, 562, 3)),
        ("nih_cxr_00001280_004.png", (1024, 1024)),
        ("nuclei_rgba.png", (256, 256, 3)),
        ("mri_exvivo_sagittal.tiff", (1280, 1760)),
    ],
)
def test_originals_of_real_archives(name: str, shape: tuple[int, ...]) -> None:
    pixels = read_image(FORMATS / name)
    assert pixels.shape == shape
    assert pixels.max() > 100, "an image, not a black sheet"
    fitted = fit_image(pixels, size=64, channels=3)
    assert fitted.shape == (3, 64, 64)


@pytest.mark.realdata
@pytest.mark.skipif(not FORMATS.is_dir(), reason="the original files are not beside this checkout")
def test_real_masks_fit_their_images() -> None:
    for image, mask in (
        ("busi_benign_1.png", "busi_benign_1_mask.png"),
        ("chase_Image_01L.jpg", "chase_Image_01L_mask_1bit.png"),
    ):
        values = read_mask(FORMATS / mask)
        assert values.shape == read_image(FORMATS / image).shape[:2]
        assert set(np.unique(values)) == {0, 1}
