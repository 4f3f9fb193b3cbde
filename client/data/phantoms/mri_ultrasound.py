"""Phantoms of MRI (brain, two weightings) and ultrasound. Numbers are places and greys by eye."""

from __future__ import annotations

import numpy as np

from client.data.phantoms.canvas import Canvas, Field, over, smooth_noise, step
from client.data.phantoms.xray_ct import Drawing


def brain_t1(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """An axial T1-weighted brain after contrast: white matter bright, cortex grey, fluid dark, scalp bright."""
    brain, white = _brain(canvas, rng)
    image = _head(canvas, scalp=0.85)
    image = over(image, 0.42, brain)
    image = over(image, 0.6 + 0.02 * canvas.texture(rng, 0.4), white * brain)
    image = over(image, 0.5, _deep_nuclei(canvas))
    image = over(image, 0.12, _ventricles(canvas, rng.uniform(0.85, 1.3)))
    image = over(image, 0.15, 0.7 * _fissure(canvas) * brain)
    if lesion == "none":
        return image, np.zeros(image.shape)
    return _ring_mass(canvas, rng, image, brain)


def brain_flair(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """An axial FLAIR brain: cortex brighter than white matter, fluid black."""
    brain, white = _brain(canvas, rng)
    image = _head(canvas, scalp=0.55)
    image = over(image, 0.55, brain)
    image = over(image, 0.43 + 0.02 * canvas.texture(rng, 0.4), white * brain)
    ventricles = _ventricles(canvas, rng.uniform(0.85, 1.3))
    image = over(image, 0.05, ventricles)
    image = over(image, 0.1, 0.7 * _fissure(canvas) * brain)
    if lesion == "none":
        return image, np.zeros(image.shape)
    return _white_spots(canvas, rng, image)


def _head(canvas: Canvas, *, scalp: float) -> Field:
    image = over(np.full(canvas.x.shape, 0.01), scalp, canvas.disc(0, 0, 0.74, 0.9, soft=1.5))
    image = over(image, 0.06, canvas.disc(0, 0, 0.69, 0.85, soft=1.5))
    return over(image, 0.3, canvas.disc(0, 0, 0.645, 0.805, soft=1.5))


def _brain(canvas: Canvas, rng: np.random.Generator) -> tuple[Field, Field]:
    """(brain with sulci cut in, white matter with a folded border)."""
    u, v = canvas.x / 0.61, canvas.y / 0.77
    folds = np.cos(rng.integers(15, 20) * np.arctan2(v, u) + 1.5 * canvas.texture(rng, 0.5) + rng.uniform(0, 6))
    radius = np.hypot(u, v)
    brain = step((1.0 - radius - 0.035 * step(4 * folds - 2)) * 0.6 / canvas.pixel)
    white = step((0.8 + 0.09 * folds - radius) * 0.6 / (1.5 * canvas.pixel))
    return brain, white


def _ventricles(canvas: Canvas, spread: float) -> Field:
    total = np.zeros(canvas.x.shape)
    for side in (-1.0, 1.0):
        horn = np.array([[0.1, -0.26], [0.05, -0.08], [0.06, 0.06], [0.16, 0.28]]) * [side * spread, spread]
        total += canvas.line(horn, 0.04 * spread)
    cover: Field = np.clip(total, 0, 1)
    return cover


def _deep_nuclei(canvas: Canvas) -> Field:
    both: Field = canvas.disc(-0.2, 0.02, 0.09, 0.16, soft=3) + canvas.disc(0.2, 0.02, 0.09, 0.16, soft=3)
    return both


def _fissure(canvas: Canvas) -> Field:
    front = canvas.line(np.array([[0.0, -0.8], [0.0, -0.34]]), 0.012)
    both: Field = np.maximum(front, canvas.line(np.array([[0.0, 0.36], [0.0, 0.8]]), 0.012))
    return both


def _ring_mass(canvas: Canvas, rng: np.random.Generator, image: Field, brain: Field) -> Drawing:
    """An enhancing ring about a dark centre, in dark oedema."""
    angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.28, 0.42)
    x, y, radius = far * np.cos(angle), 1.2 * far * np.sin(angle), rng.uniform(0.2, 0.28)
    squash, turn = rng.uniform(0.75, 1.0), rng.uniform(0, 3)
    whole = canvas.disc(x, y, radius, squash * radius, turn=turn, soft=1.5)
    core = canvas.disc(x, y, 0.55 * radius, 0.5 * squash * radius, turn=turn, soft=2)
    image = over(image, 0.36, 0.7 * canvas.disc(x, y, 1.7 * radius, 1.5 * radius, turn=turn, soft=5) * brain)
    image = over(image, rng.uniform(0.9, 1.0), whole)
    return over(image, 0.25, core), whole


def _white_spots(canvas: Canvas, rng: np.random.Generator, image: Field) -> Drawing:
    """Five to nine bright spots about the ventricles, longer away from the midline."""
    cover = np.zeros(image.shape)
    for _ in range(rng.integers(5, 10)):
        side, y = float(rng.choice([-1.0, 1.0])), rng.uniform(-0.4, 0.45)
        x = side * rng.uniform(0.16, 0.38)
        cover = np.maximum(cover, canvas.bump(x, y, rng.uniform(0.05, 0.09), rng.uniform(0.04, 0.06), turn=side * y))
    return over(image, rng.uniform(0.66, 0.78), cover), cover


def ultrasound(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """A sector scan: layers of tissue in speckle that is wide across and short along the beam."""
    depth = np.hypot(canvas.x, canvas.y + 1.15)
    angle = np.arctan2(canvas.x, canvas.y + 1.15)
    sector = step((0.62 - np.abs(angle)) / 0.02) * step((depth - 0.25) / 0.02) * step((2.05 - depth) / 0.02)
    layers = 0.42 + 0.12 * np.cos(2 * np.pi * depth / rng.uniform(0.28, 0.45) + 0.8 * canvas.texture(rng, 0.8))
    tissue = layers * (0.7 + 0.6 * np.exp(-(((depth - 0.4) / 0.15) ** 2))) + 0.07 * canvas.texture(rng, 0.3)
    tissue *= np.exp(-0.28 * (depth - 0.3))  # what the gain does not make up for
    tissue, cover = _echo_lesion(canvas, rng, tissue, lesion)
    speckle = np.hypot(*(smooth_noise(rng, tissue.shape, blur_x=1.0, blur_y=0.55) for _ in range(2))) / 1.25
    return np.clip(tissue, 0.01, 1) * speckle * sector + 0.01, cover


def _echo_lesion(canvas: Canvas, rng: np.random.Generator, tissue: Field, lesion: str) -> Drawing:
    if lesion == "none":
        return tissue, np.zeros(tissue.shape)
    x, y, r = rng.uniform(-0.3, 0.3), rng.uniform(-0.25, 0.3), rng.uniform(0.26, 0.36)
    behind = step((canvas.y - y) / 0.05) * np.exp(-(((canvas.x - x) / (0.75 * r)) ** 2))
    if lesion == "cyst":  # black, smooth, brighter behind
        cover = canvas.disc(x, y, r * 1.15, r * 0.85, soft=1.2)
        return over(tissue * (1 + 0.75 * behind), 0.02, cover), cover
    ragged = r * (1 + 0.16 * canvas.texture(rng, 0.3))  # a solid mass: grey, ragged, taller, a shadow behind
    u, v = canvas.x - x, canvas.y - y
    cover = step((ragged - np.hypot(u / 0.85, v / 1.05)) / (1.5 * canvas.pixel))
    return over(tissue * (1 - 0.6 * behind), 0.14 + 0.04 * canvas.texture(rng, 0.12), cover), cover
