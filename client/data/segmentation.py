"""DICOM segmentation objects (PS3.3 A.51), in and out, by highdicom: masks that name the images they are of.

A mask is bound to its image by SOP instance UID and, in a film, frame number; never by the order of files. Values are
the numbers of segments; where two overlap, there is no mask. Needs the extra `imaging`.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from highdicom.seg import Segmentation, SegmentDescription
from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.sr.codedict import codes

from client.data import dicom
from client.data.pixels import stored_view, usual_view
from client.data.readers import UnreadableImageError
from common.errors import Problem

logging.getLogger("highdicom").setLevel(logging.CRITICAL)  # its warnings quote the header

_SCHEME = "99CONSILIUM"  # a hospital's own labels have no code in SNOMED
_COSINES = 1e-3  # how much directions may differ
_NEEDED = (  # may be empty, and highdicom asks for them (PS3.3 C.7.1.1, C.7.2.1)
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
)


@dataclass(frozen=True)
class Maker:
    """Who says so, for the object's header."""

    labels: tuple[str, ...]  # of the segments 1, 2, ...
    version: str
    model: str  # SHA-256


@dataclass(frozen=True)
class Masked:
    """What was found in one frame of a file."""

    path: Path
    frame: int  # from 0
    mask: Path  # PNG uint8 (H, W) in the usual view, values 0 ... segments


def marked_images(path: Path) -> frozenset[str]:
    """SOP instance UIDs of the images that a segmentation object is of; none for any other file."""
    return _references(path, path.stat().st_mtime_ns) if path.is_file() else frozenset()


def read_masks(path: Path, source: Path) -> list[np.ndarray]:
    """uint8 (H, W) for each frame of the image `source`, in the usual view: the number of the segment, 0 for none.

    Raises UnreadableImageError if the object at `path` is of other images or lies elsewhere, or segments overlap.
    """
    image = dicom.read_dataset(source)
    uid, frames = str(image.get("SOPInstanceUID") or ""), dicom.frames_of(image)
    if uid not in marked_images(path):
        raise UnreadableImageError("the segmentation object is of other images")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _opened(path, path.stat().st_mtime_ns)
            _require_same_place(found, image)
            how: dict[str, Any] = {"combine_segments": True, "dtype": np.uint8}
            how |= {"ignore_spatial_locations": True, "assert_missing_frames_are_empty": True}
            if frames > 1:
                planes = found.get_pixels_by_source_frame(uid, range(1, frames + 1), **how)
            else:
                planes = found.get_pixels_by_source_instance([uid], **how)
    except UnreadableImageError:
        raise
    except Exception:  # highdicom raises whatever it likes
        what = "its segments overlap or are fractional, or the object is damaged"
        raise UnreadableImageError(what) from None
    return [usual_view(plane, dicom.view_of(image, frame)) for frame, plane in enumerate(planes)]


def write_segmentations(found: Sequence[Masked], out: Path, maker: Maker) -> Iterator[tuple[Path | Problem, set[Path]]]:
    """One object for each series and orientation, in the folder `out`, with every image that is asked for, also where
    nothing was found in it; yields its path, or why there is none, and the images' files. Each is read again.

    Patient and study are those of the source, as DICOM wants it: an object stays in the hospital like its images.
    """
    groups = defaultdict[tuple[str, ...], list[Masked]](list)
    for masked in found:
        groups[_series(masked.path)].append(masked)
    for number, group in enumerate(groups.values(), start=1):
        paths, path = {masked.path for masked in group}, out / f"segmentation-{number:04d}.dcm"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _without_lone_measures(_segmentation(group, maker, number)).save_as(path, enforce_file_format=True)
            _require_same_masks(path, group)
        except OSError:
            raise
        except Exception as error:  # a header that lacks what the standard asks for fails anywhere in highdicom
            path.unlink(missing_ok=True)
            told = str(error) if isinstance(error, UnreadableImageError) else type(error).__name__
            what = f"no DICOM SEG could be made of it ({told})"
            yield Problem(str(group[0].path), what, "its masks are there as PNG"), paths
        else:
            yield path, paths


def _segmentation(group: Sequence[Masked], maker: Maker, number: int) -> Segmentation:
    """Raises whatever highdicom does."""
    images = {masked.path: _complete(dicom.read_dataset(masked.path)) for masked in group}
    planes = [
        stored_view(np.asarray(Image.open(masked.mask)), dicom.view_of(images[masked.path], masked.frame))
        for masked in group
    ]
    first = images[group[0].path]
    each, places = first.get("PerFrameFunctionalGroupsSequence"), None
    if dicom.frames_of(first) > 1 and not each:
        raise UnreadableImageError("its frames have no place in space")
    if each and len(each) > len(group):  # of a film in which not every frame was answered
        places = [_position(each[masked.frame]) for masked in group]
    return Segmentation(
        source_images=list(images.values()),
        pixel_array=np.stack(planes),
        segmentation_type="BINARY",
        segment_descriptions=[_segment(index, label, maker) for index, label in enumerate(maker.labels, start=1)],
        series_instance_uid=highdicom.UID(),
        series_number=9000 + number,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="Consilium",
        manufacturer_model_name="consilium-site predict",
        software_versions=maker.version,
        device_serial_number=maker.model[:64],
        content_description="Found by a program. Not a medical device.",
        series_description="Consilium masks, NOT A MEDICAL DEVICE",
        omit_empty_frames=False,  # an image without a finding differs from one without an answer
        plane_positions=places,
    )


def _without_lone_measures(found: Segmentation) -> Segmentation:
    """An object of an image without a place in space lies on the pixels that it names; highdicom notes a spacing
    without a slice thickness there, and then cannot read it."""
    shared = found.SharedFunctionalGroupsSequence[0]
    if "PixelMeasuresSequence" in shared and "PlaneOrientationSequence" not in shared:
        del shared.PixelMeasuresSequence
    return found


def _require_same_masks(path: Path, group: Sequence[Masked]) -> None:
    """Raise UnreadableImageError if what was written is not what comes back."""
    for masked in group:
        if not np.array_equal(read_masks(path, masked.path)[masked.frame], np.asarray(Image.open(masked.mask))):
            raise UnreadableImageError("what was written does not come back")


def _segment(number: int, label: str, maker: Maker) -> SegmentDescription:
    family = highdicom.AlgorithmIdentificationSequence(
        name="Consilium adapted model", family=codes.DCM.ArtificialIntelligence, version=maker.version
    )
    return SegmentDescription(
        segment_number=number,
        segment_label=label[:64],
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=highdicom.sr.CodedConcept(f"segment-{number}", _SCHEME, label[:64]),
        algorithm_type="AUTOMATIC",
        algorithm_identification=family,
    )


def _series(path: Path) -> tuple[str, ...]:
    """What images must share to be of one object; those without a place in space, and films, stand alone."""
    image = dicom.read_dataset(path)
    place = [image.get(name) for name in ("FrameOfReferenceUID", "ImageOrientationPatient", "ImagePositionPatient")]
    if not all(place) or dicom.frames_of(image) > 1:
        return (str(path),)
    cosines = (f"{float(cosine):.3f}" for cosine in place[1])
    same = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns")
    return (*(str(image.get(name)) for name in same), *cosines)


def _complete(image: Dataset) -> Dataset:
    for name in _NEEDED:
        if name not in image:
            setattr(image, name, "")
    return image


def _position(groups: Dataset) -> highdicom.PlanePositionSequence:
    place = groups.PlanePositionSequence[0].ImagePositionPatient
    return highdicom.PlanePositionSequence("PATIENT", [float(number) for number in place])


@lru_cache(maxsize=64)
def _references(path: Path, changed: int) -> frozenset[str]:
    try:
        dataset = dcmread(path, stop_before_pixels=True, force=True)
        if dataset.get("Modality") != "SEG":
            return frozenset()
        listed = [item for series in _items(dataset, "ReferencedSeriesSequence")
                  for item in _items(series, "ReferencedInstanceSequence")]  # fmt: skip
        listed += [item for frame in _frame_groups(dataset) for derived in _items(frame, "DerivationImageSequence")
                   for item in _items(derived, "SourceImageSequence")]  # fmt: skip
        return frozenset(str(item.ReferencedSOPInstanceUID) for item in listed)
    except Exception:  # damaged: then it is of nothing
        return frozenset()


@lru_cache(maxsize=1)  # the images of one series come one after the other
def _opened(path: Path, changed: int) -> Segmentation:
    return highdicom.seg.segread(path)


def _require_same_place(found: Dataset, image: Dataset) -> None:
    """Raise UnreadableImageError if the object was drawn on other pixels than the image's."""
    own, groups = dicom.cosines_of(image), _frame_groups(found)
    told = [item.ImageOrientationPatient for group in groups for item in _items(group, "PlaneOrientationSequence")]
    turned = own is not None and any(np.abs(np.array(each, dtype=float) - own).max() > _COSINES for each in told)
    if turned or (found.Rows, found.Columns) != (image.Rows, image.Columns):
        raise UnreadableImageError("the segmentation object was drawn on other pixels than its image's")


def _frame_groups(dataset: Dataset) -> list[Dataset]:
    return [*_items(dataset, "SharedFunctionalGroupsSequence"), *_items(dataset, "PerFrameFunctionalGroupsSequence")]


def _items(dataset: Dataset, name: str) -> list[Dataset]:
    return list(dataset.get(name) or [])
