"""Phantoms of X-ray attenuation: chest films, head CT, abdominal CT. Numbers are places and greys by eye."""

from __future__ import annotations

import numpy as np

from client.data.phantoms.canvas import Canvas, Field, over, step

Drawing = tuple[Field, Field]  # image (k, S, S) in 0..1; cover of the lesion (k, S, S) in 0..1, zero where healthy


def chest_film(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """A frontal chest film: lungs dark, heart, spine, ribs and diaphragm bright. `lesion` may name several, as a|b."""
    wide, tall, heart = rng.uniform(0.92, 1.08), rng.uniform(0.92, 1.08), rng.uniform(0.9, 1.15)
    lungs, base = _lungs(canvas, wide, tall, rng)
    slope = canvas.y + 0.8 - 0.5 * canvas.x**2 - 0.1 * np.abs(canvas.x)
    torso = step(slope / 0.08) * step((0.99 * wide - np.abs(canvas.x)) / 0.03)
    neck = canvas.disc(0, -1.0, 0.26, 0.5, soft=3)
    soft_tissue = 0.56 + 0.06 * np.abs(canvas.x) + 0.05 * canvas.y
    image = over(np.full(canvas.x.shape, 0.04), soft_tissue, np.clip(torso + neck, 0, 1))
    image = over(image, 0.2 + 0.03 * canvas.texture(rng, 0.5), 0.92 * lungs)
    image += 0.055 * _ribs(canvas, rng) * np.clip(lungs + 0.25 * torso, 0, 1)
    for side in (-1.0, 1.0):
        hilum = canvas.bump(side * 0.2, -0.02, 0.13, 0.2)
        image += lungs * hilum * (0.16 + 0.08 * canvas.texture(rng, 0.16))
        clavicle = np.array([[side * 0.06, -0.62], [side * 0.3, -0.66], [side * 0.62, -0.78]])
        image += 0.11 * canvas.line(clavicle, 0.03)
    image = over(image, 0.8, 0.85 * canvas.disc(0.04, -0.25, 0.14, 0.45, soft=4))
    shadow = canvas.disc(0.16, 0.3, 0.36 * heart, 0.24 * heart, turn=0.55, soft=3.5)
    image = over(image, 0.8, 0.92 * np.maximum(shadow, canvas.disc(0.02, 0.12, 0.18, 0.3, soft=4)))
    image += 0.07 * canvas.bump(0, 0, 0.05, 3) * (1 + 0.4 * np.cos(2 * np.pi * canvas.y / 0.14))
    image = over(image, 0.86, base * torso)
    cover = np.zeros(canvas.x.shape)
    for name in lesion.split("|"):
        image, mark = _LUNG_LESIONS[name](canvas, rng, image, lungs)
        cover = np.maximum(cover, mark)
    return image, cover


def _lungs(canvas: Canvas, wide: float, tall: float, rng: np.random.Generator) -> tuple[Field, Field]:
    """(both lungs, what lies below the diaphragm)."""
    lungs, base = np.zeros(canvas.x.shape), np.zeros(canvas.x.shape)
    for side, floor in ((-1.0, 0.42), (1.0, 0.52)):  # the liver lifts the patient's right dome, on our left
        floor += rng.uniform(-0.06, 0.06)
        outer = canvas.disc(side * 0.4 * wide, 0.0, 0.33 * wide, 0.72 * tall, turn=-side * 0.1, soft=2)
        dome = floor + 0.9 * (canvas.x - side * 0.33) ** 2
        below = step((canvas.y - dome) / (2 * canvas.pixel))
        lungs += outer * (1 - below)
        base += below * step(side * canvas.x / 0.03)
    return np.clip(lungs, 0, 1), np.clip(base, 0, 1)


def _ribs(canvas: Canvas, rng: np.random.Generator) -> Field:
    gap, phase = rng.uniform(0.17, 0.2), rng.uniform(0, 1)
    arch = canvas.y + 0.55 * (np.abs(canvas.x) - 0.25) ** 2 - 0.12 * np.abs(canvas.x)
    rib: Field = np.cos(2 * np.pi * (arch / gap + phase))
    return step(3 * rib - 1.2)


def _place_in_lung(rng: np.random.Generator) -> tuple[float, float]:
    return float(rng.choice([-1.0, 1.0]) * rng.uniform(0.3, 0.52)), float(rng.uniform(-0.42, 0.25))


def _no_lesion(canvas: Canvas, rng: np.random.Generator, image: Field, organ: Field) -> Drawing:
    return image, np.zeros(image.shape)


def _nodule(canvas: Canvas, rng: np.random.Generator, image: Field, lungs: Field) -> Drawing:
    x, y = _place_in_lung(rng)
    radius = rng.uniform(0.17, 0.24)
    cover = canvas.disc(x, y, radius, radius * rng.uniform(0.8, 1.0), turn=rng.uniform(0, 3), soft=2)
    return image + rng.uniform(0.34, 0.45) * cover, cover


def _opacity(canvas: Canvas, rng: np.random.Generator, image: Field, lungs: Field) -> Drawing:
    x, y = _place_in_lung(rng)
    cloud = canvas.bump(x, y + 0.1, rng.uniform(0.15, 0.26), rng.uniform(0.18, 0.32), turn=rng.uniform(-0.5, 0.5))
    cover = np.clip(cloud * (1.0 + 0.35 * canvas.texture(rng, 0.2)), 0, 1) * lungs
    return image + rng.uniform(0.26, 0.42) * cover, cover


def _effusion(canvas: Canvas, rng: np.random.Generator, image: Field, lungs: Field) -> Drawing:
    """Fluid at the bottom of one lung, with a meniscus that climbs the chest wall."""
    side, level = float(rng.choice([-1.0, 1.0])), rng.uniform(0.05, 0.3)
    surface = level - 0.5 * np.clip(np.abs(canvas.x) - 0.35, 0, 1)
    cover = step((canvas.y - surface) / 0.05) * step(side * canvas.x / 0.03) * lungs
    return over(image, 0.78, 0.85 * cover), cover


_LUNG_LESIONS = {"none": _no_lesion, "nodule": _nodule, "opacity": _opacity, "effusion": _effusion}


def head_ct(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """An axial head CT in a brain window: white skull, grey brain, dark ventricles."""
    rx, ry, lean = rng.uniform(0.64, 0.72), rng.uniform(0.8, 0.88), rng.uniform(-0.03, 0.03)
    image = over(np.full(canvas.x.shape, 0.02), 0.35, canvas.disc(lean, 0, rx + 0.06, ry + 0.06, soft=1.5))
    image = over(image, 1.0, canvas.disc(lean, 0, rx, ry, soft=1.5))
    brain = canvas.disc(lean, 0, rx - 0.07, ry - 0.07, soft=1.5)
    rim = brain - canvas.disc(lean, 0, rx - 0.22, ry - 0.22, soft=6)
    image = over(image, 0.42 + 0.02 * canvas.texture(rng, 0.35) - 0.06 * rim * (canvas.texture(rng, 0.13) > 0.9), brain)
    image += 0.07 * canvas.line(np.array([[lean, -ry], [lean, -0.25]]), 0.012) * brain
    image += 0.06 * canvas.line(np.array([[lean, 0.4], [lean, ry]]), 0.012) * brain
    spread = rng.uniform(0.85, 1.25)
    for side in (-1.0, 1.0):
        horn = np.array([[0.06, 0.05], [0.07, -0.12], [0.16, -0.32]]) * [side * spread, spread] + [lean, 0]
        back = np.array([[0.08, 0.1], [0.18, 0.25], [0.2, 0.42]]) * [side * spread, spread] + [lean, 0]
        ventricle = np.clip(canvas.line(horn, 0.045 * spread) + canvas.line(back, 0.035 * spread), 0, 1)
        image = over(image, 0.2, 0.95 * ventricle)
    return _HEAD_LESIONS[lesion](canvas, rng, image, brain)


def _bleed(canvas: Canvas, rng: np.random.Generator, image: Field, brain: Field) -> Drawing:
    """Fresh blood: inside the brain with a dark rim of oedema, or a crescent along the skull."""
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        x, y, radius = 0.3 * np.cos(angle), 0.42 * np.sin(angle), rng.uniform(0.18, 0.26)
        ragged = 1 + 0.12 * canvas.texture(rng, 0.25)
        cover = canvas.disc(x, y, radius, radius * rng.uniform(0.7, 1.0), turn=angle, soft=2) * np.clip(ragged, 0, 1)
        image = over(image, 0.36, 0.6 * canvas.disc(x, y, radius * 1.25, radius * 1.2, turn=angle, soft=3) * brain)
    else:
        side, depth = float(rng.choice([-1.0, 1.0])), rng.uniform(0.16, 0.24)
        inner = canvas.disc(-side * depth, 0, 0.6, 0.76, soft=1.5)
        half = step((side * canvas.x - 0.22) / 0.08)
        cover = np.clip(brain - inner, 0, 1) * half
    return over(image, rng.uniform(0.82, 0.95), cover), cover


def _infarct(canvas: Canvas, rng: np.random.Generator, image: Field, brain: Field) -> Drawing:
    """A dark wedge that reaches the brain's surface."""
    angle, width = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 0.9)
    u, v = canvas.turned(0, 0, angle)
    cover = step((width * (u - 0.2) - np.abs(v)) / 0.05) * brain
    return image - rng.uniform(0.2, 0.28) * cover, cover


_HEAD_LESIONS = {"none": _no_lesion, "bleed": _bleed, "infarct": _infarct}


def abdominal_ct(canvas: Canvas, rng: np.random.Generator, lesion: str) -> Drawing:
    """An axial CT through liver, spleen and kidneys, contrast in the vessels."""
    rx, ry, fat = rng.uniform(0.82, 0.9), rng.uniform(0.6, 0.68), rng.uniform(0.05, 0.12)
    image = over(np.full(canvas.x.shape, 0.02), 0.22, canvas.disc(0, 0, rx, ry, soft=1.5))
    image = over(image, 0.46, canvas.disc(0, 0, rx - fat, ry - fat, soft=1.5))
    image = over(image, 0.25 + 0.03 * canvas.texture(rng, 0.2), canvas.disc(0.03, -0.03, rx - 0.22, ry - 0.2, soft=2))
    for angle in np.linspace(0.15, 2 * np.pi - 0.15, 13):
        image = over(
            image, 0.95, canvas.disc(*_around(angle, rx - fat - 0.05, ry - fat - 0.05), 0.05, 0.025, turn=angle)
        )
    liver = canvas.disc(-0.34, -0.06, 0.38, 0.34, turn=-0.35, soft=1.5)
    liver = np.clip(liver + canvas.disc(-0.05, -0.24, 0.3, 0.14, turn=0.1, soft=1.5), 0, 1)
    image = over(image, 0.56 + 0.012 * canvas.texture(rng, 0.15), liver)
    for _ in range(3):
        start = np.array([-0.15, -0.05])
        image += 0.09 * liver * canvas.line(np.stack([start, start + rng.uniform([-0.4, -0.25], [-0.1, 0.2])]), 0.014)
    image = over(image, 0.6, canvas.disc(0.56, 0.02, 0.14, 0.24, turn=0.3, soft=1.5))
    for side in (-1.0, 1.0):
        x, y = side * rng.uniform(0.3, 0.36), 0.27
        image = over(image, 0.78, canvas.disc(x, y, 0.1, 0.13, turn=side * 0.5, soft=1.5))
        image = over(image, 0.5, canvas.disc(x - side * 0.04, y, 0.04, 0.05, soft=1.5))
    image = over(image, 0.95, canvas.disc(0, 0.3, 0.13, 0.1, soft=1.5))
    image = over(image, 0.4, canvas.disc(0, 0.38, 0.05, 0.04, soft=1.0))
    image = over(image, 0.85, canvas.disc(0.04, 0.13, 0.06, soft=1.5))
    image = over(image, 0.07, canvas.disc(rng.uniform(0.15, 0.35), -0.3, 0.13, 0.07, soft=1.5))
    return _LIVER_LESIONS[lesion](canvas, rng, image, liver)


def _around(angle: float, rx: float, ry: float) -> tuple[float, float]:
    return float(rx * np.sin(angle)), float(-ry * np.cos(angle))


def _place_in_liver(rng: np.random.Generator) -> tuple[float, float]:
    return float(rng.uniform(-0.5, -0.2)), float(rng.uniform(-0.2, 0.08))


def _liver_cyst(canvas: Canvas, rng: np.random.Generator, image: Field, liver: Field) -> Drawing:
    radius = rng.uniform(0.13, 0.19)
    cover = canvas.disc(*_place_in_liver(rng), radius, soft=1.2) * liver
    return over(image, 0.3, cover), cover


def _metastases(canvas: Canvas, rng: np.random.Generator, image: Field, liver: Field) -> Drawing:
    """Two to four blurred dark spots with a brighter rim."""
    cover = np.zeros(image.shape)
    for _ in range(rng.integers(4, 7)):
        (x, y), radius = _place_in_liver(rng), rng.uniform(0.06, 0.09)
        spot = canvas.bump(x, y, radius) * liver
        image = image - 0.2 * spot + 0.14 * (canvas.bump(x, y, 1.7 * radius) * liver - spot).clip(0)
        cover = np.maximum(cover, spot)
    return image, cover


_LIVER_LESIONS = {"none": _no_lesion, "cyst": _liver_cyst, "metastases": _metastases}
