"""Model mapping: the identity at the start, the right gradient through everything, and no order among classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.algorithms import ALGORITHMS, LocalUpdate
from common.algorithms.class_means import means_of
from common.algorithms.prototypes import prototypes_of
from common.inner_loop import adapt
from common.mapping import TASK_NUMBERS, Modulation, TaskEncoder, modulate, task_vector
from common.models import build_model, parameters, part_names
from common.params import Params, norm, subtract
from common.plan import AdaptationSpec, AlgorithmSpec, ModelSpec
from tests.exact_queries import CLASSES, WAYS, ExactQueries, conv_learner, images, written_out_loss

SPEC = AlgorithmSpec(name="mapping", inner_steps=1, inner_lr=0.1, head_lr=0.3)


def exact() -> tuple[ExactQueries, Params]:
    """Exact queries on a network whose mapping and head have learned something, and both of them to travel."""
    learner, params = conv_learner("mapping")
    shared = {name: value for name, value in params.items() if name.startswith(("mapping.", "head."))}
    return ExactQueries(learner, params, images(9, 0)), shared


def film_names(network: nn.Module) -> set[str]:
    return set(part_names(network, "film")) - {"head.weight", "head.bias"}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_at_the_start_the_mapping_is_the_identity_for_every_task(seed: int) -> None:
    network = build_model(ModelSpec(width=8, trainable="mapping"), CLASSES, ways=WAYS, seed=seed)
    params = parameters(network)
    rng = torch.Generator().manual_seed(seed)
    params |= {name: torch.randn(params[name].shape, generator=rng) for name in film_names(network)}
    film = modulate(network, params, torch.randn(TASK_NUMBERS, generator=rng))
    assert film.keys() == film_names(network)
    assert all(torch.equal(value, params[name]) for name, value in film.items())


def test_the_modulation_is_the_formula() -> None:
    """K * (1 + U h) + V h with h = tanh(W T + w)."""
    mapping = Modulation({"a": 2, "b": 3})
    for parameter in mapping.parameters():
        nn.init.normal_(parameter)
    task, shared = torch.randn(TASK_NUMBERS), torch.randn(5)
    h = torch.tanh(mapping.code.weight @ task + mapping.code.bias)
    wanted = shared * (1 + mapping.factor.weight @ h) + mapping.shift.weight @ h
    assert torch.allclose(mapping(task, shared), wanted, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(ways=st.integers(2, 9), seed=st.integers(0, 1000))
def test_the_encoder_does_not_see_the_order_of_the_classes_and_has_norm_one(ways: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    encoder, prototypes = TaskEncoder(12), torch.randn(ways, 12, generator=rng)
    vector = encoder(prototypes)
    assert torch.allclose(vector, encoder(prototypes[torch.randperm(ways, generator=rng)]), atol=1e-5)
    assert vector.shape == (TASK_NUMBERS,)
    assert float(vector.detach().norm()) == pytest.approx(1.0, abs=1e-5)
    assert not torch.allclose(vector, encoder(prototypes + 1.0), atol=1e-3)


def test_an_encoder_that_reads_classes_in_order_is_noticed() -> None:
    """The planted error: the first class instead of the mean over classes."""

    class First(TaskEncoder):
        def forward(self, prototypes: Tensor) -> Tensor:
            return nn.functional.normalize(self.of_task(self.of_class(prototypes)[..., 0, :]), dim=-1)

    encoder, prototypes = First(12), torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(encoder(prototypes), encoder(prototypes.flip(0)), atol=1e-5)


def one_step() -> tuple[LocalUpdate, Params]:
    """What one round does, and what autograd through mapping, backbone, head and loss at once says it should."""
    private, shared = exact()
    network, params = private.learner.network, private.public
    local = ALGORITHMS["mapping"].local_update(shared, {}, private, SPEC)
    task = task_vector(network, params, prototypes_of(private.class_sums({}))[0])
    leaves = {name: value.clone().requires_grad_() for name, value in shared.items()}
    order = [name for name in params if name in film_names(network)]
    k = torch.cat([params[name].flatten() for name in order])
    h = torch.tanh(leaves["mapping.code.weight"] @ task + leaves["mapping.code.bias"])
    values = k * (1 + leaves["mapping.factor.weight"] @ h) + leaves["mapping.shift.weight"] @ h
    pieces = values.split([params[name].numel() for name in order])
    film = {name: piece.reshape(params[name].shape) for name, piece in zip(order, pieces, strict=True)}
    loss = written_out_loss(network, params | leaves | film, private.batch)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    rates = [-0.3 if name.startswith("head.") else -0.1 for name in leaves]
    return local, {name: rate * g for name, rate, g in zip(leaves, rates, gradients, strict=True)}


def right(local: LocalUpdate, wanted: Params) -> bool:
    """Every tensor of the update by itself: the large ones must not hide the small."""
    return local.update.keys() == wanted.keys() and all(
        norm({name: local.update[name] - value}) < 1e-8 * norm({name: value}) for name, value in wanted.items()
    )


def test_the_mapping_follows_the_gradient_through_everything() -> None:
    assert right(*one_step())


def test_a_way_back_without_the_factor_of_k_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: the factor's gradient lacks K, as if the scales were added and not multiplied."""

    def forward(self: Modulation, task: Tensor, shared: Tensor) -> Tensor:
        code = torch.tanh(self.code(task))
        factor = self.factor(code)
        value = shared * (1 + factor.detach()) + self.shift(code)
        return value + factor - factor.detach()

    monkeypatch.setattr(Modulation, "forward", forward)
    assert not right(*one_step())


def test_a_gradient_at_the_unmapped_backbone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: G is asked at K, not at phi."""
    honest = ExactQueries.gradient

    def at_k(self: ExactQueries, params: Params, fixed: Params | None = None) -> Params:
        return honest(self, {name: self.public[name] for name in params}, fixed)

    monkeypatch.setattr(ExactQueries, "gradient", at_k)
    assert not right(*one_step())


def test_from_a_fresh_head_the_head_takes_the_first_step() -> None:
    """Under a zero head no backbone has a gradient; under the stepped head it has."""
    private, shared = exact()
    psi = {name: value for name, value in shared.items() if name.startswith("mapping.")}
    head = {name: torch.zeros_like(value) for name, value in shared.items() if name.startswith("head.")}
    local_update = ALGORITHMS["mapping"].local_update
    one, two = (local_update(psi, head, private, SPEC.model_copy(update={"inner_steps": steps})) for steps in (1, 2))
    assert norm(one.update) < 1e-12
    assert norm(two.update) > 1e-3
    assert private.asked == 2 + 3
    again = local_update(psi, one.kept, private, SPEC)
    assert norm(subtract({n: again.kept[n] for n in head}, {n: one.kept[n] for n in head})) < 1e-12


def test_a_site_keeps_the_backbone_that_its_mapping_gives() -> None:
    """The monitor scores what the site would use."""
    private, shared = exact()
    local = ALGORITHMS["mapping"].local_update(shared, {}, private, SPEC)
    network, psi = private.learner.network, {name: value + local.update[name] for name, value in shared.items()}
    task = task_vector(network, private.public, prototypes_of(private.class_sums({}))[0])
    wanted = modulate(network, private.public | psi, task)
    assert all(torch.allclose(local.kept[name], value, atol=1e-12) for name, value in wanted.items())


def test_a_new_hospital_starts_from_its_own_backbone() -> None:
    private, _ = exact()
    learner, params, support = private.learner, private.public, images(6, 5)
    spec = AdaptationSpec(trainable="head", steps=3, lr=0.1)
    got = ALGORITHMS["mapping"].adapt(learner, params, support, spec, SPEC)
    film = modulate(
        learner.network, params, task_vector(learner.network, params, means_of(learner, params, support)[0])
    )
    by_hand = adapt(learner, params | film, support, spec)
    assert all(torch.allclose(got[name], by_hand[name], atol=1e-12) for name in params)
    assert not any(torch.equal(got[name], params[name]) for name in film)
