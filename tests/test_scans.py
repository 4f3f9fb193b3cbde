"""DICOM and NIfTI files become what a radiologist would see, with the values that another reader finds in them."""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.data.readers import UnreadableImageError, kind_of, read_image
from tests.scans import SYNTAXES, by_gdcm, compressed, dicom

pydicom = pytest.importorskip("pydicom", reason="the extra 'imaging' is not installed")
nibabel = pytest.importorskip("nibabel", reason="the extra 'imaging' is not installed")

from client.data import dicom as dicom_files  # noqa: E402
from client.data import nifti  # noqa: E402
from client.data.pixels import Window, usual_view, windowed  # noqa: E402

FORMATS = Path(__file__).parents[2] / "shared" / "data" / "formats"
real = pytest.mark.skipif(not FORMATS.is_dir(), reason="the original files are not beside this checkout")

RAMP = np.arange(32 * 48, dtype=np.int16).reshape(32, 48) - 500
WIDE = {"WindowCenter": 128, "WindowWidth": 256}  # of 8 bits: as they are


def only(path: Path, **options: Window) -> np.ndarray:
    return next(dicom_files.read_frames(path, [0], **options))


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("kind", ["int16", "uint8", "rgb", "frames"])
def test_what_was_compressed_without_loss_comes_back(tmp_path: Path, syntax: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    stored = {
        "int16": RAMP,
        "uint8": rng.integers(0, 256, (32, 48), dtype=np.uint8),
        "rgb": rng.integers(0, 256, (32, 48, 3), dtype=np.uint8),
        "frames": rng.integers(0, 4096, (5, 32, 48), dtype=np.uint16),
    }[kind]
    path = compressed(dicom(tmp_path / "plain", stored), syntax)
    assert kind_of(path) == "dicom"
    frames = [3, 1] if kind == "frames" else [0]
    read = list(dicom_files.read_values(path, frames))
    for frame, values in zip(frames, read, strict=True):
        np.testing.assert_array_equal(values, stored[frame] if kind == "frames" else stored)


def test_rescale_then_window_is_the_closed_form(tmp_path: Path) -> None:
    path = dicom(tmp_path / "ct", RAMP, RescaleSlope="2", RescaleIntercept="-24", WindowCenter="40", WindowWidth="400")
    units = RAMP * 2.0 - 24
    expected = np.clip((units - 39.5) / 399 + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    np.testing.assert_array_equal(only(path), np.rint(expected))
    assert only(path, window=Window(40, 10))[0, 0] == 0
    np.testing.assert_array_equal(only(path, window=Window(40, 400)), only(path))


@pytest.mark.parametrize("shape", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_are_those_of_pydicom(tmp_path: Path, shape: str) -> None:
    from pydicom.pixels import apply_modality_lut, apply_windowing

    values = (RAMP + 500).astype(np.uint16)
    own = {"WindowCenter": 600, "WindowWidth": 700, "VOILUTFunction": shape, "BitsStored": 12, "HighBit": 11}
    path = dicom(tmp_path / "film", values, **own, RescaleSlope=1, RescaleIntercept=0)
    dataset = pydicom.dcmread(path)
    other = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    assert np.abs(only(path) - other / 4095 * 255).max() <= 0.51


def test_a_lookup_table_goes_before_a_window(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.LUTData = np.array([65535 - 257 * value for value in range(256)], dtype="<u2").tobytes()
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = dicom(tmp_path / "lut", stored, VOILUTSequence=[table], WindowCenter=1, WindowWidth=2)
    np.testing.assert_array_equal(only(path), 255 - stored)


def test_monochrome1_is_inverted_and_padding_stays_black(tmp_path: Path) -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = dicom(tmp_path / "film", stored, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(only(path), 255 - stored)
    padded = RAMP.copy()
    padded[:, :4] = -2000
    path = dicom(tmp_path / "padded", padded, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1")
    assert only(path)[:, :4].max() == 0
    assert only(path)[0, 4] == 255, "the darkest value that was measured"


def test_without_a_window_one_hot_pixel_changes_nothing(tmp_path: Path) -> None:
    hot = RAMP.copy()
    hot[5, 5] = 32000
    quiet, loud = only(dicom(tmp_path / "a", RAMP)), only(dicom(tmp_path / "b", hot))
    assert np.abs(quiet.astype(int) - loud)[6:].max() <= 1
    flat = np.full((16, 16), 7, dtype=np.int16)
    assert len(np.unique(only(dicom(tmp_path / "flat", flat)))) == 1


def test_a_palette_gives_its_colours(tmp_path: Path) -> None:
    tables = {
        f"{colour}PaletteColorLookupTable{part}": value
        for colour, ramp in (("Red", range(256)), ("Green", [7] * 256), ("Blue", range(255, -1, -1)))
        for part, value in (
            ("Descriptor", [256, 0, 16]),
            ("Data", np.array([257 * v for v in ramp], dtype="<u2").tobytes()),
        )
    }
    stored = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = dicom(tmp_path / "palette", stored, PhotometricInterpretation="PALETTE COLOR", **tables)
    np.testing.assert_array_equal(only(path), np.stack([stored, stored * 0 + 7, 255 - stored], axis=2))


def test_ybr_becomes_rgb(tmp_path: Path) -> None:
    red = np.zeros((16, 16, 3), dtype=np.uint8)
    red[...] = (76, 85, 255)  # Y, Cb, Cr of pure red, ITU-R 601
    path = dicom(tmp_path / "ybr", red, PhotometricInterpretation="YBR_FULL")
    assert np.abs(only(path)[3, 3].astype(int) - (254, 0, 0)).max() <= 1


def test_facts_of_an_enhanced_image_are_found_for_each_frame(tmp_path: Path) -> None:
    def group(**sequences: dict[str, object]) -> object:
        holder = pydicom.Dataset()
        for name, values in sequences.items():
            item = pydicom.Dataset()
            for keyword, value in values.items():
                setattr(item, keyword, value)
            setattr(holder, name, [item])
        return holder

    shared = group(
        PixelMeasuresSequence={"PixelSpacing": [0.5, 0.25]},
        PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
    )
    each = [
        group(
            PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": 0},
            FrameVOILUTSequence={"WindowCenter": 500, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
            PlanePositionSequence={"ImagePositionPatient": [0, 0, 3]},
        )
        for slope in (1, 2)
    ]
    stored = np.full((2, 16, 16), 200, dtype=np.uint16)
    path = dicom(
        tmp_path / "many", stored, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=each
    )
    header = dicom_files.read_header(path)
    assert (header.frames, header.spacing, header.place) == (2, "0.5x0.25", 3.0)
    shades = [int(pixels[0, 0]) for pixels in dicom_files.read_frames(path, [0, 1])]
    assert shades == [round(0.2 * 255), round(0.4 * 255)]


PLANES = {"axial": ("L", "P"), "coronal": ("L", "F"), "sagittal": ("P", "F")}
COSINES = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "H": (0, 0, 1), "F": (0, 0, -1)}
OPPOSITE = dict(zip("LRPAHF", "RLAPFH", strict=True))


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("turn", range(8))
def test_however_it_was_stored_the_view_is_the_usual_one(tmp_path: Path, plane: str, turn: int) -> None:
    columns, rows = PLANES[plane]
    stored = RAMP
    if turn & 1:
        stored, columns = stored[:, ::-1], OPPOSITE[columns]
    if turn & 2:
        stored, rows = stored[::-1], OPPOSITE[rows]
    if turn & 4:
        stored, columns, rows = stored.T, rows, columns
    cosines = [*COSINES[columns], *COSINES[rows]]
    spacing = [0.25, 0.5] if turn & 4 else [0.5, 0.25]
    path = dicom(
        tmp_path / "slice", np.ascontiguousarray(stored), ImageOrientationPatient=cosines, PixelSpacing=spacing
    )
    np.testing.assert_array_equal(next(dicom_files.read_values(path, [0])), RAMP)
    assert dicom_files.read_header(path).spacing == "0.5x0.25"


def test_films_are_turned_by_their_words_and_mammograms_are_not(tmp_path: Path) -> None:
    for modality, expected in (("DX", RAMP[:, ::-1]), ("MG", RAMP)):
        path = dicom(tmp_path / modality, RAMP, Modality=modality, PatientOrientation=["R", "F"])
        np.testing.assert_array_equal(next(dicom_files.read_values(path, [0])), expected)
    np.testing.assert_array_equal(usual_view(RAMP, ""), RAMP)


def test_a_volume_is_the_same_slices_in_either_format(tmp_path: Path) -> None:
    """DICOM says where left, back and head are; NIfTI where right, front and head are."""
    volume = np.random.default_rng(1).integers(0, 256, (4, 20, 30), dtype=np.uint8)  # z up, y back, x left
    paths = [
        dicom(
            tmp_path / str(z),
            volume[z],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            ImagePositionPatient=[0, 0, 5 * z],
        )
        for z in range(4)
    ]
    places = [dicom_files.read_header(path).place for path in paths]
    assert places == [0, 5, 10, 15]
    for signs in ((-1, -1, 1), (1, -1, 1), (-1, 1, -1)):  # of the stored axes, in NIfTI's directions
        stored = volume.transpose(2, 1, 0)  # x left, y back, z up: signs -1, -1, 1
        flips = [axis for axis, sign in enumerate(signs) if sign != (-1, -1, 1)[axis]]
        image = nibabel.Nifti1Image(np.flip(stored, flips), np.diag([*np.multiply(signs, (1, 1, 5)), 1.0]))
        nibabel.save(image, tmp_path / "volume.nii.gz")
        header = nifti.read_header(tmp_path / "volume.nii.gz")
        assert (header.slices, header.axis, header.spacing) == (4, 2, "1x1")
        slices = nifti.read_slices(tmp_path / "volume.nii.gz", header)
        for z in range(4):
            np.testing.assert_array_equal(slices[z], only(paths[z]))


def test_a_volume_is_cut_as_the_scanner_cut_it(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.zeros((6, 30, 40), dtype=np.int16), np.diag([4, 1, 1, 1.0]))
    nibabel.save(image, tmp_path / "sagittal.nii")
    header = nifti.read_header(tmp_path / "sagittal.nii")
    assert (header.slices, header.axis) == (6, 0)
    assert nifti.read_slices(tmp_path / "sagittal.nii", header).shape == (6, 40, 30), "feet below, back to the right"


def test_a_mask_must_lie_where_its_image_lies(tmp_path: Path) -> None:
    values = np.zeros((8, 9, 10), dtype=np.float32)
    values[2, 3, 4] = 2
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "mask.nii")
    header = nifti.read_header(tmp_path / "mask.nii")
    mask = nifti.read_mask(tmp_path / "mask.nii", header)
    assert (mask.sum(), mask.max(), mask[4, 5, 5]) == (2, 2, 2), "rows from the front, columns from the right"
    shifted = nibabel.Nifti1Image(values, np.diag([1, 1, 2, 1.0]))
    nibabel.save(shifted, tmp_path / "shifted.nii")
    with pytest.raises(UnreadableImageError, match="affines differ"):
        nifti.read_mask(tmp_path / "shifted.nii", header)
    nibabel.save(nibabel.Nifti1Image(values / 3, np.eye(4)), tmp_path / "soft.nii")
    with pytest.raises(UnreadableImageError, match="no whole numbers"):
        nifti.read_mask(tmp_path / "soft.nii", header)


def truncated(path: Path) -> Path:
    cut = path.with_name(f"cut-{path.name}")
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return cut


def huge(folder: Path) -> Path:
    return dicom(folder / "huge", RAMP, Rows=65535, Columns=65535)


def endless(folder: Path) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8), dtype=np.int16), np.eye(4)), folder / "a.nii")
    content = bytearray((folder / "a.nii").read_bytes())
    struct.pack_into("<3h", content, 42, 32767, 32767, 32767)
    (folder / "endless.nii").write_bytes(content)
    return folder / "endless.nii"


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda folder: truncated(dicom(folder / "plain", RAMP)), "pixels are damaged"),
        (lambda folder: truncated(compressed(dicom(folder / "plain", RAMP), "jpeg-ls")), "pixels are damaged"),
        (huge, "65535x65535 pixels large"),
        (endless, "pixels large"),
        (lambda folder: dicom(folder / "seg", RAMP, Modality="SEG"), "a segmentation object, no picture"),
        (lambda folder: dicom(folder / "none", RAMP, Rows=0), "holds no picture"),
        (lambda folder: dicom(folder / "cine", np.stack([RAMP] * 3)), "holds 3 frames; `consilium-site data import`"),
    ],
    ids=["cut", "cut-jpeg-ls", "huge", "endless", "seg", "no-rows", "cine"],
)
def test_what_cannot_be_read_is_told_without_a_crash(
    tmp_path: Path, make: Callable[[Path], Path], problem: str
) -> None:
    with pytest.raises(UnreadableImageError, match=problem):
        read_image(make(tmp_path))


@pytest.mark.parametrize("kind", ["plain", "rle", "enhanced", "nifti"])
def test_a_file_with_flipped_bytes_is_read_or_told(tmp_path: Path, kind: str) -> None:
    item = pydicom.Dataset()
    item.PixelMeasuresSequence, item.FrameVOILUTSequence = [pydicom.Dataset()], [pydicom.Dataset()]
    item.PixelMeasuresSequence[0].PixelSpacing = [1, 1]
    item.FrameVOILUTSequence[0].WindowCenter, item.FrameVOILUTSequence[0].WindowWidth = 40, 400
    shared = {"SharedFunctionalGroupsSequence": [item]} if kind == "enhanced" else {}
    path = dicom(tmp_path / "plain", RAMP, WindowCenter=1, WindowWidth=2, PatientAge="044Y", RescaleSlope=1,
                 RescaleIntercept=0, NumberOfFrames=1, PixelPaddingValue=-500, **shared)  # fmt: skip
    path = compressed(path, "rle") if kind == "rle" else path
    if kind == "nifti":
        path = tmp_path / "a.nii"
        nibabel.save(nibabel.Nifti1Image(np.zeros((8, 9, 3), dtype=np.int16), np.eye(4)), path)
    whole, rng, told = path.read_bytes(), np.random.default_rng(5), 0
    for _ in range(150):
        content = bytearray(whole)
        for place in rng.integers(0 if kind == "nifti" else 132, min(len(content), 1600), 4):
            content[place] = rng.integers(0, 256)
        (tmp_path / "flipped").write_bytes(content)
        try:
            read_image(tmp_path / "flipped")
        except UnreadableImageError:
            told += 1
    assert told > 5


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dicom(tmp_path / "film", RAMP)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnreadableImageError, match=r"pip install 'consilium\[imaging\]'"):
        read_image(path)


def test_ages_are_years_and_none_is_above_ninety(tmp_path: Path) -> None:
    def age(**attributes: str) -> float:
        return dicom_files.read_header(dicom(tmp_path / "aged", RAMP, **attributes)).details.age

    assert [age(PatientAge=told) for told in ("063Y", "018M", "003W", "097Y")] == [63, 1, 0, 90]
    assert age(PatientBirthDate="19600315", StudyDate="20200314") == 59
    assert np.isnan(age(PatientBirthDate="1960", StudyDate="20200314"))


@real
@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "ExplVR_BigEnd.dcm", "siemens_mosaic_0.dcm",
             "decimal_rescale.dcm", "liver_1frame.dcm"]
)  # fmt: skip
def test_real_dicom_files_hold_what_gdcm_reads(name: str) -> None:
    other = by_gdcm(FORMATS / name)
    cosines = dicom_files.view_of(dicom_files.read_dataset(FORMATS / name, masks=True), 0)
    (read,) = dicom_files.read_values(FORMATS / name, [0])
    np.testing.assert_array_equal(read, usual_view(other[0], cosines))


@real
@pytest.mark.realdata
@pytest.mark.parametrize("name", ["JPEG2000.dcm", "examples_ybr_color.dcm"])
def test_real_compressed_files_hold_what_pillow_reads(name: str) -> None:
    """GDCM decodes them here; Pillow is the other reader. JPEG is not exact: decoders round."""
    from pydicom.pixels import pixel_array

    other = pixel_array(FORMATS / name, index=0, decoding_plugin="pillow")
    (read,) = dicom_files.read_values(FORMATS / name, [0])
    assert np.abs(read.astype(int) - other).max() <= (0 if name == "JPEG2000.dcm" else 3)


@real
@pytest.mark.realdata
def test_a_real_palette_has_the_colours_of_its_tables() -> None:
    """The indices are GDCM's; the tables are their bytes, 16 bits each, of which a screen shows the upper 8."""
    path = FORMATS / "examples_palette.dcm"
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    tables = [dataset[f"{colour}PaletteColorLookupTableData"].value for colour in ("Red", "Green", "Blue")]
    first = dataset.RedPaletteColorLookupTableDescriptor[1]
    colours = np.stack([np.frombuffer(table, dtype="<u2") >> 8 for table in tables], axis=1)
    np.testing.assert_array_equal(read_image(path), colours[by_gdcm(path)[0].astype(int) - first])


def by_hand(path: Path) -> np.ndarray:
    """The values of a NIfTI-1 file after its header's own words, (X, Y, Z[, T])."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    end = "<" if struct.unpack("<i", content[:4])[0] == 348 else ">"
    dimensions = struct.unpack(f"{end}8h", content[40:56])
    kind = {2: "u1", 4: "i2", 16: "f4", 512: "u2"}[struct.unpack(f"{end}h", content[70:72])[0]]
    offset, slope, intercept = struct.unpack(f"{end}3f", content[108:120])
    shape = dimensions[1 : 1 + dimensions[0]]
    stored = np.frombuffer(content, f"{end}{kind}", int(np.prod(shape)), int(offset)).reshape(shape, order="F")
    return stored * float(slope) + float(intercept) if slope not in (0, 1) and np.isfinite(slope) else stored


@real
@pytest.mark.realdata
@pytest.mark.parametrize(
    "name", ["hippocampus_001_image.nii.gz", "hippocampus_003_image.nii.gz", "someones_anatomy.nii.gz",
             "anatomical.nii"]
)  # fmt: skip
def test_real_nifti_files_hold_what_their_bytes_say(name: str) -> None:
    values = by_hand(FORMATS / name)
    header = nifti.read_header(FORMATS / name)
    read = nifti._slices(nifti._load(FORMATS / name), header.axis)
    diagonal = np.diag(header.affine)[:3]
    assert (np.abs(diagonal) > 0.8 * np.abs(header.affine[:3, :3]).sum(1)).all(), "its axes lie along the patient's"
    turned = np.flip(values, [axis for axis in range(3) if diagonal[axis] < 0])
    np.testing.assert_allclose(read, np.moveaxis(turned, 2, 0)[:, ::-1, ::-1].transpose(0, 2, 1), rtol=1e-6)


@real
@pytest.mark.realdata
def test_a_real_mask_lies_on_its_image() -> None:
    header = nifti.read_header(FORMATS / "hippocampus_001_image.nii.gz")
    mask = nifti.read_mask(FORMATS / "hippocampus_001_label.nii.gz", header)
    assert mask.shape == nifti.read_slices(FORMATS / "hippocampus_001_image.nii.gz", header).shape
    assert set(np.unique(mask)) == {0, 1, 2}
    with pytest.raises(UnreadableImageError):
        nifti.read_mask(FORMATS / "someones_anatomy.nii.gz", header)


def test_windows_clip_at_both_ends() -> None:
    values = np.array([-np.inf, 0.0])
    with pytest.raises(UnreadableImageError, match="NaN or infinite"):
        windowed(values, Window(0, 1))
    assert windowed(np.array([-9, -0.5, 0, 9]), Window(0, 1)).tolist() == [0, 0, 255, 255]
    assert Image.fromarray(windowed(np.zeros((2, 2)), Window(0, 2))).mode == "L"
