"""DICOM images to 8-bit pixels as a radiologist sees them, and the few facts of a header that a site may keep.

Stored values -> rescale or modality LUT -> window or VOI LUT -> inverted if MONOCHROME1 -> turned to the usual view
(PS3.3 C.7.6.3.1.2, C.11.1, C.11.2). Needs the extra `imaging`: pydicom reads, GDCM decodes JPEG, JPEG-LS and JPEG 2000.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset, config, dcmread
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import iter_pixels

from client.data.pixels import Window, one_image_at_most, refuse_huge, robust_window, usual_view, windowed
from client.data.readers import UnreadableImageError
from client.data.rows import Details

config.settings.reading_validation_mode = config.IGNORE  # its warnings quote the header on the terminal
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

# Groups of an enhanced multi-frame image that hold what a single-frame one has at its top (PS3.3 C.7.6.16).
_FUNCTIONAL_GROUPS = (
    "PixelMeasuresSequence",
    "PlaneOrientationSequence",
    "PlanePositionSequence",
    "PixelValueTransformationSequence",
    "FrameVOILUTSequence",
)
_NO_PICTURES = {"SEG": "a segmentation object", "RTSTRUCT": "a structure set", "RTDOSE": "a dose grid"}
_FILMS = ("CR", "DX", "RG")  # of other pictures PatientOrientation turns too much: a mammogram's views differ by it
_AXES = {"L": 0, "R": 0, "P": 1, "A": 1, "H": 2, "F": 2}
_OLDEST = 90  # years; older patients are so few that their age names them (HIPAA 164.514(b)(2))
_DAYS = {"D": 365.25, "W": 52.18, "M": 12.0, "Y": 1.0}  # units of PatientAge in a year


@dataclass(frozen=True, slots=True)
class Header:
    """What an import needs to know before it decodes; identifiers as the file has them, "" where it has none."""

    patient: str
    study: str
    series: str
    image: str  # SOPInstanceUID
    frames: int
    place: float  # mm along the patient's axis that the slice is cut across; nan if it is no slice
    details: Details
    spacing: str  # mm between rows x columns of the usual view, "0.7x0.7"; "" if unknown
    burnt_in: bool  # says that a text was drawn into the pixels


def read_header(path: Path) -> Header:
    """Raises UnreadableImageError if the file is damaged or holds no picture."""
    dataset = read_dataset(path)
    try:
        return _header(dataset)
    except Exception:  # values that their types do not allow
        raise UnreadableImageError("the DICOM file is damaged") from None


def _header(dataset: Dataset) -> Header:
    first = _of_frame(dataset, 0)
    return Header(
        patient=_text(dataset, "PatientID"),
        study=_text(dataset, "StudyInstanceUID"),
        series=_text(dataset, "SeriesInstanceUID"),
        image=_text(dataset, "SOPInstanceUID"),
        frames=frames_of(dataset),
        place=_place(first),
        details=_details(dataset),
        spacing=_spacing(first),
        burnt_in=_text(dataset, "BurnedInAnnotation").upper() == "YES",
    )


def read_frames(path: Path, frames: Sequence[int], window: Window | None = None) -> Iterator[np.ndarray]:
    """uint8 (H, W) or (H, W, 3) of each of `frames` (from 0), one at a time in memory; `window` replaces the file's.

    Raises UnreadableImageError.
    """
    dataset = read_dataset(path)
    for frame, stored in zip(frames, _decoded(path, frames), strict=True):
        try:
            facts = _of_frame(dataset, frame)
            shown = usual_view(_shown(stored, facts, window), _directions(facts))
        except UnreadableImageError:
            raise
        except Exception:  # lookup tables and windows of damaged files fail in any way
            raise UnreadableImageError("its window or lookup table is damaged") from None
        yield shown


def read_values(path: Path, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """The stored values of each of `frames` in the usual view: for masks, whose values are names.

    Raises UnreadableImageError.
    """
    dataset = read_dataset(path, masks=True)
    for frame, stored in zip(frames, _decoded(path, frames), strict=True):
        yield usual_view(stored, view_of(dataset, frame))


def count_frames(path: Path) -> int:
    """Of any file with pixels, also a mask. Raises UnreadableImageError."""
    try:
        return frames_of(read_dataset(path, masks=True))
    except (TypeError, ValueError):
        raise UnreadableImageError("the DICOM file is damaged") from None


def view_of(dataset: Dataset, frame: int) -> str:
    """Where columns and rows of a frame lead, for `pixels.usual_view`."""
    return _directions(_of_frame(dataset, frame))


def cosines_of(dataset: Dataset) -> np.ndarray | None:
    """(6,) Directions of the first frame's rows and columns; None if they are not known."""
    return _cosines(_of_frame(dataset, 0))


def read_image(path: Path) -> np.ndarray:
    """The only frame of a file. Raises UnreadableImageError."""
    one_image_at_most(read_header(path).frames, "frames")
    return next(read_frames(path, [0]))


def read_dataset(path: Path, *, masks: bool = False) -> Dataset:
    """The header; of a segmentation object only with `masks`. Raises UnreadableImageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they quote what no terminal should show
            dataset = dcmread(path, stop_before_pixels=True, force=True)
            rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    except FileNotFoundError:
        raise UnreadableImageError("there is no such file") from None
    except Exception:
        raise UnreadableImageError("the DICOM file is damaged") from None
    modality = _text(dataset, "Modality")
    if modality in _NO_PICTURES and not masks:
        raise UnreadableImageError(f"it is {_NO_PICTURES[modality]}, no picture")
    if rows < 1 or columns < 1:
        raise UnreadableImageError("the DICOM file holds no picture")
    refuse_huge(rows, columns)
    return dataset


def _decoded(path: Path, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames as stored, YBR turned to RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from iter_pixels(path, indices=list(frames))
    except UnreadableImageError:
        raise
    except Exception:  # decoders raise whatever they like
        raise UnreadableImageError("its pixels are damaged, missing, or of a kind that is not decoded") from None


def _shown(stored: np.ndarray, facts: Dataset, window: Window | None) -> np.ndarray:
    """uint8 of one frame."""
    if facts.PhotometricInterpretation == "PALETTE COLOR":
        coloured = apply_color_lut(stored, facts)
        return _eight_bits(coloured, 8 * coloured.dtype.itemsize)
    if stored.ndim == 3:
        return _eight_bits(stored, int(facts.BitsStored))
    values = apply_modality_lut(stored, facts)
    values = stored if np.array_equal(values, stored) else values  # a rescale by 1 makes them no less whole
    known = _not_padding(stored, facts)
    shown = _in_grey(values, values[known], facts, window)
    if facts.PhotometricInterpretation == "MONOCHROME1":
        shown = 255 - shown
    black: np.ndarray = np.where(known, shown, 0).astype(np.uint8)
    return black


def _in_grey(values: np.ndarray, known: np.ndarray, facts: Dataset, window: Window | None) -> np.ndarray:
    """uint8: by `window`, or the file's VOI LUT, or its window; else eight bits as they are, deeper ones by a range."""
    if window is not None:
        return windowed(values, window)
    if facts.get("VOILUTSequence"):
        looked_up = apply_voi(np.rint(values).astype(np.int64), facts)
        highest = 2 ** int(facts.VOILUTSequence[0].LUTDescriptor[2]) - 1
        found: np.ndarray = np.rint(np.clip(looked_up / highest, 0, 1) * 255).astype(np.uint8)
        return found
    own = _own_window(facts)
    if own is not None:
        return windowed(values, own)
    bits = int(facts.BitsStored) if "BitsStored" in facts else 16
    if bits <= 8 and values.dtype.kind == "u":
        spread: np.ndarray = np.rint(values * (255 / (2**bits - 1))).astype(np.uint8)
        return spread
    return windowed(values, robust_window(known))


def _own_window(facts: Dataset) -> Window | None:
    """The file's first window, if it has one that means something."""
    centre, width = _first_number(facts, "WindowCenter"), _first_number(facts, "WindowWidth")
    shape = _text(facts, "VOILUTFunction").upper() or "LINEAR"
    if shape not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or not math.isfinite(centre + width):
        return None
    return Window(centre, width, shape) if width >= 1 or (width > 0 and shape != "LINEAR") else None


def _not_padding(stored: np.ndarray, facts: Dataset) -> np.ndarray:
    """bool (H, W): where the scanner measured something."""
    padding = facts.get("PixelPaddingValue")
    if not isinstance(padding, int):
        return np.ones(stored.shape, dtype=bool)
    limit = facts.get("PixelPaddingRangeLimit", padding)
    low, high = sorted((padding, limit if isinstance(limit, int) else padding))
    known = (stored < low) | (stored > high)
    return known if known.any() else np.ones(stored.shape, dtype=bool)


def _eight_bits(colours: np.ndarray, bits: int) -> np.ndarray:
    shifted: np.ndarray = (colours >> max(0, bits - 8)).astype(np.uint8)
    return shifted


def _of_frame(dataset: Dataset, frame: int) -> Dataset:
    """The header as a single-frame image of this frame would have it."""
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*shared[:1], *each[frame : frame + 1]]
    if not groups:
        return dataset
    facts = Dataset()
    facts.update({element.tag: element for element in dataset if element.VR != "SQ" or "LUT" in element.keyword})
    for group in groups:
        for name in _FUNCTIONAL_GROUPS:
            for item in group.get(name) or []:
                facts.update({element.tag: element for element in item})
    return facts


def frames_of(dataset: Dataset) -> int:
    """How many images it holds."""
    return max(1, int(dataset.get("NumberOfFrames") or 1))


def _directions(facts: Dataset) -> str:
    """Where columns and rows lead, as "LP": to the patient's left, and to the back; "" if it is not known."""
    cosines = _cosines(facts)
    if cosines is not None:
        return _letter(cosines[:3]) + _letter(cosines[3:])
    told = facts.get("PatientOrientation")
    if _text(facts, "Modality") in _FILMS and isinstance(told, Sequence) and len(told) == 2:
        return "".join(str(direction)[:1] for direction in told)
    return ""


def _letter(direction: np.ndarray) -> str:
    axis = int(np.abs(direction).argmax())
    return "LPH"[axis] if direction[axis] > 0 else "RAF"[axis]


def _place(facts: Dataset) -> float:
    cosines, position = _cosines(facts), _numbers(facts, "ImagePositionPatient", 3)
    if cosines is None or position is None:
        return math.nan
    across = np.cross(cosines[:3], cosines[3:])
    upwards = 1 if _letter(across) in "RAH" else -1
    return float(across @ position) * upwards


def _cosines(facts: Dataset) -> np.ndarray | None:
    return _numbers(facts, "ImageOrientationPatient", 6)


def _spacing(facts: Dataset) -> str:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        between = _numbers(facts, name, 2)
        if between is not None and (between > 0).all():
            directions = _directions(facts)
            turned = len(directions) == 2 and _AXES.get(directions[0], 0) > _AXES.get(directions[1], 3)
            rows, columns = between[::-1] if turned else between
            return f"{rows:g}x{columns:g}"
    return ""


def _details(dataset: Dataset) -> Details:
    maker = " ".join(f"{_text(dataset, 'Manufacturer')} {_text(dataset, 'ManufacturerModelName')}".split())
    sex = _text(dataset, "PatientSex").upper()
    return Details(_text(dataset, "Modality"), _age(dataset), sex if sex in ("F", "M", "O") else "", maker)


def _age(dataset: Dataset) -> float:
    """Whole years, nan where unknown."""
    told = re.fullmatch(r"(\d{3})([DWMY])", _text(dataset, "PatientAge"))
    if told:
        return float(min(_OLDEST, int(int(told[1]) / _DAYS[told[2]])))
    born, seen = _date(dataset, "PatientBirthDate"), _date(dataset, "StudyDate")
    if born is None or seen is None or seen < born:
        return math.nan
    return float(min(_OLDEST, seen.year - born.year - ((seen.month, seen.day) < (born.month, born.day))))


def _date(dataset: Dataset, name: str) -> date | None:
    told = re.fullmatch(r"(\d{4})(\d{2})(\d{2})", _text(dataset, name))
    try:
        return date(*(int(part) for part in told.groups())) if told else None
    except ValueError:
        return None


def _first_number(facts: Dataset, name: str) -> float:
    try:
        value: Any = facts.get(name)
        return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)
    except (TypeError, ValueError, IndexError):
        return math.nan


def _numbers(facts: Dataset, name: str, count: int) -> np.ndarray | None:
    try:
        values = np.array([float(value) for value in facts.get(name) or ()])
    except (TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _text(dataset: Dataset, name: str) -> str:
    try:
        return str(dataset.get(name) or "").strip(" \0")
    except Exception:  # a value that its type does not allow
        return ""
