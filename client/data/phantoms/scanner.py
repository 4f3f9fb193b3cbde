"""How a hospital's device makes an image of what was drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from client.data.phantoms.canvas import Field, blur

_LETTERS = {  # 5 x 3 pixels
    "L": ("100", "100", "100", "100", "111"),
    "R": ("110", "101", "110", "101", "101"),
    "P": ("110", "101", "110", "100", "100"),
}


@dataclass(frozen=True)
class Scanner:
    """The style of one hospital."""

    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.03  # standard deviation, of 1
    blur: float = 0.4  # pixels
    vignette: float = 0.0  # how much darker the corners are, of 1
    marker: str = ""  # an orientation letter in the upper corner

    def expose(self, image: Field, rng: np.random.Generator) -> Field:
        """The image (k, S, S) in 0..1 as this scanner shows it; the noise is new for each image."""
        size = image.shape[-1]
        drift = rng.normal(0, 0.03, (2, len(image), 1, 1))  # no two exposures are the same
        shown = np.clip(blur(image, self.blur, self.blur), 0, 1) ** (self.gamma * np.exp(drift[0]))
        shown = (shown - 0.5) * self.contrast + 0.5 + self.brightness + 0.5 * drift[1]
        line = np.linspace(-1, 1, size)
        shown = shown * (1 - 0.5 * self.vignette * (line[:, None] ** 2 + line[None, :] ** 2))
        shown = shown + rng.normal(0, self.noise, shown.shape)
        marked: Field = np.clip(self._marked(shown), 0, 1)
        return marked

    def _marked(self, image: Field) -> Field:
        if not self.marker:
            return image
        scale = max(1, image.shape[-1] // 48)
        bits = np.array([[int(bit) for bit in row] for row in _LETTERS[self.marker]])
        letter = np.kron(bits, np.ones((scale, scale)))
        height, width = letter.shape
        left = 2 if self.marker == "R" else image.shape[-1] - width - 2  # the patient's right is on our left
        corner = image[:, 2 : 2 + height, left : left + width]
        corner[:] = np.where(letter > 0, 0.95, corner)
        return image
