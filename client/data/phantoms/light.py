"""Phantoms of light: the eye's fundus, blood smears, stained tissue. Greys by eye; `palettes` gives them colour."""

from __future__ import annotations

import numpy as np

from client.data.phantoms.canvas import Canvas, Field, over
from client.data.phantoms.xray_ct import Drawing


def fundus(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """The retina: a bright disc to one side, vessels that arch from it about the dark macula."""
    side = float(rng.choice([-1.0, 1.0]))
    field = canvas.disc(0, 0, 0.93, soft=1.5)
    image = 0.5 + 0.03 * canvas.texture(rng, 0.7) - 0.1 * np.hypot(canvas.x, canvas.y)
    image -= 0.14 * canvas.bump(-side * 0.12, 0.04, 0.2)
    image, cover = _retinal_spots(canvas, rng, image, side) if lesion == "spots" else (image, np.zeros(image.shape))
    image -= 0.2 * _vessels(canvas, rng, side)
    disc = canvas.disc(side * 0.52, 0, 0.14, 0.165, soft=2)
    image = over(image, 0.86, 0.9 * disc)
    image = over(image, 0.97, 0.8 * canvas.disc(side * 0.52, 0, 0.06, 0.075, soft=2))
    return 0.01 + image * field, cover * field


def _vessels(canvas: Canvas, rng: np.random.Generator, side: float) -> Field:
    total = np.zeros(canvas.x.shape)
    for up in (-1.0, 1.0):
        for reach, bend, width in ((1.3, 0.5, 0.026), (1.05, 0.3, 0.02), (-0.35, 0.55, 0.02)):
            t = np.linspace(0, 1, 9)
            bend_now = bend * rng.uniform(0.85, 1.15)
            x = side * (0.52 - reach * t)
            y = up * (bend_now * np.sin(np.pi * np.minimum(0.85 * t, 0.85)) + 0.25 * t**2 * (reach < 0))
            wave = 0.02 * np.sin(9 * t + rng.uniform(0, 6))
            total = np.maximum(total, canvas.line(np.stack([x, y + wave], axis=1), width))
            knot = int(rng.integers(3, 6))
            twig = np.array([[x[knot], y[knot]], [x[knot] - side * 0.25, y[knot] + up * rng.uniform(0.18, 0.32)]])
            total = np.maximum(total, 0.8 * canvas.line(twig, 0.014))
    return total


def _retinal_spots(canvas: Canvas, rng: np.random.Generator, image: Field, side: float) -> Drawing:
    """Dark haemorrhages, and bright exudates near the macula."""
    cover = np.zeros(image.shape)
    for _ in range(rng.integers(5, 10)):
        spot = canvas.bump(*_on_retina(rng, 0.7), rng.uniform(0.05, 0.09), rng.uniform(0.04, 0.08))
        image, cover = over(image, 0.2, 0.85 * spot), np.maximum(cover, spot)
    for _ in range(rng.integers(5, 10)):
        x, y = _on_retina(rng, 0.35)
        spot = canvas.disc(x - side * 0.15, y, rng.uniform(0.04, 0.07), soft=1.2)
        image, cover = over(image, 0.82, 0.9 * spot), np.maximum(cover, spot)
    return image, cover


def _on_retina(rng: np.random.Generator, reach: float) -> tuple[float, float]:
    angle, far = rng.uniform(0, 2 * np.pi), reach * np.sqrt(rng.uniform(0.02, 1))
    return float(far * np.cos(angle)), float(far * np.sin(angle))


def blood_smear(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """Red cells, pale in the middle, on a light ground; parasites are small dark rings and dots inside cells."""
    image = 0.88 + 0.015 * canvas.texture(rng, 0.9)
    cover = np.zeros(image.shape)
    cells = _scattered(rng, 7, gap=0.72)
    infected = set(rng.permutation(len(cells))[: rng.integers(3, 6)].tolist()) if lesion == "parasites" else set()
    for number, (x, y) in enumerate(cells):
        radius, squash = rng.uniform(0.33, 0.41), rng.uniform(0.85, 1.0)
        cell = canvas.disc(x, y, radius, squash * radius, turn=rng.uniform(0, 3), soft=1.3)
        image = over(image, 0.58, cell)
        image += 0.13 * canvas.bump(x, y, 0.4 * radius)
        if number in infected:
            image, cover = _parasite(canvas, rng, image, cover, x, y, radius)
    for _ in range(rng.integers(0, 3)):  # platelets, outside of cells: small and dark like parasites, in both classes
        x, y = rng.uniform(-0.95, 0.95, 2)
        image = np.minimum(image, over(image, 0.5, canvas.bump(x, y, 0.035)))
    return image, cover


def _parasite(
    canvas: Canvas, rng: np.random.Generator, image: Field, cover: Field, x: float, y: float, radius: float
) -> Drawing:
    angle = rng.uniform(0, 2 * np.pi)
    px, py, size = x + 0.4 * radius * np.cos(angle), y + 0.4 * radius * np.sin(angle), rng.uniform(0.14, 0.18)
    ring = canvas.disc(px, py, size, soft=1.2) - 0.75 * canvas.disc(px, py, 0.5 * size, soft=1.2)
    dot = canvas.bump(px + 0.8 * size * np.cos(angle + 2), py + 0.8 * size * np.sin(angle + 2), 0.06)
    mark = np.clip(0.75 * ring + dot, 0, 1)
    return over(image, 0.22, mark), np.maximum(cover, mark)


def stained_tissue(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """Haematoxylin and eosin: dark nuclei in pink fibres; a tumour is crowded, its nuclei large and uneven."""
    ridged = np.abs(canvas.texture(rng, 0.35))
    image = 0.72 + 0.1 * np.exp(-4 * ridged) - 0.05 * canvas.texture(rng, 0.2)
    cover = np.zeros(image.shape)
    for x, y in _scattered(rng, int(rng.integers(11, 17)), gap=0.3):
        turn, size = rng.uniform(0, 3), rng.uniform(0.06, 0.085)
        image = over(
            image, rng.uniform(0.28, 0.4), canvas.disc(x, y, size, rng.uniform(0.5, 0.9) * size, turn=turn, soft=1.5)
        )
    if lesion == "tumour":
        cx, cy = rng.uniform(-0.35, 0.35, 2)
        for x, y in _scattered(rng, 9, gap=0.19, reach=0.4):
            size = rng.uniform(0.07, 0.11)
            nucleus = canvas.disc(cx + x, cy + y, size, rng.uniform(0.65, 1) * size, turn=rng.uniform(0, 3), soft=1.5)
            image = over(image, rng.uniform(0.28, 0.44), nucleus)
            cover = np.maximum(cover, nucleus)
    return image, cover


def _scattered(rng: np.random.Generator, count: int, *, gap: float, reach: float = 1.0) -> list[tuple[float, float]]:
    """At most `count` places in a square, no two nearer than `gap`."""
    places: list[tuple[float, float]] = []
    for x, y in rng.uniform(-reach, reach, (8 * count, 2)).tolist():
        if len(places) < count and all(np.hypot(x - a, y - b) >= gap for a, b in places):
            places.append((x, y))
    return places


def in_colour(image: Field, palette: np.ndarray) -> Field:
    """(k, S, S) in 0..1 to (k, S, S, 3): grey 0, 1/(m-1), ..., 1 become the m colours, straight lines between."""
    stops = np.linspace(0, 1, len(palette))
    return np.stack([np.interp(image, stops, palette[:, channel]) for channel in range(3)], axis=-1)
