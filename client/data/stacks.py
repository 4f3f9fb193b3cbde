"""Files that hold one image or a stack of them: DICOM films, NIfTI volumes, the pages of a TIFF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from client.data.pixels import Window
from client.data.readers import (
    Kind,
    UnreadableImageError,
    count_pages,
    kind_of,
    read_image,
    read_pages,
    require_extra,
)


def count_images(path: Path, kind: Kind) -> int:
    """How many a file holds, before any is decoded. Raises UnreadableImageError."""
    if kind == "dicom":
        from client.data import dicom

        return dicom.read_header(path).frames
    if kind == "nifti":
        from client.data import nifti

        return nifti.read_header(path).slices
    return count_pages(path)


def read_stack(path: Path, kind: Kind, wanted: Sequence[int], window: Window | None = None) -> Iterator[np.ndarray]:
    """uint8 (H, W) or (H, W, 3) of each of the images `wanted` (from 0); `window` replaces the file's own, but not a
    picture's.

    Raises UnreadableImageError.
    """
    if not wanted:
        return
    if kind == "dicom":
        from client.data import dicom

        yield from dicom.read_frames(path, wanted, window)
    elif kind == "nifti":
        from client.data import nifti

        slices = nifti.read_slices(path, nifti.read_header(path), window)
        yield from (slices[index] for index in wanted)
    elif count_pages(path) > 1:
        pages = read_pages(path)
        yield from (pages[index] for index in wanted)
    else:
        yield read_image(path)


def is_segmentation(path: Path) -> bool:
    """Whether it is a DICOM segmentation object that names its images, and can be read here."""
    try:
        require_extra("highdicom")
        if kind_of(path) != "dicom":
            return False
    except UnreadableImageError:
        return False
    from client.data import segmentation

    return bool(segmentation.marked_images(path))
