"""Algorithms against closed forms on L(w) = 0.5 ||w - y||^2, whose gradient is w - y (after k steps of rate a,
phi = y + (1-a)^k (w - y)), and against plain autograd. The private queries are exact: only the algorithm is tested."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.algorithms import ALGORITHMS, ClassSums, LocalUpdate
from common.algorithms.class_means import SHARPNESS, adapt_by_class_means, head_of, means_of
from common.algorithms.maml import query_loss_after
from common.algorithms.metasgd import RATE
from common.algorithms.protonet import prototype_loss
from common.algorithms.prototypes import memory_of, prototypes_of, remembered
from common.episodes import Episode, evenly, meta_gradients
from common.models import part_names, shared_names
from common.params import Params, add, norm, select, subtract
from common.plan import AdaptationSpec, AlgorithmSpec, ModelSpec
from common.starting_point import network_of, starting, travelling
from server.start import round_names
from tests.conftest import PlanMaker
from tests.exact_queries import (
    WAYS,
    ExactQueries,
    conv_learner,
    episode,
    images,
    point_learner,
    towards,
    written_out_loss,
)

W, Y = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
HEAD, HEAD_Y = torch.tensor([0.0]), torch.tensor([2.0])
law = settings(max_examples=25, deadline=None)


class Quadratic:
    """Exact gradients of the quadratic on the shared entry 'w' and the head; counts its queries."""

    def __init__(self) -> None:
        self.queries = 0

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        self.queries += 1
        return {name: value - {"w": Y, "head.weight": HEAD_Y}[name] for name, value in params.items()}


def run(name: str, **settings: float) -> tuple[Tensor, Tensor, int]:
    spec = AlgorithmSpec(name=name, **settings)  # type: ignore[arg-type]
    private = Quadratic()
    local = ALGORITHMS[name].local_update({"w": W}, {"head.weight": HEAD}, private, spec)  # type: ignore[arg-type]
    assert local.update.keys() == {"w"}  # the head stays
    assert private.queries == ALGORITHMS[name].queries_per_round(spec)
    return local.update["w"], local.kept["head.weight"], private.queries


steps, rates = st.integers(1, 8), st.floats(0.01, 0.9)


@pytest.mark.parametrize("name", ["reptile", "fedavg"])
@law
@given(k=steps, a=rates)
def test_k_steps(name: str, k: int, a: float) -> None:
    update, head, queries = run(name, inner_steps=k, inner_lr=a)
    assert torch.allclose(update, (1 - (1 - a) ** k) * (Y - W), atol=1e-5)
    assert torch.allclose(head, HEAD_Y + (1 - a) ** k * (HEAD - HEAD_Y), atol=1e-5)
    assert queries == k


@law
@given(k=steps, a=rates)
def test_fomaml_moves_by_the_gradient_at_the_adapted_parameters(k: int, a: float) -> None:
    update, _, queries = run("fomaml", inner_steps=k, inner_lr=a)
    assert torch.allclose(update, -a * (1 - a) ** k * (W - Y), atol=1e-5)
    assert queries == k + 1  # the query step is a private query too


@law
@given(k=steps, a=st.floats(0.01, 0.4), mu=st.floats(0.01, 1.0))
def test_fedprox_pulls_to_the_shared_parameters(k: int, a: float, mu: float) -> None:
    """With the pull, phi - fixed point shrinks by 1 - a(1+mu); the fixed point is (y + mu w)/(1 + mu)."""
    update, head, _ = run("fedprox", inner_steps=k, inner_lr=a, proximal=mu)
    fixed = (Y + mu * W) / (1 + mu)
    assert torch.allclose(W + update, fixed + (1 - a * (1 + mu)) ** k * (W - fixed), atol=1e-5)
    assert torch.allclose(head, HEAD_Y + (1 - a) ** k * (HEAD - HEAD_Y), atol=1e-5)


@pytest.mark.parametrize("name", ["local_only", "transfer"])
def test_an_algorithm_that_shares_nothing_asks_nothing_and_moves_nothing(name: str) -> None:
    update, head, queries = run(name)
    assert queries == 0
    assert torch.equal(update, torch.zeros(3))
    assert torch.equal(head, HEAD)


def test_head_has_its_own_rate() -> None:
    update, head, _ = run("reptile", inner_steps=1, inner_lr=0.1, head_lr=0.5)
    assert torch.allclose(update, 0.1 * (Y - W))
    assert torch.allclose(head, 0.5 * HEAD_Y)


def test_learning_to_learn_starts_from_a_fresh_head_and_baselines_keep_theirs() -> None:
    baselines = {"fedavg", "fedprox", "mrmtl", "local_only", "transfer"}
    assert {name for name, row in ALGORITHMS.items() if not row.learns_to_learn} == baselines
    assert {name for name, row in ALGORITHMS.items() if row.keeps} == baselines | {"prototypes", "mapping"}
    assert {name for name, row in ALGORITHMS.items() if row.asks == "episodes"} == {
        "maml",
        "anil",
        "metasgd",
        "protonet",
    }


# ---- MR-MTL -------------------------------------------------------------------------------------------------------


@law
@given(k=st.integers(1, 4), a=st.floats(0.01, 0.4), pull=st.floats(0.01, 1.0), rounds=st.integers(1, 4))
def test_mrmtl_keeps_a_model_of_its_own_over_rounds(k: int, a: float, pull: float, rounds: int) -> None:
    """The mean theta_r is new in each round; w goes on from where it was, towards (y + pull theta) / (1 + pull)."""
    spec, kept, w = AlgorithmSpec(name="mrmtl", inner_steps=k, inner_lr=a, proximal=pull), {"head.weight": HEAD}, W
    for number in range(rounds):
        theta = W + 0.3 * number
        local = ALGORITHMS["mrmtl"].local_update({"w": theta}, kept, Quadratic(), spec)  # type: ignore[arg-type]
        fixed = (Y + pull * theta) / (1 + pull)
        w = fixed + (1 - a * (1 + pull)) ** k * (w - fixed)
        assert torch.allclose(local.update["w"], w - theta, atol=1e-5)
        kept = local.kept
    assert torch.allclose(kept["personal.w"], w, atol=1e-5)
    assert torch.allclose(kept["head.weight"], HEAD_Y + (1 - a) ** (k * rounds) * (HEAD - HEAD_Y), atol=1e-5)


def mrmtl_alone(pull: float) -> Tensor:
    """The own model after three rounds in which the mean wanders."""
    spec = AlgorithmSpec.model_construct(name="mrmtl", inner_steps=2, inner_lr=0.2, head_lr=None, proximal=pull)
    kept = {"head.weight": HEAD}
    for theta in (W, W + 5, W - 7):
        kept = ALGORITHMS["mrmtl"].local_update({"w": theta}, kept, Quadratic(), spec).kept  # type: ignore[arg-type]
    return kept["personal.w"]


def test_mrmtl_without_a_pull_is_learning_alone() -> None:
    assert torch.allclose(mrmtl_alone(0.0), Y + 0.8**6 * (W - Y), atol=1e-5)
    assert not torch.allclose(mrmtl_alone(0.5), Y + 0.8**6 * (W - Y), atol=0.1)


# ---- meta-gradient descent ----------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(k=st.integers(1, 3), a=st.floats(0.01, 0.5), b=st.floats(0.01, 0.9), steps=st.integers(1, 4))
def test_maml_descends_its_meta_gradient(k: int, a: float, b: float, steps: int) -> None:
    """w - y shrinks by 1 - b (1-a)^(2k) a step, y the mean over episodes: every one of them counts."""
    spec = AlgorithmSpec(name="maml", inner_steps=k, inner_lr=a, meta_steps=steps, meta_lr=b)
    episodes = [Episode(towards(Y + d), towards(Y + d)) for d in (-1.0, 0.0, 1.0)]
    private = ExactQueries(point_learner(), {"body.w": W}, towards(Y), episodes)
    update = ALGORITHMS["maml"].local_update({"body.w": W}, {}, private, spec).update["body.w"]
    assert torch.allclose(W + update, Y + (1 - b * (1 - a) ** (2 * k)) ** steps * (W - Y), atol=1e-5)
    assert private.asked == steps


def exact(trainable: str = "film", seed: int = 0) -> tuple[ExactQueries, Params]:
    learner, params = conv_learner(trainable)
    episodes = [episode(6, 5, seed=seed + 10 * number) for number in range(2)]
    return ExactQueries(learner, params, images(9, seed), episodes), params


def shared_and_kept(private: ExactQueries, trainable: str = "film") -> tuple[Params, Params]:
    """What travels, and a zero head, which stays."""
    spec = ModelSpec.model_validate({"width": 8, "trainable": trainable})
    shared = select(private.public, shared_names(private.learner.network, spec))
    return shared, {name: torch.zeros_like(private.public[name]) for name in ("head.weight", "head.bias")}


@pytest.mark.parametrize("name", ["maml", "anil", "metasgd", "protonet"])
def test_one_meta_step_is_one_step_along_the_mean_meta_gradient(name: str) -> None:
    """Written out by autograd, from a zero head, over the parameters that travel."""
    private, params = exact()
    shared, kept = shared_and_kept(private)
    spec = AlgorithmSpec(name=name, inner_steps=2, inner_lr=0.2, head_lr=0.4, meta_steps=1, meta_lr=0.5)  # type: ignore[arg-type]
    travels = shared | ALGORITHMS[name].extra(shared, spec)
    local = ALGORITHMS[name].local_update(travels, kept, private, spec)
    leaves = {key: value.detach().clone().requires_grad_() for key, value in travels.items()}
    loss = sum(
        (written_out(name, private, params | kept | leaves, shared, task) for task in private.episodes), torch.zeros(())
    ) / len(private.episodes)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    wanted = {
        key: torch.zeros_like(leaf) if gradient is None else -0.5 * gradient
        for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
    assert local.update.keys() == travels.keys()
    assert norm(subtract(local.update, wanted)) <= 1e-8 * norm(wanted)
    assert all(torch.equal(local.kept[key], kept[key]) for key in kept)
    if name == "metasgd":
        assert norm({key: value for key, value in local.update.items() if key.startswith(RATE)}) > 1e-4


def written_out(name: str, private: ExactQueries, params: Params, shared: Params, task: Episode) -> Tensor:
    """The query loss after two inner steps, for MAML and its kin; prototypes have none."""
    network = private.learner.network
    if name == "protonet":
        return prototype_loss(private.learner, params, task)
    moving = ["head.weight", "head.bias"] + ([] if name == "anil" else list(shared))
    phi = {key: value if value.requires_grad else value.clone().requires_grad_() for key, value in params.items()}
    for _ in range(2):
        loss = written_out_loss(network, phi, task.support)
        gradients = torch.autograd.grad(loss, [phi[key] for key in moving], create_graph=True)
        for key, gradient in zip(moving, gradients, strict=True):
            own = params.get(RATE + key, 0.4 if key.startswith("head.") else 0.2)
            phi[key] = phi[key] - own * gradient
    return written_out_loss(network, phi, task.query)


def test_meta_sgd_fine_tunes_by_the_rates_that_it_learned() -> None:
    learner, params = conv_learner()
    params[RATE + "head.bias"] = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    spec, algorithm = AdaptationSpec(steps=1, lr=0.1), AlgorithmSpec(name="metasgd")
    got = ALGORITHMS["metasgd"].adapt(learner, params, images(6, 0), spec, algorithm)
    plain = ALGORITHMS["maml"].adapt(learner, params, images(6, 0), spec, algorithm)
    moved, usual = (phi["head.bias"] - params["head.bias"] for phi in (got, plain))
    assert torch.allclose(moved, torch.tensor([0.0, 10.0, 20.0]) * usual, atol=1e-12)
    assert torch.equal(got["head.weight"], plain["head.weight"])


# ---- class means --------------------------------------------------------------------------------------------------


def test_the_head_of_class_means_is_a_softmax_of_distances() -> None:
    rng = torch.Generator().manual_seed(0)
    means, features = (torch.randn(rows, 5, generator=rng, dtype=torch.float64) for rows in (3, 40))
    head = head_of(means, torch.ones(3))
    chances = (features @ head["head.weight"].T + head["head.bias"]).softmax(dim=1)
    wanted = (-SHARPNESS * torch.cdist(features, means) ** 2).softmax(dim=1)
    assert torch.allclose(chances, wanted, atol=1e-12)


@law
@given(absent=st.integers(0, 2), size=st.floats(0.1, 10.0))
def test_a_class_that_the_support_lacks_is_never_chosen(absent: int, size: float) -> None:
    rng = torch.Generator().manual_seed(absent)
    means, features = size * torch.randn(3, 5, generator=rng), torch.randn(50, 5, generator=rng)
    means[absent] = 0
    counts = torch.ones(3)
    counts[absent] = 0
    head = head_of(means, counts)
    assert not ((features @ head["head.weight"].T + head["head.bias"]).argmax(dim=1) == absent).any()


def test_adaptation_by_class_means_reads_the_head_off_and_moves_nothing_else() -> None:
    learner, params = conv_learner()
    support = images(6, 0)
    got = adapt_by_class_means(learner, params, support, AdaptationSpec(), AlgorithmSpec(name="protonet"))
    means, counts = means_of(learner, params, support)
    features = learner.features(params, support.inputs)
    for label in range(WAYS):
        rows = support.targets == label
        share = support.weights[rows] / support.weights[rows].sum()
        assert torch.allclose(means[label], (share.unsqueeze(1) * features[rows]).sum(dim=0), atol=1e-12)
        assert float(counts[label]) == pytest.approx(float(support.weights[rows].sum()))
    assert torch.equal(got["head.weight"], 2 * SHARPNESS * means)
    assert all(torch.equal(got[name], value) for name, value in params.items() if name.startswith("body."))


# ---- noisy prototypes ---------------------------------------------------------------------------------------------


def sums_of(private: ExactQueries, std: float, rng: torch.Generator) -> ClassSums:
    """The exact class sums, noise added to them."""
    features, counts, _ = private.class_sums({})
    return ClassSums(
        features + std * torch.randn(features.shape, generator=rng),
        counts + 0.1 * std * torch.randn(counts.shape, generator=rng),
        std,
    )


def class_means(private: ExactQueries) -> Tensor:
    features = private.learner.features(private.public, private.batch.inputs)
    return torch.stack([features[private.batch.targets == label].mean(dim=0) for label in range(WAYS)])


def test_without_noise_prototypes_are_the_class_means() -> None:
    private, _ = exact()
    means, counts = prototypes_of(private.class_sums({}))
    assert torch.allclose(means, class_means(private), atol=1e-12)
    assert torch.allclose(counts, torch.full((WAYS,), 1 / 3, dtype=torch.float64))


def squared_errors(std: float, repeats: int = 200) -> tuple[float, float, bool]:
    """(mean squared error of shrunk prototypes, of plain ones, whether a sign was ever flipped)."""
    private, _ = exact()
    rng, true = torch.Generator().manual_seed(7), class_means(private)
    shrunk = plain = 0.0
    flipped = False
    for _ in range(repeats):
        sums = sums_of(private, std, rng)
        got, counts = prototypes_of(sums)
        unshrunk = sums.features / sums.counts.clamp(min=0.02 * float(sums.counts.sum())).unsqueeze(1)
        seen = counts > 0
        shrunk += float((got - true)[seen].square().sum())
        plain += float((unshrunk - true)[seen].square().sum())
        flipped |= bool((got * sums.features < 0).any())
    return shrunk, plain, flipped


@pytest.mark.parametrize("std", [0.03, 0.3, 3.0])
def test_shrinkage_lowers_the_error_and_never_flips_a_sign(std: float) -> None:
    """James and Stein: in many dimensions the shrunk mean is the better guess, whatever the truth is."""
    shrunk, plain, flipped = squared_errors(std)
    assert shrunk < plain
    assert not flipped


def test_shrinkage_without_its_positive_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: 1 - F std^2 / ||S||^2 below zero turns a prototype round."""
    honest = Tensor.clamp
    monkeypatch.setattr(
        Tensor, "clamp", lambda self, **bounds: self if bounds == {"min": 0} else honest(self, **bounds)
    )
    assert squared_errors(3.0, repeats=20)[2]


def test_what_is_remembered_adds_up_and_its_noise_averages_out() -> None:
    """After r rounds of equal noise the sums are r-fold and the noise sqrt(r)-fold: relative to them 1/sqrt(r)."""
    private, _ = exact()
    rng, kept = torch.Generator().manual_seed(3), {}
    errors = []
    for round_ in range(1, 65):
        sums = remembered(kept, sums_of(private, 0.05, rng))
        kept = memory_of(sums)
        assert sums.std == pytest.approx(0.05 * round_**0.5, rel=1e-5)
        errors.append(float((sums.features / round_ - private.class_sums({}).features).square().mean().sqrt()))
    assert errors[0] == pytest.approx(0.05, rel=0.3)
    assert errors[-1] == pytest.approx(0.05 / 8, rel=0.3)


def test_the_body_moves_under_the_head_that_the_prototypes_give() -> None:
    private, params = exact()
    shared, kept = shared_and_kept(private)
    spec = AlgorithmSpec(name="prototypes", inner_steps=2, inner_lr=0.1)
    local = ALGORITHMS["prototypes"].local_update(shared, kept, private, spec)
    head = head_of(class_means(private), torch.ones(WAYS))
    by_hand, again = dict(shared), ExactQueries(private.learner, params, private.batch)
    for _ in range(2):
        by_hand = add(by_hand, again.gradient(by_hand, fixed=head), scale=-0.1)
    assert norm(subtract(local.update, subtract(by_hand, shared))) < 1e-8
    assert all(torch.allclose(local.kept[name], head[name], atol=1e-9) for name in head)
    assert private.asked == 3


def test_a_class_that_noise_ate_has_no_prototype() -> None:
    sums = ClassSums(torch.randn(3, 5), torch.tensor([0.5, -0.1, 0.001]), 0.01)
    means, counts = prototypes_of(sums)
    assert counts.tolist() == [0.5, 0.0, 0.0]
    assert torch.isfinite(means).all()


# ---- every algorithm of the registry ------------------------------------------------------------------------------


def one_of(name: str, make_plan: PlanMaker, **model: str) -> Any:
    proximal = {"proximal": 0.1} if name in ("fedprox", "mrmtl") else {}
    part = "mapping" if name == "mapping" else "film"
    return make_plan(
        model={"name": "conv4", "width": 8, "trainable": part, **model},
        algorithm={"name": name, "inner_steps": 2, "inner_lr": 0.1, "meta_steps": 3, **proximal},
        evaluation={"compare": []},
        task={"kind": "classification", "image_size": 16, "label_sets": {"lesion": ["a", "b", "c"]}},
    )


def a_round(name: str, plan: Any, kept: Params, theta: Params, private: ExactQueries) -> LocalUpdate:
    asked = private.asked
    local = ALGORITHMS[name].local_update(theta, kept, private, plan.algorithm)
    assert private.asked - asked == ALGORITHMS[name].queries_per_round(plan.algorithm)
    assert local.update.keys() == theta.keys()
    assert all(local.update[key].shape == theta[key].shape for key in theta)
    assert all(torch.isfinite(value).all() for value in (local.update | local.kept).values())
    return local


@pytest.mark.parametrize("head", ["site", "shared"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_keeps_its_word_over_two_rounds(name: str, head: str, make_plan: PlanMaker) -> None:
    """As many queries as are charged, the names that travel and no others, all finite, and the next round runs from
    what it kept and from where the mean moved."""
    plan = one_of(name, make_plan, head=head)
    network = network_of(plan, "alder")
    learner, _ = conv_learner(plan.model.trainable, double=False)
    learner = dataclasses.replace(learner, network=network)  # type: ignore[arg-type]
    public = {key: value for key, value in starting(plan, network).items() if not key.startswith(RATE)}
    heads = (
        {}
        if head == "shared"
        else {key: torch.zeros_like(v) for key, v in network.named_parameters() if "head." in key}
    )
    episodes = [episode(6, 5, seed=n, double=False) for n in range(2)]
    private = ExactQueries(learner, public | heads, images(9, 0, double=False), episodes)
    theta, kept = travelling(plan, network), heads
    for _ in range(2):
        local = a_round(name, plan, kept, theta, private)
        theta, kept = add(theta, local.update), local.kept if ALGORITHMS[name].keeps else heads
    moved = norm(subtract(theta, travelling(plan, network)))
    assert (moved > 1e-6) == (name not in ("local_only", "transfer"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_starts_a_run_and_what_travels_agree(name: str, make_plan: PlanMaker) -> None:
    plan = one_of(name, make_plan)
    network = network_of(plan, "alder")
    start, rounds = starting(plan, network), travelling(plan, network)
    assert rounds.keys() <= start.keys()
    assert set(round_names(plan)) == rounds.keys()
    assert not any(key.startswith("head.") for key in start)
    rates = {key for key in rounds if key.startswith(RATE)}
    if name == "mapping":
        assert {key.split(".")[0] for key in rounds} == {"mapping"}
        assert any(key.startswith("encoder.") for key in start)
    else:
        assert rounds.keys() - rates == set(part_names(network, "film")) - {"head.weight", "head.bias"}
    film = {RATE + key for key in rounds.keys() - rates}
    assert rates == (film | {RATE + "head.weight", RATE + "head.bias"} if name == "metasgd" else set())


def test_meta_sgd_starts_from_the_plan_s_rates(make_plan: PlanMaker) -> None:
    plan = one_of("metasgd", make_plan, head="shared")
    spec = plan.algorithm.model_copy(update={"head_lr": 0.7})
    shared = {"body.x": torch.zeros(4), "head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}
    found = ALGORITHMS["metasgd"].extra(shared, spec)
    assert {key: (tuple(v.shape), float(v.flatten()[0])) for key, v in found.items()} == {
        "rate.body.x": ((4,), pytest.approx(0.1)),
        "rate.head.weight": ((3, 4), pytest.approx(0.7)),
        "rate.head.bias": ((3,), pytest.approx(0.7)),
    }


def test_no_algorithm_moves_the_parameters_that_it_was_given(make_plan: PlanMaker) -> None:
    for name in ALGORITHMS:
        plan = one_of(name, make_plan)
        learner, params = conv_learner(plan.model.trainable)
        private = ExactQueries(learner, params, images(9, 0), [episode(6, 5, seed=0)])
        shared, kept = shared_and_kept(private, plan.model.trainable)
        shared = shared | ALGORITHMS[name].extra(shared, plan.algorithm)
        before = {key: value.clone() for key, value in (shared | kept).items()}
        ALGORITHMS[name].local_update(shared, kept, private, plan.algorithm)
        assert all(torch.equal((shared | kept)[key], value) for key, value in before.items()), name


def test_the_meta_loss_of_one_episode_is_what_meta_gradients_descend() -> None:
    """`evenly` and weights of one are the same batch."""
    learner, params = conv_learner()
    task = episode(6, 5, seed=0)
    even = Episode(*(evenly(batch.inputs, batch.targets) for batch in task))
    ones = Episode(*(batch._replace(weights=torch.full_like(batch.weights, 3.0)) for batch in task))
    meta_loss = query_loss_after(AlgorithmSpec(name="maml", inner_steps=1), ["head.weight", "head.bias"])
    one, two = (next(meta_gradients(learner, params, {}, [t], meta_loss)) for t in (even, ones))
    assert norm(subtract(one, two)) < 1e-9 * norm(one)
