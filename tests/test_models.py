"""Networks: what is shared, what moves, and what may not be in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.models import build_model, feature_centre, head_names, part_names, shared_names
from common.plan import ModelSpec, TaskSpec

NETWORKS = [("conv4", 1), ("conv4", 3), ("resnet", 1)]


def task(channels: int = 1, size: int = 32) -> TaskSpec:
    return TaskSpec(kind="classification", image_size=size, channels=channels, label_sets={"two": ["no", "yes"]})


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
    images = torch.randint(0, 256, (50, 1, 32, 32), dtype=torch.uint8)
    network.load_state_dict(feature_centre(network, images), strict=False)
    with torch.no_grad():
        features = network.body((images.float() / 255 - 0.5) / 0.25)
    assert float(features.mean(dim=0).abs().max()) < 1e-4
    assert float(features.square().sum(dim=1).mean()) == pytest.approx(1.0, abs=1e-3)
