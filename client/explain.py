"""Where in an image an answer comes from: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391).

    w_c = H W * mean over the map of d score / d A_c,   heat = relu(sum_c w_c A_c),   A: the last maps before their mean

So heat is in units of the score: how much it would rise, to first order, if the whole image looked like this place.
It is shown on a scale that all images of a model share, for weak evidence must not glow like strong evidence.

captum has it too, for modules that hold their own parameters; here parameters are arguments, and it is these lines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.adapted_model import AdaptedModel
from client.answers import error_maps
from common.learner import Learner
from common.models import MeanOverImage

FULL_COLOUR = 3.0  # log-odds: from a probability of 0.5 to 0.95
_SPOT = 16  # pixels: the stride of the last maps of conv4 and resnet


def explanation(model: AdaptedModel, learner: Learner, inputs: Tensor, answers: Tensor) -> Tensor | None:
    """(n, H, W) in [0, 1]: what speaks for each answer, at full colour where `scale_in_words` says; None for masks,
    which show themselves."""
    kind = model.facts.kind
    if kind == "segmentation":
        return None
    if kind == "anomaly":
        usual = _unusual(model, learner, model.support_batch().inputs).amax().clamp(min=1e-12)
        return (_unusual(model, learner, inputs) / usual).clamp(max=1.0)
    chosen = answers.argmax(dim=1, keepdim=True)

    def log_odds(x: Tensor) -> Tensor:
        cooled = learner.outputs(model.params, x) / (model.facts.temperature or 1.0)
        own = cooled.gather(1, chosen).squeeze(1)
        if kind == "multilabel":
            return own
        return own - cooled.scatter(1, chosen, -torch.inf).logsumexp(dim=1)

    return (grad_cam(learner.network, log_odds, inputs) / FULL_COLOUR).clamp(max=1.0)


def scale_in_words(model: AdaptedModel) -> tuple[str, ...]:
    """What no colour and full colour stand for, and how fine the map is."""
    places = -(-model.facts.image_size // _SPOT)
    fine = f"tells {places}x{places} places apart, no more"
    if model.plan.model.name == "autoencoder":
        fine = f"tells {model.facts.image_size}x{model.facts.image_size} places apart"
    if model.facts.kind == "anomaly":
        return "left: usual", "right: as the least usual place of healthy support", fine
    return "left: nothing speaks for it", f"right: worth log-odds of {FULL_COLOUR:g} or more (0.5 to 0.95)", fine


def _unusual(model: AdaptedModel, learner: Learner, inputs: Tensor) -> Tensor:
    """(n, H, W): by how much each place makes an image unusual."""
    if model.plan.model.name == "autoencoder":
        return error_maps(learner, model.params, inputs)
    with torch.no_grad():
        healthy = learner.features(model.params, model.support_batch().inputs).mean(dim=0)
    return grad_cam(learner.network, lambda x: (learner.features(model.params, x) - healthy).norm(dim=1), inputs)


def grad_cam(network: nn.Module, score: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """(n, H, W) in units of the score; zero where nothing speaks for it.

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
    heat = torch.relu((slopes.sum(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True)).detach()
    return functional.interpolate(heat, size=inputs.shape[2:], mode="bilinear", align_corners=False).squeeze(1)
