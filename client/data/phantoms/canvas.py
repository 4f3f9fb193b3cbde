"""The few strokes that all phantoms are drawn with.

A patient's images are drawn at once, as float arrays (k, S, S) in 0..1. Coordinates run from -1 to 1, x to the right,
y down; a view moves the coordinates, so the same anatomy and the same texture show from another side.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

Field = np.ndarray  # float (k, S, S)


@dataclass(frozen=True)
class Canvas:
    """Coordinates of k views of one patient."""

    x: Field
    y: Field
    pixel: float  # width of a pixel in these coordinates

    def disc(
        self, cx: float, cy: float, rx: float, ry: float | None = None, *, turn: float = 0.0, soft: float = 1.0
    ) -> Field:
        """1 inside an ellipse, 0 outside; the edge is `soft` pixels wide. `turn` in radians."""
        ry = rx if ry is None else ry
        u, v = self.turned(cx, cy, turn)
        distance = (1.0 - np.hypot(u / rx, v / ry)) * min(rx, ry)
        return step(distance / (soft * self.pixel))

    def bump(self, cx: float, cy: float, rx: float, ry: float | None = None, *, turn: float = 0.0) -> Field:
        """A Gaussian hill of height 1."""
        u, v = self.turned(cx, cy, turn)
        hill: Field = np.exp(-0.5 * ((u / rx) ** 2 + (v / (ry or rx)) ** 2))
        return hill

    def line(self, points: np.ndarray, width: float) -> Field:
        """A Gaussian stroke through `points` (m, 2); `width` is its standard deviation."""
        nearest = np.full(self.x.shape, np.inf)
        for (ax, ay), (bx, by) in itertools.pairwise(points):
            dx, dy = bx - ax, by - ay
            along = np.clip(((self.x - ax) * dx + (self.y - ay) * dy) / (dx * dx + dy * dy + 1e-9), 0, 1)
            nearest = np.minimum(nearest, (self.x - ax - along * dx) ** 2 + (self.y - ay - along * dy) ** 2)
        stroke: Field = np.exp(-0.5 * nearest / max(width, 0.4 * self.pixel) ** 2)
        return stroke

    def texture(self, rng: np.random.Generator, period: float, *, terms: int = 14) -> Field:
        """A patient's own smooth texture of mean 0 and deviation 1, with waves about `period` long."""
        angle = rng.uniform(0, 2 * np.pi, terms)
        rate = 2 * np.pi / period * rng.uniform(0.6, 1.4, terms)
        phase = rng.uniform(0, 2 * np.pi, terms)
        total = np.zeros(self.x.shape)
        for a, r, p in zip(angle, rate, phase, strict=True):
            total += np.cos(r * (np.cos(a) * self.x + np.sin(a) * self.y) + p)
        total *= np.sqrt(2.0 / terms)
        return total

    def turned(self, cx: float, cy: float, turn: float) -> tuple[Field, Field]:
        """Coordinates about (cx, cy), turned by `turn` radians."""
        u, v, c, s = self.x - cx, self.y - cy, np.cos(turn), np.sin(turn)
        return c * u + s * v, c * v - s * u


def views(rng: np.random.Generator, count: int, size: int, *, shift: float, turn: float, zoom: float) -> Canvas:
    """`count` views, each moved by at most `shift`, turned by at most `turn` radians, zoomed by at most 1 + `zoom`."""
    pixel = 2.0 / size
    line = (np.arange(size) + 0.5) * pixel - 1.0
    x, y = np.meshgrid(line, line)
    angle = rng.uniform(-turn, turn, (count, 1, 1))
    scale = 1.0 + rng.uniform(-zoom, zoom, (count, 1, 1))
    dx, dy = rng.uniform(-shift, shift, (2, count, 1, 1))
    u, v = (x - dx) * scale, (y - dy) * scale
    return Canvas(np.cos(angle) * u - np.sin(angle) * v, np.sin(angle) * u + np.cos(angle) * v, pixel)


def step(value: Field) -> Field:
    """A soft step from 0 to 1 about 0."""
    rise: Field = 0.5 * (1.0 + np.tanh(np.clip(value, -20, 20)))
    return rise


def over(image: Field, value: Field | float, cover: Field) -> Field:
    """`value` painted on `image` where `cover` is 1."""
    painted: Field = image + (value - image) * cover
    return painted


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], *, blur_x: float, blur_y: float) -> Field:
    """Gaussian noise (k, S, S) blurred by so many pixels, deviation 1; new for each image."""
    noise = blur(rng.standard_normal(shape), blur_x, blur_y)
    noise /= noise.std(axis=(-2, -1), keepdims=True)
    return noise


def blur(image: Field, sigma_x: float, sigma_y: float) -> Field:
    """Gaussian blur by standard deviations in pixels, periodic at the edges."""
    height, width = image.shape[-2:]
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    damp = np.exp(-2 * np.pi**2 * ((sigma_x * fx) ** 2 + (sigma_y * fy) ** 2))
    out: Field = np.fft.irfft2(np.fft.rfft2(image) * damp, s=(height, width))
    return out
