"""Networks: what is shared, what moves, and what may not be in them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from common.images import normalise, with_modality
from common.models import (
    Network,
    build_model,
    feature_centre,
    head_names,
    parameters,
    part_names,
    refuse_batch_norm,
    shared_names,
)
from common.params import Params
from common.plan import ModelSpec, TaskSpec

NETWORKS = [("conv4", 1), ("conv4", 3), ("resnet", 1)]
SIZES = TaskSpec.model_json_schema()["properties"]["image_size"]["enum"]
needs_monai = pytest.mark.skipif(find_spec("monai") is None, reason="MONAI is not installed: no U-Net")
EVERY = [
    ("conv4", "classification"),
    ("resnet", "multilabel"),
    pytest.param("unet", "segmentation", marks=needs_monai),
    ("autoencoder", "anomaly"),
]
CONDITIONED = [
    ("conv4", "classification", 0),
    ("conv4", "classification", 2),
    ("resnet", "multilabel", 0),
    ("resnet", "multilabel", 2),
    pytest.param("unet", "segmentation", 0, marks=needs_monai),
    ("autoencoder", "anomaly", 0),
]


def task(channels: int = 1, size: int = 32, kind: str = "classification", modalities: int = 0) -> TaskSpec:
    return TaskSpec.model_validate(
        {
            "kind": kind,
            "image_size": size,
            "channels": channels,
            "label_sets": {"two": ["no", "yes"]},
            "modalities": [f"m{number}" for number in range(modalities)],
        }
    )


def built(name: str, kind: str, *, channels: int = 1, size: int = 16, modalities: int = 0, seed: int = 0) -> Network:
    """A network whose head is not zero, so that every parameter matters."""
    spec = ModelSpec.model_validate({"name": name, "width": 8, "head": "shared"})
    network = build_model(spec, task(channels, size, kind, modalities), ways=2, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return network


@pytest.mark.parametrize(("name", "channels"), NETWORKS)
@pytest.mark.parametrize("size", [16, 28, 64])
def test_logits_for_every_image_and_label(name: str, channels: int, size: int) -> None:
    network = build_model(ModelSpec(name=name, width=8), task(channels, size), ways=5)
    for batch in (0, 1, 3):
        assert network(torch.randn(batch, channels, size, size)).shape == (batch, 5)


@pytest.mark.parametrize(("name", "channels"), NETWORKS)
def test_an_image_s_logits_do_not_depend_on_its_neighbours(name: str, channels: int) -> None:
    network = build_model(ModelSpec(name=name, width=8), task(channels), ways=2).train()
    nn.init.normal_(network.head.weight)
    images = torch.randn(4, channels, 32, 32)
    together = network(images)
    alone = torch.cat([network(image.unsqueeze(0)) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)
    assert not list(network.buffers())


def test_brightness_and_contrast_of_a_scanner_hardly_matter() -> None:
    network = build_model(ModelSpec(width=8), task(), ways=2)
    images = torch.randn(4, 1, 32, 32)
    assert torch.allclose(network.body(images), network.body(3.0 * images + 1.0), atol=0.2)
    assert not torch.allclose(network.body(images), network.body(-images), atol=0.2)


def test_parts() -> None:
    network = build_model(ModelSpec(name="resnet", width=8), task(), ways=2)
    every = {name for name, _ in network.named_parameters()}
    norms = {
        f"{n}.{leaf}" for n, m in network.named_modules() if isinstance(m, nn.GroupNorm) for leaf in ("weight", "bias")
    }
    head = {"head.weight", "head.bias"}
    assert set(part_names(network, "all")) == every
    assert set(part_names(network, "film")) == norms | head
    assert set(part_names(network, "head")) == head
    assert len(norms) == 2 * 7


@pytest.mark.parametrize("part", ["all", "film"])
def test_a_site_s_head_does_not_travel_and_a_shared_one_does(part: str) -> None:
    network = build_model(ModelSpec(width=8), task(), ways=2)
    own, shared = (ModelSpec(width=8, trainable=part, head=head) for head in ("site", "shared"))
    assert set(shared_names(network, shared)) == set(part_names(network, part))
    assert set(shared_names(network, own)) | set(head_names(network, own)) == set(part_names(network, part))
    assert set(head_names(network, own)) == {"head.weight", "head.bias"}
    assert head_names(network, shared) == ()


def test_the_body_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    one = build_model(ModelSpec(width=8), task(), ways=2, seed=4)
    torch.manual_seed(1)
    two, other = (build_model(ModelSpec(width=8), task(), ways=3, seed=seed) for seed in (4, 5))
    weights = [network.body[1].weight for network in (one, two, other)]  # type: ignore[index]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not one.head.weight.any()


def test_centred_features_have_mean_zero_and_mean_square_norm_one() -> None:
    network = build_model(ModelSpec(width=8), task(), ways=2)
    inputs = normalise(torch.randint(0, 256, (50, 1, 32, 32), dtype=torch.uint8))
    network.load_state_dict(feature_centre(network, inputs), strict=False)
    with torch.no_grad():
        features = network.body(inputs)
    assert float(features.mean(dim=0).abs().max()) < 1e-4
    assert float(features.square().sum(dim=1).mean()) == pytest.approx(1.0, abs=1e-3)


def test_a_network_of_pixels_has_no_centre() -> None:
    assert feature_centre(built("autoencoder", "anomaly"), torch.zeros(2, 1, 16, 16)) == {}


# ---- every network ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), EVERY[2:])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_pixels_answers_in_the_image_s_size(name: str, kind: str, channels: int) -> None:
    network = built(name, kind, channels=channels)
    with torch.no_grad():
        for size in SIZES:
            outputs = network(torch.randn(1, channels, size, size))
            assert outputs.shape == (1, 2 if name == "unet" else channels, size, size)
        assert network(torch.zeros(0, channels, 16, 16)).shape[0] == 0


@pytest.mark.parametrize(("name", "kind", "modalities"), CONDITIONED)
def test_no_network_normalises_over_a_batch_and_opacus_takes_each(name: str, kind: str, modalities: int) -> None:
    network = built(name, kind, modalities=modalities)
    refuse_batch_norm(network)
    assert ModuleValidator.validate(network, strict=False) == []
    assert not list(network.buffers())
    inputs = inputs_of(3, modalities)
    wrapped = GradSampleModule(network.train(), loss_reduction="sum")
    wrapped(inputs).square().sum().backward()
    of_image = {key: parameter.grad_sample for key, parameter in network.named_parameters()}
    wrapped.to_standard_module()
    for number in range(3):
        alone = torch.autograd.grad(network(inputs[number : number + 1]).square().sum(), list(network.parameters()))
        for key, gradient in zip(of_image, alone, strict=True):
            assert torch.allclose(of_image[key][number], gradient, atol=1e-2, rtol=1e-3), key


def inputs_of(rows: int, modalities: int) -> Tensor:
    images = torch.randn(rows, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return with_modality(images, torch.arange(rows) % modalities) if modalities else images


@pytest.mark.parametrize(("name", "kind", "modalities"), CONDITIONED)
def test_many_parameters_at_once_are_one_after_the_other(name: str, kind: str, modalities: int) -> None:
    """vmap over parameters and inputs, and gradients under it."""
    networks = [built(name, kind, modalities=modalities, seed=seed) for seed in (1, 2)]
    stacked = {
        key: torch.stack([dict(network.named_parameters())[key].detach() for network in networks])
        for key in parameters(networks[0])
    }
    inputs = torch.stack([inputs_of(2, modalities), inputs_of(2, modalities).flip(0)])

    def loss(params: Params, x: Tensor) -> Tensor:
        outputs: Tensor = functional_call(networks[0], params, (x,))
        return outputs.square().mean()

    together = vmap(grad(loss))(stacked, inputs)
    for number, network in enumerate(networks):
        alone = grad(loss)(parameters(network), inputs[number])
        for key, value in alone.items():
            assert torch.allclose(together[key][number], value, atol=1e-4, rtol=1e-3), key


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_film_is_the_scale_and_shift_of_every_normalisation_and_the_head(name: str, kind: str) -> None:
    network = built(name, kind)
    norms = [key for key, module in network.named_modules() if isinstance(module, nn.GroupNorm)]
    wanted = {f"{key}.{leaf}" for key in norms for leaf in ("weight", "bias")} | {"head.weight", "head.bias"}
    assert len(norms) == {"conv4": 4, "resnet": 7, "unet": 6, "autoencoder": 6}[name]
    assert set(part_names(network, "film")) == wanted
    assert set(part_names(network, "mapping")) == {"head.weight", "head.bias"}


# ---- conditioned on the modality ----------------------------------------------------------------------------------


def conditioned_and_plain(name: str) -> tuple[Network, Network]:
    """The same values in a network with a modality table and in one without."""
    conditioned, plain = built(name, "classification", modalities=3), built(name, "classification")
    values = {key.replace(".norm.", "."): value for key, value in conditioned.state_dict().items()}
    plain.load_state_dict({key: value for key, value in values.items() if ".table." not in key})
    return conditioned, plain


@pytest.mark.parametrize("name", ["conv4", "resnet"])
def test_a_table_of_zeros_is_no_condition(name: str) -> None:
    conditioned, plain = conditioned_and_plain(name)
    images = torch.randn(6, 1, 16, 16)
    with torch.no_grad():
        got = conditioned(with_modality(images, torch.arange(6) % 3))
        assert torch.allclose(got, plain(images), atol=1e-6)


@pytest.mark.parametrize("name", ["conv4", "resnet"])
def test_a_modality_s_row_of_the_table_moves_its_own_images_only(name: str) -> None:
    network, _ = conditioned_and_plain(name)
    modalities = torch.tensor([0, 1, 2, 1, 0, 2])
    inputs = with_modality(torch.randn(6, 1, 16, 16), modalities)
    with torch.no_grad():
        before = network(inputs)
        for key, parameter in network.named_parameters():
            if ".table." in key:
                parameter[1] += torch.randn(parameter.shape[1])
        moved = (network(inputs) - before).abs().amax(dim=1) > 1e-4
    assert moved.tolist() == (modalities == 1).tolist()


def test_the_table_is_part_of_film_and_travels() -> None:
    network = built("conv4", "classification", modalities=3)
    tables = {key for key, _ in network.named_parameters() if ".table." in key}
    norms = {key for key, _ in network.named_parameters() if ".norm." in key}
    assert len(tables) == 4
    assert set(part_names(network, "film")) == tables | norms | {"head.weight", "head.bias"}
    assert tables <= set(shared_names(network, ModelSpec(width=8, trainable="film")))
    assert all(not value.any() for key, value in network.state_dict().items() if key in tables)
