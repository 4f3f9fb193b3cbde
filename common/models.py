"""Networks: a body whose parameters are shared, and a linear head that belongs to the task.

GroupNorm only. BatchNorm mixes patients, in training and in its running statistics, and is refused.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.images import normalise
from common.params import Params, detach
from common.plan import ModelSpec, TaskSpec

HEAD = "head."  # prefix of the head's parameter names
_GROUP_WIDTH = 8  # channels per group
_CHUNK = 200  # images in one forward pass without gradients


class Network(nn.Module):
    """`body`: (B, C, H, W) float -> (B, features); `head`: linear, (B, features) -> (B, ways)."""

    def __init__(self, body: nn.Module, features: int, ways: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, ways)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, ways) of normalised images (B, C, H, W)."""
        logits: Tensor = self.head(self.body(images))
        return logits


def build_model(model: ModelSpec, task: TaskSpec, *, ways: int, seed: int = 0) -> Network:
    """The plan's network with a zero head; the body's initial values depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body, features = _BODIES[model.name](task.channels, model.width)
        network = Network(body, features, ways)
    refuse_batch_norm(network)
    return network


def refuse_batch_norm(network: nn.Module) -> None:
    """Raise ValueError if any module normalises over the batch or keeps running statistics, frozen or not."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "running_mean", None) is not None:
            raise ValueError(f"{name} is a {type(module).__name__}: it mixes patients; use GroupNorm")


def parameters(network: nn.Module) -> Params:
    """All parameters by name, as copies."""
    return detach(dict(network.named_parameters()))


def part_names(network: nn.Module, part: str) -> tuple[str, ...]:
    """Names of the trainable part: 'all', 'film' (GroupNorm scale and shift, and head) or 'head'."""
    names = [name for name, _ in network.named_parameters()]
    if part == "all":
        return tuple(names)
    norms = {
        f"{prefix}.{leaf}"
        for prefix, module in network.named_modules()
        if isinstance(module, nn.GroupNorm)
        for leaf in ("weight", "bias")
    }
    wanted = norms if part == "film" else set()
    return tuple(name for name in names if name in wanted or name.startswith(HEAD))


def shared_names(network: nn.Module, model: ModelSpec) -> tuple[str, ...]:
    """Names that travel: the trainable part, with the head only where the plan shares it."""
    names = part_names(network, model.trainable)
    return tuple(name for name in names if model.head == "shared" or not name.startswith(HEAD))


def head_names(network: nn.Module, model: ModelSpec) -> tuple[str, ...]:
    """Names that stay at the site: the head, unless the plan shares it."""
    if model.head == "shared":
        return ()
    return tuple(name for name, _ in network.named_parameters() if name.startswith(HEAD))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // _GROUP_WIDTH), channels)


def _stage(incoming: int, outgoing: int, *, kernel: int = 3) -> list[nn.Module]:
    """Convolution with stride 2 in place of pooling (3.7 times faster on a CPU), GroupNorm, ReLU."""
    return [nn.Conv2d(incoming, outgoing, kernel, stride=2, padding=kernel // 2), _norm(outgoing), nn.ReLU()]


def _conv4(channels: int, width: int) -> tuple[nn.Module, int]:
    """Conv-4 (Vinyals 2016), widening: four strided stages, mean over the image."""
    widths = [width, 2 * width, 3 * width, 4 * width]
    stages = _stage(channels, width, kernel=5)
    for incoming, outgoing in pairwise(widths):
        stages += _stage(incoming, outgoing)
    return nn.Sequential(_Standardise(), *stages, _MeanOverImage(), FeatureNorm(widths[-1])), widths[-1]


class _Residual(nn.Module):
    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_stage(incoming, outgoing))
        self.second = nn.Sequential(nn.Conv2d(outgoing, outgoing, 3, padding=1), _norm(outgoing))
        self.shortcut = nn.Conv2d(incoming, outgoing, 1, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(images)) + self.shortcut(images))


def _resnet(channels: int, width: int) -> tuple[nn.Module, int]:
    """ResNet with GroupNorm (He 2016; one block a stage): a strided stem and three stages of doubling width."""
    blocks = [_Residual(width * 2**i, width * 2 ** (i + 1)) for i in range(3)]
    stem = _stage(channels, width, kernel=5)
    return nn.Sequential(_Standardise(), *stem, *blocks, _MeanOverImage(), FeatureNorm(8 * width)), 8 * width


class _Standardise(nn.Module):
    """Each image to mean 0 and deviation 1, by itself: scanners differ in brightness and contrast."""

    def forward(self, images: Tensor) -> Tensor:
        centred = images - images.mean(dim=(1, 2, 3), keepdim=True)
        return centred / (centred.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() + 0.1)


class _MeanOverImage(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3))


class FeatureNorm(nn.Module):
    """(f / ||f|| - centre) * gain.

    The centre is that of public images, set after pre-training. A zero head over centred features learns in a few
    steps what class means would say; over uncentred ones it first has to unlearn what all images share.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(features))
        self.gain = nn.Parameter(torch.tensor([float(features) ** 0.5]))

    def forward(self, features: Tensor) -> Tensor:
        return (functional.normalize(features, dim=1) - self.centre) * self.gain


@torch.no_grad()
def feature_centre(network: Network, images: Tensor) -> Params:
    """Centre and gain under which the body's features of `images` (uint8) have mean 0 and mean square norm 1."""
    ((name, norm),) = [(name, module) for name, module in network.named_modules() if isinstance(module, FeatureNorm)]
    norm.centre.zero_()
    norm.gain.fill_(1.0)
    features = torch.cat([network.body(normalise(chunk)) for chunk in images.split(_CHUNK)])
    mean = features.mean(dim=0)
    gain = (features - mean).square().sum(dim=1).mean().clamp(min=1e-12).rsqrt().reshape(1)
    return {f"{name}.centre": mean, f"{name}.gain": gain}


_BODIES = {"conv4": _conv4, "resnet": _resnet}
