"""Grad-CAM on networks whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from client.explain import grad_cam
from common.models import MeanOverImage, Network, build_model
from common.plan import ModelSpec, TaskSpec


def network_of(weights: list[list[float]]) -> Network:
    """The maps are the image's two channels themselves; the head weighs their means."""
    network = Network(nn.Sequential(nn.Identity(), MeanOverImage()), nn.Linear(2, len(weights)))
    network.head.weight.data = torch.tensor(weights)
    return network


IMAGE = torch.zeros(1, 2, 4, 4)
IMAGE[0, 0, 0, 0], IMAGE[0, 0, 3, 3], IMAGE[0, 1, 2, 1] = 4.0, 2.0, 8.0


def test_heat_is_the_weighted_sum_of_the_maps() -> None:
    """With means of maps under a linear head Grad-CAM is relu(sum_c w_c A_c), not scaled by the image."""
    network = network_of([[1.0, 0.0], [0.5, 0.25]])
    first = grad_cam(network, lambda x: network(x)[:, 0], IMAGE)[0]
    assert (first[0, 0], first[3, 3], first[2, 1]) == (4.0, 2.0, 0.0)
    second = grad_cam(network, lambda x: network(x)[:, 1], IMAGE)[0]
    assert (second[0, 0], second[3, 3], second[2, 1]) == (2.0, 1.0, 2.0)


def test_what_speaks_against_an_answer_is_dark() -> None:
    network = network_of([[-1.0, 1.0]])
    heat = grad_cam(network, lambda x: network(x)[:, 0], IMAGE)[0]
    assert (heat[0, 0], heat[2, 1]) == (0.0, 8.0)
    assert not grad_cam(network, lambda x: -network(x)[:, 0], torch.zeros(1, 2, 4, 4)).any()


def test_each_image_has_its_own_heat() -> None:
    network = network_of([[1.0, 1.0]])
    both = torch.cat([IMAGE, IMAGE.flip(2)])
    together = grad_cam(network, lambda x: network(x)[:, 0], both)
    alone = grad_cam(network, lambda x: network(x)[:, 0], IMAGE)
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[0].flip(0))


@pytest.mark.parametrize("name", ["conv4", "resnet"])
def test_networks_of_the_plan_are_explained_and_left_as_they_were(name: str) -> None:
    task = TaskSpec(kind="classification", image_size=32, label_sets={"two": ["a", "b"]})
    network = build_model(ModelSpec(name=name, width=8), task, ways=2)
    network.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    before = network(inputs)
    heat = grad_cam(network, lambda x: network(x)[:, 1], inputs)
    assert heat.shape == (3, 32, 32)
    assert heat.min() >= 0
    assert heat.max() > 0
    assert torch.equal(network(inputs), before)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_network_of_pixels_has_no_mean_to_look_before() -> None:
    with pytest.raises(ValueError, match="no single mean"):
        grad_cam(nn.Conv2d(1, 2, 1), lambda x: x.sum((1, 2, 3)), torch.zeros(1, 1, 4, 4))
