"""Phantoms: hospitals whose images are drawn by a program, so that everything can be tried without a patient.

What they imitate is named in `profiles`; nothing in them is measured, and nothing learned from them holds for people.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from client.data.cutting import split_patients
from client.data.phantoms.canvas import views
from client.data.phantoms.light import in_colour
from client.data.phantoms.profiles import PROFILES, Profile
from client.data.rows import Details
from client.data.site_folder import Format, SiteImages, write_sites
from common.errors import DataError, Problem

__all__ = ["PROFILES", "draw_hospital", "make_phantom_sites"]

_IMAGES_PER_PATIENT = (2, 5)
_AGES = (20, 90)  # years


def make_phantom_sites(
    out: Path,
    *,
    names: Sequence[str] = tuple(PROFILES),
    patients: int = 80,
    image_size: int = 64,
    channels: int = 1,
    seed: int = 0,
    test_fraction: float = 0.25,
    format: Format = "npz",
) -> list[Path]:
    """Write one site folder below `out` for each named phantom hospital; returns the folders.

    Raises DataError if a name is unknown or a folder is not empty; then nothing is written.
    """
    unknown = [name for name in names if name not in PROFILES]
    if unknown:
        raise DataError(
            [Problem(name, "no such phantom hospital", f"there are: {', '.join(PROFILES)}") for name in unknown]
        )
    if patients < 2 or channels not in (1, 3) or image_size < 16 or not 0 <= test_fraction < 1:
        what = f"patients {patients}, channels {channels}, image size {image_size}, test fraction {test_fraction}"
        raise DataError(Problem("", what, "at least 2 patients, 1 or 3 channels, 16 pixels, a fraction below 1"))
    sites = []
    for name in names:
        drawn = draw_hospital(name, patients=patients, image_size=image_size, channels=channels, seed=seed)
        rng = np.random.default_rng([seed, *name.encode(), 1])
        sites.append((name, split_patients(drawn, test_fraction, rng)))
    return write_sites(out, sites, format=format)


def draw_hospital(name: str, *, patients: int, image_size: int, channels: int, seed: int) -> SiteImages:
    """All images of one phantom hospital, split 'train'. Each patient depends on (seed, name, number) alone."""
    profile = PROFILES[name]
    labels = tuple(profile.labels)
    images, masks, of_label, of_patient, details = [], [], [], [], []
    for patient in range(patients):
        rng = np.random.default_rng([seed, *name.encode(), 0, patient])
        label = patient % len(labels)
        shown, cover = _draw_patient(profile, labels[label], rng, image_size, channels)
        images.append(shown)
        masks.append(cover)
        of_label += [label] * len(shown)
        of_patient += [f"{name}-{patient:04d}"] * len(shown)
        details += [_who(name, patient, seed)] * len(shown)
    split = np.full(len(of_label), "train")
    return SiteImages(
        name,
        np.concatenate(images),
        np.array(of_label, dtype=np.int64),
        np.array(of_patient),
        split,
        labels,
        tuple(details),
        np.concatenate(masks),
        orientation=profile.modality.orientation,
        phantom=True,
    )


def _who(name: str, patient: int, seed: int) -> Details:
    """Age and sex of one patient; nothing that is drawn depends on them."""
    rng = np.random.default_rng([seed, *name.encode(), 2, patient])
    age, sex = float(rng.integers(_AGES[0], _AGES[1] + 1)), str(rng.choice(["F", "M"]))
    return Details(PROFILES[name].modality.title, age, sex, f"{name}-scanner")


def _draw_patient(
    profile: Profile, label: str, rng: np.random.Generator, size: int, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (k, S, S[, 3]) and masks (k, S, S): one anatomy, k views, the hospital's scanner."""
    modality = profile.modality
    count = int(rng.integers(_IMAGES_PER_PATIENT[0], _IMAGES_PER_PATIENT[1] + 1))
    canvas = views(rng, count, size, shift=modality.shift, turn=modality.turn, zoom=modality.zoom)
    image, cover = modality.draw(canvas, rng, profile.labels[label])
    shown = profile.scanner.expose(image, rng)
    if channels == 3:
        shown = in_colour(shown, np.array(modality.palette))
    return np.rint(255 * shown).astype(np.uint8), (cover > 0.5).astype(np.uint8)
