"""How pixels become the network's input, the same everywhere."""

from __future__ import annotations

from torch import Tensor


def normalise(images: Tensor) -> Tensor:
    """Pixels 0-255 (uint8 or float) to float32 about 0, by public constants and never by the data's own."""
    return (images.float() / 255.0 - 0.5) / 0.25
