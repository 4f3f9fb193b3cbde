"""How pixels become the network's input, the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise(images: Tensor) -> Tensor:
    """Pixels 0-255 (uint8 or float) to float32 about 0, by public constants and never by the data's own."""
    return (images.float() / 255.0 - 0.5) / 0.25


def standardise(images: Tensor) -> Tensor:
    """Each image (B, C, H, W) to mean 0 and deviation about 1, by itself: scanners differ in both."""
    centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
    return centred / (centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)


def with_modality(inputs: Tensor, modalities: Tensor) -> Tensor:
    """(B, C, H, W) and int64 (B,) to (B, C + 1, H, W): a conditioned network reads its modality from the last channel.

    So everything that handles a batch of inputs, and every transformation over it, needs to know of one tensor only.
    """
    plane = modalities.to(inputs).reshape(-1, 1, 1, 1).expand(-1, 1, *inputs.shape[2:])
    return torch.cat([inputs, plane], dim=1)


def split_modality(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `with_modality`."""
    return inputs[:, :-1], inputs[:, -1, 0, 0].long()
