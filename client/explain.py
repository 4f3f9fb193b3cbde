"""Where in an image an answer comes from: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391).

    w_c = mean over the map of d score / d A_c,   heat = relu(sum_c w_c A_c),   A: the last maps before their mean

captum has it too, for modules that hold their own parameters; here parameters are arguments, and it is these lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models import MeanOverImage


def grad_cam(network: nn.Module, score: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """(n, H, W) in [0, 1], each image's own largest value 1; zero where nothing speaks for the score.

    `score` maps inputs (n, C, H, W) to (n,) by running `network`, which must take the mean over its last maps; one
    that does not (a network of pixels) raises ValueError.
    """
    layers = [module for module in network.modules() if isinstance(module, MeanOverImage)]
    if len(layers) != 1:
        raise ValueError("the network has no single mean over the image, before which its maps could be shown")
    seen: list[Tensor] = []

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(arguments[0].detach().requires_grad_(True))
        return (seen[-1],)

    handle = layers[0].register_forward_pre_hook(look)
    try:
        with torch.enable_grad():
            total = score(inputs).sum()
    finally:
        handle.remove()
    (maps,) = seen
    (slopes,) = torch.autograd.grad(total, maps)
    heat = torch.relu((slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True)).detach()
    large = functional.interpolate(heat, size=inputs.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
    return large / large.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
