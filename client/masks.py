"""Masks that `predict` found, as the hospital's viewers read them: of DICOM a segmentation object for each series, of a
NIfTI volume a NIfTI. Both hold what their originals hold of a patient, or of the place in space: they stay here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from client.adapted_model import Facts
from client.data.readers import EXTRA, Kind, UnreadableImageError, require_extra
from common.errors import Problem

NOT_ANSWERED = 255  # in a NIfTI mask, of slices of which nothing was said


@dataclass(frozen=True)
class Origin:
    """Where an image of a folder is from."""

    path: Path
    kind: Kind
    frame: int  # from 0
    frames: int  # how many the file holds


def write_whole_masks(
    folder: Path, found: Sequence[tuple[Origin, Path]], facts: Facts, problems: list[Problem]
) -> dict[Path, Path]:
    """The object or volume in `folder` that holds the mask of each file of which there is one.

    `found`: each image that was answered, and its mask as PNG. What cannot be made adds to `problems`.
    """
    kinds = {kind: [each for each in found if each[0].kind == kind] for kind in ("dicom", "nifti")}
    return _objects(folder, kinds["dicom"], facts, problems) | _volumes(folder, kinds["nifti"], problems)


def _objects(
    folder: Path, found: Sequence[tuple[Origin, Path]], facts: Facts, problems: list[Problem]
) -> dict[Path, Path]:
    if not found:
        return {}
    try:
        require_extra("highdicom")
    except UnreadableImageError:
        problems.append(Problem("DICOM SEG", "highdicom is not installed, so there is none", EXTRA))
        return {}
    from client.data.segmentation import Maker, Masked, write_segmentations

    maker = Maker(tuple(facts.label_names[1:]), facts.version, facts.model)
    masked = [Masked(origin.path, origin.frame, mask) for origin, mask in found]
    of: dict[Path, Path] = {}
    for outcome, images in write_segmentations(masked, folder, maker):
        if isinstance(outcome, Problem):
            problems.append(outcome)
        else:
            of |= dict.fromkeys(images, outcome)
    return of


def _volumes(folder: Path, found: Sequence[tuple[Origin, Path]], problems: list[Problem]) -> dict[Path, Path]:
    slices, of = defaultdict[Path, dict[int, Path]](dict), dict[Path, Path]()
    frames = {origin.path: origin.frames for origin, _ in found}
    for origin, mask in found:
        slices[origin.path][origin.frame] = mask
    for number, (path, masks) in enumerate(slices.items(), start=1):
        from client.data import nifti

        known = {frame: np.asarray(Image.open(mask)) for frame, mask in masks.items()}
        nothing = np.full_like(next(iter(known.values())), NOT_ANSWERED)
        whole = np.stack([known.get(frame, nothing) for frame in range(frames[path])])
        try:
            nifti.write_mask(folder / f"volume-{number:04d}.nii.gz", path, whole)
        except ValueError as error:
            what = f"no NIfTI mask could be made of it ({error})"
            problems.append(Problem(str(path), what, "its masks are there as PNG"))
        else:
            of[path] = folder / f"volume-{number:04d}.nii.gz"
    return of
