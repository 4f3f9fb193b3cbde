"""The phantom hospitals: what each one images, what it asks, and how its device draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from client.data.phantoms import light, mri_ultrasound, xray_ct
from client.data.phantoms.canvas import Canvas
from client.data.phantoms.scanner import Scanner
from client.data.phantoms.xray_ct import Drawing
from client.site import Orientation

Draw = Callable[[Canvas, np.random.Generator, str], Drawing]


@dataclass(frozen=True)
class Modality:
    """How to draw an image, how much the views of one patient differ, and its colours."""

    title: str
    draw: Draw
    shift: float = 0.06  # of the half width
    turn: float = 0.06  # radians
    zoom: float = 0.06
    palette: tuple[tuple[float, float, float], ...] = ((0, 0, 0), (1, 1, 1))  # grey 0..1 to red, green, blue
    orientation: Orientation = "fixed"


@dataclass(frozen=True)
class Profile:
    """One phantom hospital."""

    modality: Modality
    labels: dict[str, str]  # label -> lesion drawn; several, in the order drawn, with '|' between
    scanner: Scanner


_ORANGE = ((0, 0, 0), (0.45, 0.1, 0.03), (0.85, 0.38, 0.12), (1, 0.72, 0.35), (1, 0.97, 0.8))
_GIEMSA = ((0.2, 0.05, 0.35), (0.5, 0.25, 0.5), (0.8, 0.5, 0.55), (0.95, 0.88, 0.87), (1, 1, 1))
_EOSIN = ((0.15, 0.05, 0.3), (0.4, 0.2, 0.55), (0.72, 0.42, 0.66), (0.93, 0.68, 0.8), (1, 0.96, 0.98))

CHEST_FILM = Modality("chest X-ray", xray_ct.chest_film)
HEAD_CT = Modality("head CT", xray_ct.head_ct, turn=0.12)
ABDOMINAL_CT = Modality("abdominal CT", xray_ct.abdominal_ct)
BRAIN_T1 = Modality("brain MRI, T1 with contrast", mri_ultrasound.brain_t1, turn=0.12)
BRAIN_FLAIR = Modality("brain MRI, FLAIR", mri_ultrasound.brain_flair, turn=0.12)
ULTRASOUND = Modality("ultrasound", mri_ultrasound.ultrasound, shift=0.03, turn=0.03, zoom=0.03)
FUNDUS = Modality("fundus photograph", light.fundus, shift=0.04, turn=0.15, palette=_ORANGE)
BLOOD_SMEAR = Modality(
    "blood smear", light.blood_smear, shift=0.1, turn=3.14, zoom=0.1, palette=_GIEMSA, orientation="free"
)
STAINED_TISSUE = Modality(
    "stained tissue", light.stained_tissue, shift=0.1, turn=3.14, zoom=0.1, palette=_EOSIN, orientation="free"
)

_TWO_FINDINGS = {"none": "none", "nodule": "nodule", "effusion": "effusion", "nodule|effusion": "effusion|nodule"}

PROFILES: dict[str, Profile] = {
    "alder": Profile(
        CHEST_FILM,
        {"normal": "none", "nodule": "nodule"},
        Scanner(gamma=1.0, contrast=0.95, noise=0.03, blur=0.5, marker="L"),
    ),
    "birch": Profile(
        CHEST_FILM,
        {"normal": "none", "opacity": "opacity"},
        Scanner(gamma=0.75, contrast=0.8, brightness=0.05, noise=0.04, blur=0.7, vignette=0.2, marker="R"),
    ),
    "cedar": Profile(HEAD_CT, {"normal": "none", "bleed": "bleed"}, Scanner(contrast=1.1, noise=0.03, blur=0.4)),
    "elm": Profile(
        BRAIN_T1, {"normal": "none", "mass": "mass"}, Scanner(gamma=1.1, noise=0.04, blur=0.6, vignette=0.15)
    ),
    "hazel": Profile(
        ULTRASOUND, {"normal": "none", "cyst": "cyst", "mass": "mass"}, Scanner(gamma=0.8, noise=0.02, marker="P")
    ),
    "larch": Profile(
        FUNDUS, {"healthy": "none", "retinopathy": "spots"}, Scanner(contrast=1.05, noise=0.03, vignette=0.3)
    ),
    "maple": Profile(
        BLOOD_SMEAR, {"uninfected": "none", "parasitised": "parasites"}, Scanner(noise=0.03, vignette=0.35)
    ),
    "oak": Profile(
        ABDOMINAL_CT,
        {"normal": "none", "cyst": "cyst", "metastases": "metastases"},
        Scanner(gamma=0.9, contrast=1.15, noise=0.04, blur=0.4, marker="R"),
    ),
    "pine": Profile(
        BRAIN_FLAIR, {"normal": "none", "white_spots": "spots"}, Scanner(contrast=1.1, noise=0.035, blur=0.5)
    ),
    "poplar": Profile(
        CHEST_FILM, _TWO_FINDINGS, Scanner(gamma=0.9, contrast=1.05, noise=0.03, blur=0.4, vignette=0.1, marker="L")
    ),
    "rowan": Profile(STAINED_TISSUE, {"benign": "none", "tumour": "tumour"}, Scanner(gamma=1.1, noise=0.03, blur=0.5)),
    "spruce": Profile(
        CHEST_FILM, _TWO_FINDINGS, Scanner(gamma=1.15, contrast=0.85, brightness=0.03, noise=0.04, blur=0.6, marker="R")
    ),
    "willow": Profile(
        CHEST_FILM,
        {"normal": "none", "nodule": "nodule", "effusion": "effusion"},
        Scanner(gamma=1.2, contrast=1.1, brightness=-0.02, noise=0.035, blur=0.3, marker="R"),
    ),
    "yew": Profile(
        HEAD_CT,
        {"normal": "none", "bleed": "bleed", "infarct": "infarct"},
        Scanner(gamma=0.8, contrast=0.95, brightness=0.03, noise=0.04, blur=0.6, marker="L"),
    ),
}
