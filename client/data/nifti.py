"""NIfTI volumes as slices in the usual view: the affine says where left, back and head are. Needs extra `imaging`."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import Nifti1Image, Nifti2Image
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

from client.data.pixels import Window, one_image_at_most, refuse_huge, robust_window, windowed
from client.data.readers import NIFTI_2, UnreadableImageError

_AXIAL = 2
_THICKER = 1.2  # than the other two axes: slices are cut across it, as the scanner cut them
_TOLERANCE_MM = 0.1


@dataclass(frozen=True)
class Header:
    """What is known before the pixels are read."""

    slices: int
    axis: int  # of the patient, across which it is cut: 0 right, 1 front, 2 head
    spacing: str  # mm between rows x columns of a slice
    affine: np.ndarray  # (4, 4)


def read_header(path: Path) -> Header:
    """Raises UnreadableImageError."""
    image = _load(path)
    try:
        shape, steps = _canonical_shape(image)
    except UnreadableImageError:
        raise
    except Exception:
        raise UnreadableImageError("the NIfTI file is damaged") from None
    refuse_huge(*(int(size) for size in shape))
    if 1 in shape:
        axis = int(np.argmin(shape)) if shape[_AXIAL] > 1 else _AXIAL
    else:
        axis = int(np.argmax(steps)) if steps.max() > _THICKER * np.median(steps) else _AXIAL
    columns, rows = np.delete(steps, axis)
    return Header(int(shape[axis]), axis, f"{rows:g}x{columns:g}", image.affine)


def read_slices(path: Path, header: Header, window: Window | None = None) -> np.ndarray:
    """uint8 (n, H, W): 8-bit values as they are, others by one window for the whole volume, its own unless one is
    given.

    Raises UnreadableImageError.
    """
    image = _load(path)
    values = _slices(image, header.axis)
    if values.dtype == np.uint8 and window is None:
        return values
    return windowed(values, window or robust_window(values))


def read_mask(path: Path, header: Header) -> np.ndarray:
    """uint8 (n, H, W): the values of a mask of the image that `header` is of.

    Raises UnreadableImageError if it lies elsewhere in space, or holds values that are no small whole numbers.
    """
    image = _load(path)
    if not np.allclose(image.affine, header.affine, atol=_TOLERANCE_MM):
        raise UnreadableImageError("the mask lies elsewhere than its image: their affines differ")
    values = _slices(image, header.axis)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255 or (values % 1).any():
        raise UnreadableImageError("the mask holds values that are no whole numbers from 0 to 255")
    return values.astype(np.uint8)


def write_mask(path: Path, source: Path, slices: np.ndarray) -> None:
    """Write a mask uint8 (n, H, W), as `read_slices` cuts the volume `source`, in that volume's own shape and place.

    Nothing else of its header is taken over: texts in it may name a patient.
    """
    image, header = _load(source), read_header(source)
    turned = np.moveaxis(slices.transpose(0, 2, 1)[:, ::-1, ::-1], 0, header.axis)
    back = ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), io_orientation(image.affine))
    mask = type(image)(apply_orientation(turned, back).reshape(image.shape).astype(np.uint8), image.affine)
    for name in ("sform", "qform"):
        affine, code = getattr(image, f"get_{name}")(coded=True)
        if affine is not None:
            getattr(mask, f"set_{name}")(affine, int(code))
    mask.header["xyzt_units"] = image.header["xyzt_units"]
    mask.to_filename(path)


def read_image(path: Path) -> np.ndarray:
    """The only slice of a file. Raises UnreadableImageError."""
    header = read_header(path)
    one_image_at_most(header.slices, "slices")
    slices = read_slices(path, header)
    only: np.ndarray = slices[0]
    return only


def _slices(image: Any, axis: int) -> np.ndarray:
    """(n, H, W), rows from front or head, columns from the patient's right."""
    try:
        stored = image.dataobj
        volume = np.asanyarray(stored[(..., *(0,) * (stored.ndim - 3))] if stored.ndim > 3 else stored)
        if volume.dtype.names or volume.dtype.kind not in "uif":
            raise UnreadableImageError(f"the pixels are of type {volume.dtype}, not numbers")
        volume = volume[..., None] if volume.ndim == 2 else volume
        turned = apply_orientation(volume, io_orientation(image.affine))
    except UnreadableImageError:
        raise
    except Exception:  # a stream that ends early, a size that is not the header's
        raise UnreadableImageError("the NIfTI file is damaged") from None
    return np.ascontiguousarray(np.moveaxis(turned, axis, 0)[:, ::-1, ::-1].transpose(0, 2, 1))


def _one_volume(image: Any) -> None:
    """Raise UnreadableImageError for a series in time or of contrasts: which one is meant, the file does not say."""
    volumes = math.prod(int(size) for size in image.shape[3:])
    if volumes != 1:
        what = f"the file holds {volumes} volumes, in time or of several contrasts"
        raise UnreadableImageError(f"{what}; write the one that is meant as a file of its own (nibabel.four_to_three)")


def _canonical_shape(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and mm of the axes to right, front and head."""
    shape, steps = (*image.shape[:3], 1, 1)[:3], np.ones(3)
    zooms = np.array(image.header.get_zooms()[:3], dtype=np.float64)
    steps[: len(zooms)] = zooms
    order = io_orientation(image.affine)[:, 0]
    if not np.isfinite(order).all():  # an axis without length
        raise UnreadableImageError("the NIfTI file is damaged")
    order = order.astype(int)
    turned_shape, turned_steps = np.empty(3, dtype=int), np.empty(3)
    turned_shape[order], turned_steps[order] = shape, steps
    return turned_shape, turned_steps


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        stream = gzip.open(path) if packed else path.open("rb")  # noqa: SIM115 - the image reads from it later
        version = int.from_bytes(stream.read(4), "little")
        stream.seek(0)
        image = (Nifti2Image if version in NIFTI_2 else Nifti1Image).from_stream(stream)
    except FileNotFoundError:
        raise UnreadableImageError("there is no such file") from None
    except Exception:
        raise UnreadableImageError("the NIfTI file is damaged") from None
    _one_volume(image)
    return image
