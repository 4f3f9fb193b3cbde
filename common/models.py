"""Networks: a body whose parameters are shared, and a last layer, the head, that belongs to the task.

GroupNorm only. BatchNorm mixes patients, in training and in its running statistics, and is refused.
"""

from __future__ import annotations

import threading
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.images import split_modality, standardise
from common.mapping import MAPPING, add_mapping
from common.params import Params, detach
from common.plan import ModelSpec, TaskSpec

BODY, HEAD = "body.", "head."  # prefixes of parameter names
_GROUP_WIDTH = 8  # channels per group
_CHUNK = 200  # images in one forward pass without gradients
_SEEDED = threading.Lock()  # initial values come from torch's global state, which threads share


class Network(nn.Module):
    """`body`: inputs (B, C, H, W) -> features (B, F), or (B, F, H, W) where the task is about pixels; `head`: features
    -> outputs, starting at zero.

    With `modalities` the inputs have one more channel, which says each image's modality (`images.with_modality`).
    Where the plan trains a mapping, `encoder` and `mapping` are the two networks of `common.mapping`.
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = head
        for parameter in head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs of normalised inputs: logits (B, ways), (B, ways, H, W), or images (B, C, H, W)."""
        outputs: Tensor = self.head(self.body(inputs))
        return outputs


def build_model(model: ModelSpec, task: TaskSpec, *, ways: int, seed: int = 0) -> Network:
    """The plan's network with a zero head; all other initial values depend on `seed` alone."""
    with _SEEDED, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # no other device's, for which traces of the call would pile up
        body, features = _BODIES[model.name](task.channels, model.width, len(task.modalities))
        network = Network(body, _head(model, task, features, ways))
        if model.trainable == "mapping":
            film = part_names(network, "film")
            sizes = {name: value.numel() for name, value in network.named_parameters() if name in film}
            add_mapping(network, features, {name: n for name, n in sizes.items() if not name.startswith(HEAD)})
    refuse_batch_norm(network)
    return network


def _head(model: ModelSpec, task: TaskSpec, features: int, ways: int) -> nn.Module:
    if model.name == "autoencoder":
        return nn.Conv2d(features, task.channels, 3, padding=1)
    return nn.Conv2d(features, ways, 1) if model.name == "unet" else nn.Linear(features, ways)


def refuse_batch_norm(network: nn.Module) -> None:
    """Raise ValueError if any module normalises over the batch or keeps running statistics, frozen or not."""
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "running_mean", None) is not None:
            raise ValueError(f"{name} is a {type(module).__name__}: it mixes patients; use GroupNorm")


def parameters(network: nn.Module) -> Params:
    """All parameters by name, as copies."""
    return detach(dict(network.named_parameters()))


def part_names(network: nn.Module, part: str) -> tuple[str, ...]:
    """Names of the trainable part: 'all' (body and head), 'film' (scales and shifts of the normalisation layers, and
    the head), 'head', or 'mapping' (the network that sets scales and shifts, and the head)."""
    names = [name for name, _ in network.named_parameters()]
    prefixes = {"all": (BODY, HEAD), "mapping": (MAPPING, HEAD)}.get(part, (HEAD,))
    film = _film_names(network) if part == "film" else set()
    return tuple(name for name in names if name in film or name.startswith(prefixes))


def _film_names(network: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}"
        for prefix, module in network.named_modules()
        if isinstance(module, (nn.GroupNorm, _ModalityFilm))
        for name, _ in module.named_parameters()
    }


def shared_names(network: nn.Module, model: ModelSpec) -> tuple[str, ...]:
    """Names that travel: the trainable part, with the head only where the plan shares it."""
    names = part_names(network, model.trainable)
    return tuple(name for name in names if model.head == "shared" or not name.startswith(HEAD))


def head_names(network: nn.Module, model: ModelSpec) -> tuple[str, ...]:
    """Names that stay at the site: the head, unless the plan shares it."""
    if model.head == "shared":
        return ()
    return tuple(name for name, _ in network.named_parameters() if name.startswith(HEAD))


def _groups(channels: int) -> int:
    return max(1, channels // _GROUP_WIDTH)


class _ModalityFilm(nn.Module):
    """y = GroupNorm(x) * (1 + scale_m) + shift_m, m the image's modality; the table starts at zero.

    FiLM (Perez et al. 2018, arXiv:1709.07871) by a table, since the condition is one of a few names.
    """

    def __init__(self, channels: int, modalities: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.table = nn.Embedding(modalities, 2 * channels)
        nn.init.zeros_(self.table.weight)

    def forward(self, maps: Tensor, modality: Tensor) -> Tensor:
        scale, shift = self.table(modality).unsqueeze(2).unsqueeze(3).chunk(2, dim=1)
        conditioned: Tensor = self.norm(maps) * (1 + scale) + shift
        return conditioned


class _Stages(nn.Sequential):
    """Layers one after the other; those that are conditioned on the modality are told it."""

    def forward(self, maps: Tensor, modality: Tensor | None = None) -> Tensor:
        for layer in self:
            maps = layer(maps, modality) if isinstance(layer, (_ModalityFilm, _Residual)) else layer(maps)
        return maps


class _Body(_Stages):
    """Stages that read the modality, where there are several, from the last channel of their input."""

    def __init__(self, *layers: nn.Module, conditioned: bool) -> None:
        super().__init__(*layers)
        self._conditioned = conditioned

    def forward(self, inputs: Tensor, modality: Tensor | None = None) -> Tensor:
        return super().forward(*split_modality(inputs)) if self._conditioned else super().forward(inputs)


def _norm(channels: int, modalities: int) -> nn.Module:
    if modalities:
        return _ModalityFilm(channels, modalities)
    return nn.GroupNorm(_groups(channels), channels)


def _stage(incoming: int, outgoing: int, modalities: int, *, kernel: int = 3) -> list[nn.Module]:
    """Convolution with stride 2 in place of pooling (3.7 times faster on a CPU), normalisation, ReLU."""
    convolution = nn.Conv2d(incoming, outgoing, kernel, stride=2, padding=kernel // 2)
    return [convolution, _norm(outgoing, modalities), nn.ReLU()]


def _conv4(channels: int, width: int, modalities: int) -> tuple[nn.Module, int]:
    """Conv-4 (Vinyals 2016), widening: four strided stages, mean over the image."""
    widths = [width, 2 * width, 3 * width, 4 * width]
    stages = _stage(channels, width, modalities, kernel=5)
    for incoming, outgoing in pairwise(widths):
        stages += _stage(incoming, outgoing, modalities)
    features = widths[-1]
    layers = (_Standardise(), *stages, MeanOverImage(), FeatureNorm(features))
    return _Body(*layers, conditioned=modalities > 0), features


class _Residual(nn.Module):
    def __init__(self, incoming: int, outgoing: int, modalities: int) -> None:
        super().__init__()
        self.first = _Stages(*_stage(incoming, outgoing, modalities))
        self.second = _Stages(nn.Conv2d(outgoing, outgoing, 3, padding=1), _norm(outgoing, modalities))
        self.shortcut = nn.Conv2d(incoming, outgoing, 1, stride=2)

    def forward(self, maps: Tensor, modality: Tensor | None = None) -> Tensor:
        return torch.relu(self.second(self.first(maps, modality), modality) + self.shortcut(maps))


def _resnet(channels: int, width: int, modalities: int) -> tuple[nn.Module, int]:
    """ResNet (He 2016; one block a stage): a strided stem and three stages of doubling width."""
    blocks = [_Residual(width * 2**i, width * 2 ** (i + 1), modalities) for i in range(3)]
    stem = _stage(channels, width, modalities, kernel=5)
    layers = (_Standardise(), *stem, *blocks, MeanOverImage(), FeatureNorm(8 * width))
    return _Body(*layers, conditioned=modalities > 0), 8 * width


def _unet(channels: int, width: int, modalities: int) -> tuple[nn.Module, int]:
    """U-Net (Ronneberger 2015, arXiv:1505.04597) as MONAI builds it, two levels down: features of every pixel."""
    from monai.networks.nets.unet import UNet  # here: its import takes two seconds

    network = UNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=width,
        channels=(width, 2 * width, 4 * width, 4 * width),
        strides=(1, 2, 2),
        norm=("GROUP", {"num_groups": _groups(width)}),
        act="RELU",
    )
    return nn.Sequential(_Standardise(), network), width


def _autoencoder(channels: int, width: int, modalities: int) -> tuple[nn.Module, int]:
    """Three strided stages to an eighth of the image's side, rounded up, and back by doubling; the rest is cut off."""
    down = [*_stage(channels, width, 0), *_stage(width, 2 * width, 0), *_stage(2 * width, 2 * width, 0)]
    up: list[nn.Module] = []
    for incoming, outgoing in ((2 * width, 2 * width), (2 * width, width), (width, width)):
        convolution = nn.Conv2d(incoming, outgoing, 3, padding=1)
        up += [nn.Upsample(scale_factor=2), convolution, _norm(outgoing, 0), nn.ReLU()]
    return _AsLargeAsTheImage(_Standardise(), *down, *up), width


class _AsLargeAsTheImage(_Stages):
    def forward(self, maps: Tensor, modality: Tensor | None = None) -> Tensor:
        return super().forward(maps)[..., : maps.shape[2], : maps.shape[3]]


class _Standardise(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return standardise(images)


class MeanOverImage(nn.Module):
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
        return self._centred(features) * self.gain

    def row_gradients(self, features: Tensor, gradient: Tensor) -> Params:
        """What each row's gradient at the output (n, F) is in the centre (n, F) and in the gain (n, 1)."""
        return {"centre": -self.gain * gradient, "gain": (gradient * self._centred(features)).sum(dim=1, keepdim=True)}

    def _centred(self, features: Tensor) -> Tensor:
        return functional.normalize(features, dim=1) - self.centre


@torch.no_grad()
def feature_centre(network: Network, inputs: Tensor) -> Params:
    """Centre and gain under which the body's features of `inputs` (as `forward` takes them) have mean 0 and mean square
    norm 1; nothing for a network of pixels, which has no FeatureNorm."""
    norms = [(name, module) for name, module in network.named_modules() if isinstance(module, FeatureNorm)]
    if not norms:
        return {}
    ((name, norm),) = norms
    norm.centre.zero_()
    norm.gain.fill_(1.0)
    features = torch.cat([network.body(chunk) for chunk in inputs.split(_CHUNK)])
    mean = features.mean(dim=0)
    gain = (features - mean).square().sum(dim=1).mean().clamp(min=1e-12).rsqrt().reshape(1)
    return {f"{name}.centre": mean, f"{name}.gain": gain}


_BODIES = {"conv4": _conv4, "resnet": _resnet, "unet": _unet, "autoencoder": _autoencoder}
