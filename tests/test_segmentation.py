"""Masks as DICOM segmentation objects and NIfTI volumes: what is written lies where the image lies, and comes back."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from client.adapted_model import AdaptedModel, Facts, Support
from client.data.imports import import_images
from client.data.pixels import stored_view, usual_view
from client.data.readers import UnreadableImageError, read_image
from client.masks import NOT_ANSWERED
from client.predict import ANSWERED, UNSURE, predict
from client.question import own_question
from common.models import build_model, parameters
from common.starting_point import outputs_of
from tests.scans import dicom
from tests.test_adaptation import plan_of

highdicom = pytest.importorskip("highdicom", reason="the extra 'imaging' is not installed")
nibabel = pytest.importorskip("nibabel", reason="the extra 'imaging' is not installed")
pydicom = pytest.importorskip("pydicom", reason="the extra 'imaging' is not installed")

from client.data import segmentation  # noqa: E402

RNG = np.random.default_rng(3)
GREY = np.full((16, 16), 127, dtype=np.uint8)  # of which the model below is not sure
ORIENTATIONS = {
    "axial": [1, 0, 0, 0, 1, 0],
    "axial, head first": [-1, 0, 0, 0, -1, 0],
    "sagittal": [0, 1, 0, 0, 0, -1],
    "coronal, turned": [0, 0, -1, 1, 0, 0],
}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> AdaptedModel:
    """Finds what is bright, and is sure of black and white alone."""
    task = {"kind": "segmentation", "image_size": 16, "label_sets": {"it": ["background", "bright"]}}
    plan = plan_of(task=task, model={"name": "unet", "width": 8}, sites={"alder": {"labels": "it", "patients": 10}})
    plan = own_question(plan, "willow", labels="it", own=())
    params = parameters(build_model(plan.model, plan.task, ways=outputs_of(plan, "willow")))
    facts = Facts.model_construct(
        site="willow", kind="segmentation", label_names=["background", "bright"], image_size=16, channels=1,
        temperature=0.1, least_confidence=0.9, usual_distance=None, version="0.1.0", model="ab" * 32,
    )  # fmt: skip
    support = Support(torch.zeros(1, 1, 16, 16), torch.zeros(1, 16, 16), torch.zeros(1, 8), torch.zeros(0))

    def bright(self: AdaptedModel, learner: object, inputs: Tensor) -> Tensor:
        return torch.cat([-inputs, inputs], dim=1)

    monkeypatch.setattr(AdaptedModel, "answers", bright)
    return AdaptedModel(facts, plan, params, support)


def spots(*shape: int) -> np.ndarray:
    return (RNG.random(shape) > 0.7).astype(np.uint8) * 255


def series(folder: Path, cosines: list[int], count: int = 3, **attributes: Any) -> dict[str, np.ndarray]:
    """SOP instance UID -> stored pixels of each file; `IM2` is grey."""
    across, stored = np.cross(cosines[:3], cosines[3:]), {}
    for place in range(count):
        pixels = GREY if place == 2 else spots(16, 16)
        path = dicom(folder / f"IM{place}", pixels, ImageOrientationPatient=cosines, PixelSpacing=[0.5, 0.7],
                     ImagePositionPatient=[float(x) for x in 2 * place * across], SliceThickness=2,
                     FrameOfReferenceUID="1.2.3.9", **attributes)  # fmt: skip
        stored[str(pydicom.dcmread(path).SOPInstanceUID)] = pixels
    return stored


def asked(source: Path, model: AdaptedModel, out: Path) -> list[dict[str, str]]:
    predict(source, model, out, modality=None, least=None, overlays=False)
    return list(csv.DictReader((out / "predictions.csv").open()))


def frames_by_image(path: Path) -> dict[str, np.ndarray]:
    """As pydicom alone reads a segmentation object: SOP instance UID -> bool (H, W)."""
    found = pydicom.dcmread(path)
    planes = found.pixel_array.reshape(-1, found.Rows, found.Columns)
    groups = found.PerFrameFunctionalGroupsSequence
    names = [g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID for g in groups]
    return dict(zip(map(str, names), planes > 0, strict=True))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_series_has_one_object_that_lies_on_its_images(tmp_path: Path, model: AdaptedModel, orientation: str) -> None:
    stored = series(tmp_path / "in", ORIENTATIONS[orientation], PatientBirthDate="19530607")
    rows = asked(tmp_path / "in", model, tmp_path / "out")
    assert [row["status"] for row in rows] == [ANSWERED, ANSWERED, UNSURE]
    assert [bool(row["mask"]) for row in rows] == [True, True, False], "a mask is an answer"
    (name,) = {row["whole mask"] for row in rows[:2]}
    assert rows[2]["whole mask"] == ""
    found = frames_by_image(tmp_path / "out" / name)
    assert found.keys() == set(list(stored)[:2]), "what is not answered is not in it"
    for uid, pixels in found.items():
        np.testing.assert_array_equal(pixels, stored[uid] > 127)
    whole = pydicom.dcmread(tmp_path / "out" / name)
    first = pydicom.dcmread(tmp_path / "in" / "IM0")
    shared, each = whole.SharedFunctionalGroupsSequence[0], whole.PerFrameFunctionalGroupsSequence
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == first.ImageOrientationPatient
    assert shared.PixelMeasuresSequence[0].PixelSpacing == first.PixelSpacing
    places = {tuple(frame.PlanePositionSequence[0].ImagePositionPatient) for frame in each}
    assert places == {tuple(pydicom.dcmread(tmp_path / "in" / f"IM{i}").ImagePositionPatient) for i in (0, 1)}
    assert (whole.PatientBirthDate, whole.StudyInstanceUID) == ("19530607", first.StudyInstanceUID)
    assert whole.SeriesInstanceUID != first.SeriesInstanceUID
    assert (whole.SegmentSequence[0].SegmentLabel, len(whole.SegmentSequence)) == ("bright", 1)
    assert "Not a medical device" in whole.ContentDescription


def test_a_film_without_a_place_in_space_has_an_object_of_its_own(tmp_path: Path, model: AdaptedModel) -> None:
    pixels = spots(16, 16)
    for name, spacing in (("a", {}), ("b", {"PixelSpacing": [0.1, 0.1]})):
        dicom(tmp_path / "in" / name, pixels, **spacing)
    rows = asked(tmp_path / "in", model, tmp_path / "out")
    assert len({row["whole mask"] for row in rows}) == 2
    for row in rows:
        (found,) = frames_by_image(tmp_path / "out" / row["whole mask"]).values()
        np.testing.assert_array_equal(found, pixels > 127)
        highdicom.seg.segread(tmp_path / "out" / row["whole mask"])


def enhanced(path: Path, pixels: np.ndarray) -> Path:
    frames = []
    for place in range(len(pixels)):
        group = pydicom.Dataset()
        group.PlanePositionSequence = [pydicom.Dataset()]
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 3 * place]
        frames.append(group)
    shared = pydicom.Dataset()
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [pydicom.Dataset()], [pydicom.Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence[0].PixelSpacing, shared.PixelMeasuresSequence[0].SliceThickness = [1, 1], 3
    return dicom(path, pixels, SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1", SharedFunctionalGroupsSequence=[shared],
                 PerFrameFunctionalGroupsSequence=frames, FrameOfReferenceUID="1.2.3.9")  # fmt: skip


def test_an_object_that_does_not_come_back_is_not_left_behind(
    tmp_path: Path, model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    series(tmp_path / "in", ORIENTATIONS["sagittal"], count=1)
    monkeypatch.setattr(segmentation, "stored_view", lambda pixels, directions: pixels[::-1])
    done = predict(tmp_path / "in", model, tmp_path / "out", modality=None, least=None, overlays=False)
    assert [problem.what for problem in done.problems] == [
        "no DICOM SEG could be made of it (what was written does not come back)"
    ]
    assert not list((tmp_path / "out").rglob("*.dcm"))


def test_frames_of_a_film_are_named_by_their_numbers(tmp_path: Path, model: AdaptedModel) -> None:
    pixels = np.stack([spots(16, 16), GREY, spots(16, 16), np.zeros((16, 16), dtype=np.uint8)])
    enhanced(tmp_path / "in" / "film", pixels)
    rows = asked(tmp_path / "in", model, tmp_path / "out")
    assert [row["image"] for row in rows] == ["film#0", "film#1", "film#2", "film#3"]
    whole = pydicom.dcmread(tmp_path / "out" / rows[0]["whole mask"])
    numbers = [int(g.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber)
               for g in whole.PerFrameFunctionalGroupsSequence]  # fmt: skip
    assert sorted(numbers) == [1, 3, 4], "frame 2 was not answered; 4 was: there is nothing"
    for number, found in zip(numbers, whole.pixel_array, strict=True):
        np.testing.assert_array_equal(found > 0, pixels[number - 1] > 127)


def test_a_file_of_which_no_object_can_be_made_keeps_its_masks(tmp_path: Path, model: AdaptedModel) -> None:
    dicom(tmp_path / "in" / "cine", np.stack([spots(16, 16)] * 2))  # frames without a place in space
    done = predict(tmp_path / "in", model, tmp_path / "out", modality=None, least=None, overlays=False)
    assert done.counts[ANSWERED] == 2
    (problem,) = done.problems
    assert problem.what == "no DICOM SEG could be made of it (its frames have no place in space)"
    assert len(list((tmp_path / "out" / "masks").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "affine",
    [np.diag([1, 1, 2.5, 1]), np.array([[0, 0, -2.0, 9], [-1, 0, 0, 5], [0, 1, 0, 3], [0, 0, 0, 1]])],
    ids=["axial", "turned"],
)
def test_a_volumes_mask_has_its_shape_and_affine(tmp_path: Path, model: AdaptedModel, affine: np.ndarray) -> None:
    values = spots(16, 16, 4)
    values[..., 1] = 127
    image = nibabel.Nifti1Image(values, affine)
    image.header["descrip"] = b"Zebulon Quirke"
    (tmp_path / "in").mkdir()
    nibabel.save(image, tmp_path / "in" / "brain.nii.gz")
    rows = asked(tmp_path / "in", model, tmp_path / "out")
    assert [row["status"] for row in rows].count(UNSURE) == 1
    (name,) = {row["whole mask"] for row in rows} - {""}
    mask = nibabel.load(tmp_path / "out" / name)
    np.testing.assert_allclose(mask.affine, affine)
    expected = (values > 127).astype(np.uint8)
    expected[..., 1] = NOT_ANSWERED
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), expected)
    assert b"Quirke" not in bytes(mask.header.binaryblock)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "site.yaml").write_text("name: alder\nmanifest: manifest.csv\nbudget: {epsilon: 10, delta: 0.001}\n")
    return folder


def rows_of(site: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((site / "manifest.csv").open()))


def test_objects_come_in_as_the_masks_of_the_images_that_they_name(
    tmp_path: Path, model: AdaptedModel, site: Path
) -> None:
    series(tmp_path / "in" / "a", ORIENTATIONS["coronal, turned"], count=2, SeriesInstanceUID="1.8")
    enhanced(tmp_path / "in" / "film", np.stack([spots(16, 16), spots(16, 16)]))
    asked(tmp_path / "in", model, tmp_path / "out")
    for path in (tmp_path / "out" / "masks").glob("*.dcm"):
        path.rename(tmp_path / "in" / path.name)
    done = import_images(tmp_path / "in", site, processes=1)
    assert (done.images, done.left_out) == (4, ())
    for row in rows_of(site):
        np.testing.assert_array_equal(read_image(site / row["mask"]) > 0, read_image(site / row["path"]) > 127)


def made(model: AdaptedModel, folder: Path) -> Path:
    """An object beside the two images of a series in `folder`."""
    series(folder, ORIENTATIONS["axial"], count=2)
    rows = asked(folder, model, folder.parent / "out")
    return (folder.parent / "out" / rows[0]["whole mask"]).rename(folder / "object")


def changed(path: Path, **attributes: Any) -> Path:
    dataset = pydicom.dcmread(path)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def test_two_objects_of_an_image_are_told(tmp_path: Path, model: AdaptedModel, site: Path) -> None:
    first = made(model, tmp_path / "in")
    (tmp_path / "in" / "second").write_bytes(first.read_bytes())
    series(tmp_path / "in" / "other", ORIENTATIONS["sagittal"], count=1, SeriesInstanceUID="1.7")
    done = import_images(tmp_path / "in", site, processes=1)
    assert (done.images, [row["mask"] for row in rows_of(site)]) == (1, [""])
    assert [problem.what for problem in done.left_out] == ["2 segmentation objects are of it"] * 2


def test_an_object_without_its_images_is_told(tmp_path: Path, model: AdaptedModel, site: Path) -> None:
    path = made(model, tmp_path / "in")
    series(tmp_path / "new", ORIENTATIONS["axial"], count=1)
    path.rename(tmp_path / "new" / "object")
    done = import_images(tmp_path / "new", site, processes=1)
    assert [problem.what for problem in done.left_out] == ["no image that it is of is here"]
    with pytest.raises(UnreadableImageError, match="of other images"):
        segmentation.read_masks(tmp_path / "new" / "object", tmp_path / "new" / "IM0")


def test_an_object_that_was_drawn_elsewhere_is_refused(tmp_path: Path, model: AdaptedModel) -> None:
    path = made(model, tmp_path / "in")
    assert segmentation.read_masks(path, tmp_path / "in" / "IM0")[0].shape == (16, 16)
    changed(tmp_path / "in" / "IM0", ImageOrientationPatient=[0, 1, 0, 1, 0, 0])
    with pytest.raises(UnreadableImageError, match="on other pixels"):
        segmentation.read_masks(path, tmp_path / "in" / "IM0")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UnreadableImageError, match="is damaged"):
        segmentation.read_masks(path, tmp_path / "in" / "IM1")


@pytest.mark.parametrize("first", "LRAPHF")
@pytest.mark.parametrize("second", "LRAPHFX")
def test_the_stored_view_undoes_the_usual_one(first: str, second: str) -> None:
    pixels = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(stored_view(usual_view(pixels, first + second), first + second), pixels)
