"""Meta-gradients: exact to second order, by closed form, by plain autograd, by differences, and the same in both
executions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Barrier

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import common.algorithms.maml
import common.episodes
from common.algorithms.maml import query_loss_after
from common.algorithms.metasgd import RATE
from common.algorithms.protonet import prototype_loss
from common.episodes import Batch, Episode, MetaLoss, evenly, meta_gradients, side_by_side
from common.inner_loop import adapt
from common.learner import Learner
from common.models import build_model, parameters
from common.params import Params, norm, subtract
from common.plan import AdaptationSpec, AlgorithmSpec, ModelSpec, TaskSpec
from common.tasks import RECONSTRUCTION, TASKS
from tests.exact_queries import conv_learner, episode, images, point_learner, towards, written_out_loss

SPEC = AlgorithmSpec(name="maml", inner_steps=2, inner_lr=0.2, head_lr=0.4)
BODY_AND_HEAD = ["body.1.weight", "body.2.weight", "body.4.weight", "head.weight", "head.bias"]
HEAD_ONLY = ["head.weight", "head.bias"]
Meta = Callable[[MetaLoss], Params]


def meta_gradient(
    learner: Learner, params: Params, task: Episode, meta_loss: MetaLoss, names: list[str] | None = None
) -> Params:
    names = names or list(params)
    moving = {name: params[name] for name in names}
    fixed = {name: value for name, value in params.items() if name not in names}
    return next(meta_gradients(learner, moving, fixed, [task], meta_loss))


def close(one: Params, two: Params, tolerance: float) -> bool:
    return one.keys() == two.keys() and norm(subtract(one, two)) <= tolerance * norm(two)


# ---- MAML ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("a", [0.05, 0.3])
def test_the_closed_form(k: int, a: float) -> None:
    """Support and query both 0.5 ||w - y||^2: exact (1-a)^(2k) (w - y), first order (1-a)^k (w - y)."""
    w, y = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([1.0, -2.0, 0.5])
    spec = AlgorithmSpec(name="maml", inner_steps=k, inner_lr=a)
    task = Episode(towards(y), towards(y, rows=3))
    got = meta_gradient(point_learner(), {"body.w": w}, task, query_loss_after(spec, ["body.w"]))
    assert torch.allclose(got["body.w"], (1 - a) ** (2 * k) * (w - y), atol=1e-6)
    assert not torch.allclose(got["body.w"], (1 - a) ** k * (w - y), atol=1e-3)


def maml_by_autograd(
    learner: Learner, params: Params, task: Episode, moving: list[str], *, second_order: bool = True
) -> Params:
    """MAML as the paper writes it, by `torch.autograd` alone."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    phi = dict(leaves)
    for _ in range(SPEC.inner_steps):
        loss = written_out_loss(learner.network, phi, task.support)
        gradients = torch.autograd.grad(loss, [phi[name] for name in moving], create_graph=second_order)
        for name, gradient in zip(moving, gradients, strict=True):
            phi[name] = phi[name] - (0.4 if name.startswith("head.") else 0.2) * gradient
    loss = written_out_loss(learner.network, phi, task.query)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("moving", [BODY_AND_HEAD, HEAD_ONLY], ids=["maml", "anil"])
def test_the_meta_gradient_is_that_of_plain_autograd(moving: list[str]) -> None:
    learner, params = conv_learner()
    task = episode(6, 5, seed=0)
    got = meta_gradient(learner, params, task, query_loss_after(SPEC, moving))
    assert close(got, maml_by_autograd(learner, params, task, moving), 1e-8)


@pytest.mark.parametrize("moving", [BODY_AND_HEAD, HEAD_ONLY], ids=["maml", "anil"])
def test_detached_inner_gradients_are_noticed(moving: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: the Jacobian is dropped, as in first-order MAML."""

    def detached(learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, **settings: object) -> Params:
        phi = adapt(learner, params, support, spec, moving=moving)
        return {name: params[name] + (phi[name] - params[name]).detach() for name in params}

    monkeypatch.setattr(common.algorithms.maml, "adapt", detached)
    learner, params = conv_learner()
    task = episode(6, 5, seed=0)
    got = meta_gradient(learner, params, task, query_loss_after(SPEC, moving))
    assert not close(got, maml_by_autograd(learner, params, task, moving), 1e-2)
    assert close(got, maml_by_autograd(learner, params, task, moving, second_order=False), 1e-8)


def test_the_meta_gradient_is_what_differences_measure() -> None:
    learner, params = conv_learner()
    task, meta_loss = episode(6, 5, seed=4), query_loss_after(SPEC, BODY_AND_HEAD)
    got = meta_gradient(learner, params, task, meta_loss)
    for name, place in (("head.weight", (1, 7)), ("body.2.weight", (3,)), ("body.1.weight", (2, 0, 1, 3))):

        def at(move: float, name: str = name, place: tuple[int, ...] = place) -> float:
            moved = params[name].clone()
            moved[place] += move
            with torch.no_grad():
                return float(meta_loss(learner, params | {name: moved}, task))

        measured = (at(1e-6) - at(-1e-6)) / 2e-6
        assert float(got[name][place]) == pytest.approx(measured, rel=1e-4, abs=1e-8)


def test_anil_leaves_the_body_where_it_is_in_the_inner_loop() -> None:
    """So its query loss at phi is that of the old body under the new head."""
    learner, params = conv_learner()
    task = episode(6, 5, seed=0)
    spec = AdaptationSpec(steps=2, lr=0.2, head_lr=0.4)
    head = adapt(learner, params, task.support, spec, moving=HEAD_ONLY)
    assert all(torch.equal(head[name], value) for name, value in params.items() if name.startswith("body."))
    with torch.no_grad():
        got = query_loss_after(SPEC, HEAD_ONLY)(learner, params, task)
    assert float(got) == pytest.approx(float(written_out_loss(learner.network, head, task.query)), rel=1e-9)


# ---- the two executions -------------------------------------------------------------------------------------------


def rates_loss(learner: Learner, params: Params, task: Episode) -> Tensor:
    """Meta-SGD's, with a rate for each number of the head and the plan's elsewhere."""
    rates = {name.removeprefix(RATE): value for name, value in params.items() if name.startswith(RATE)}
    spec = AdaptationSpec(steps=2, lr=0.1)
    phi = adapt(learner, params, task.support, spec, moving=BODY_AND_HEAD, rates=rates, second_order=True)
    return learner.loss(learner.outputs(phi, task.query.inputs), task.query)


META_LOSSES: dict[str, MetaLoss] = {
    "maml": query_loss_after(SPEC, BODY_AND_HEAD),
    "anil": query_loss_after(SPEC, HEAD_ONLY),
    "metasgd": rates_loss,
    "protonet": prototype_loss,
}
RAGGED = [(4, 5), (7, 2), (2, 6), (3, 3), (9, 1)]  # images of the support set and of the query set


@pytest.mark.parametrize("name", META_LOSSES)
@pytest.mark.parametrize("together", [2, 64])
def test_one_after_the_other_or_together_the_numbers_are_the_same(name: str, together: int) -> None:
    learner, params = conv_learner()
    params |= {RATE + head: torch.full_like(params[head], 0.3) for head in HEAD_ONLY}
    tasks = [episode(*sizes, seed=seed) for seed, sizes in enumerate(RAGGED)]
    fixed = {"body.1.weight": params.pop("body.1.weight")}
    one = list(meta_gradients(learner, params, fixed, tasks, META_LOSSES[name]))
    many = list(meta_gradients(learner, params, fixed, tasks, META_LOSSES[name], together=together))
    assert len(one) == len(many) == len(tasks)
    moved = [gradient.keys() == params.keys() and norm(gradient) > 0 for gradient in one]
    assert all(moved)
    assert all(close(a, b, 1e-9) for a, b in zip(many, one, strict=True))


KINDS = {
    "multilabel": ("conv4", {}, lambda rows, rng: torch.randint(0, 2, (rows, 2), generator=rng).double()),
    "segmentation": ("unet", {}, lambda rows, rng: torch.randint(0, 2, (rows, 16, 16), generator=rng)),
    "anomaly": ("autoencoder", {"head": "shared"}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_the_same_for_every_kind_of_task(kind: str) -> None:
    model, more, targets_of = KINDS[kind]
    if model == "unet":
        pytest.importorskip("monai", reason="MONAI is not installed: no U-Net")
    task = TaskSpec.model_validate({"kind": kind, "image_size": 16, "label_sets": {"two": ["no", "yes"]}})
    spec = ModelSpec.model_validate({"name": model, "width": 8, **more})
    network = build_model(spec, task, ways=2, seed=1).double()
    learner = Learner(network, RECONSTRUCTION if targets_of is None else TASKS[kind])

    def batch(rows: int, seed: int) -> Batch:
        rng = torch.Generator().manual_seed(seed)
        inputs = torch.randn(rows, 1, 16, 16, generator=rng, dtype=torch.float64)
        return evenly(inputs, inputs if targets_of is None else targets_of(rows, rng))

    tasks = [Episode(batch(2, seed), batch(rows, seed + 9)) for seed, rows in enumerate((3, 1))]
    meta_loss = query_loss_after(AlgorithmSpec(name="maml", inner_steps=1, inner_lr=0.1), HEAD_ONLY)
    params = {name: value.double() for name, value in parameters(network).items()}
    one, many = (list(meta_gradients(learner, params, {}, tasks, meta_loss, together=n)) for n in (1, 2))
    assert all(norm(gradient) > 0 and close(gradient, other, 1e-9) for gradient, other in zip(one, many, strict=True))


def test_padding_that_counted_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: padded rows weigh as much as others."""
    honest = common.episodes._padded

    def counts(value: Tensor, size: int) -> Tensor:
        return torch.ones(size, dtype=value.dtype) if value.dim() == 1 and value.is_floating_point() else honest(
            value, size
        )  # fmt: skip

    learner, params = conv_learner()
    tasks = [episode(*sizes, seed=seed) for seed, sizes in enumerate(RAGGED)]
    one = list(meta_gradients(learner, params, {}, tasks, prototype_loss))
    monkeypatch.setattr(common.episodes, "_padded", counts)
    many = list(meta_gradients(learner, params, {}, tasks, prototype_loss, together=2))
    assert not any(close(a, b, 1e-3) for a, b in zip(many[:2], one[:2], strict=True))


@contextmanager
def allowed_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", META_LOSSES)
def test_side_by_side_the_numbers_are_the_same(name: str) -> None:
    learner, params = conv_learner()
    params |= {RATE + head: torch.full_like(params[head], 0.3) for head in HEAD_ONLY}
    tasks = [episode(*sizes, seed=seed) for seed, sizes in enumerate(RAGGED)]
    one = [meta_gradient(learner, params, task, META_LOSSES[name]) for task in tasks]
    with allowed_threads(2):
        many = list(meta_gradients(learner, params, {}, tasks, META_LOSSES[name]))
    assert len(one) == len(many)
    assert all(close(a, b, 1e-12) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize(("allowed", "each"), [(2, 1), (4, 2)])
def test_side_by_side_each_has_threads_and_a_network_of_its_own(
    allowed: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more run than may: gradients are not heaped up before a query that takes one after the other."""
    learner, _ = conv_learner()
    tasks = [Episode(towards(torch.tensor([n]), rows=1), towards(torch.tensor([n]))) for n in range(6)]
    seen, both = [], Barrier(2, timeout=20)
    monkeypatch.setattr(common.episodes, "_AT_ONCE", 2)

    def work(twin: Learner, task: Episode) -> int:
        both.wait()
        seen.append((torch.get_num_threads(), id(twin.network)))
        return int(task.support.targets)

    with allowed_threads(allowed):
        results = side_by_side(learner, tasks, work)
        assert next(results) == 0
        assert len(seen) <= 2
        assert list(results) == [1, 2, 3, 4, 5]
    assert {threads for threads, _ in seen} == {each}
    assert len({network for _, network in seen} | {id(learner.network)}) == 3


def test_side_by_side_an_error_is_raised_and_the_threads_are_given_back() -> None:
    learner, params = conv_learner()

    def broken(learner: Learner, params: Params, task: Episode) -> Tensor:
        raise RuntimeError("broken")

    with allowed_threads(2), pytest.raises(RuntimeError, match="broken"):
        list(meta_gradients(learner, params, {}, [episode(1, 1, seed=0)] * 3, broken))


@pytest.mark.parametrize(("sparing", "passes"), [(False, 3 + 1), (True, 3 + 1 + 2)])
def test_a_sparing_learner_takes_all_steps_but_the_last_again(sparing: bool, passes: int) -> None:
    learner, params = conv_learner()
    task, meta_loss = episode(6, 5, seed=0), query_loss_after(SPEC.model_copy(update={"inner_steps": 3}), list(params))
    wanted, asked = meta_gradient(learner, params, task, meta_loss), []
    learner = learner.twin() if sparing else learner
    learner.network.body.register_forward_hook(lambda *_: asked.append(1))
    assert close(meta_gradient(learner, params, task, meta_loss), wanted, 1e-12)
    assert len(asked) == passes


def test_a_sparing_learner_differentiates_in_what_does_not_move_too() -> None:
    """The whole body is learned by an inner loop over FiLM and head: its steps depend on more than what they move."""
    learner, params = conv_learner()
    task, meta_loss = episode(6, 5, seed=0), query_loss_after(SPEC, BODY_AND_HEAD[1:])
    wanted = maml_by_autograd(learner, params, task, BODY_AND_HEAD[1:])
    assert close(meta_gradient(learner.twin(), params, task, meta_loss), wanted, 1e-8)


def test_no_episode_has_no_gradient() -> None:
    learner, params = conv_learner()
    for together in (1, 4):
        assert list(meta_gradients(learner, params, {}, [], prototype_loss, together=together)) == []


# ---- Meta-SGD and prototypes --------------------------------------------------------------------------------------


def test_the_gradient_in_a_rate_is_minus_the_product_of_both_gradients() -> None:
    """One step, phi = w - alpha * g_support(w): d L_query(phi) / d alpha = -g_support * g_query(phi)."""
    w, alpha = torch.tensor([3.0, 0.0, -1.0]), torch.tensor([0.1, 0.5, 0.0])
    support, query = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 2.0])

    def meta_loss(learner: Learner, params: Params, task: Episode) -> Tensor:
        spec, rates = AdaptationSpec(steps=1, lr=9.0), {"body.w": params["rate.body.w"]}
        phi = adapt(learner, params, task.support, spec, moving=["body.w"], rates=rates, second_order=True)
        return learner.loss(learner.outputs(phi, task.query.inputs), task.query)

    params = {"body.w": w, "rate.body.w": alpha}
    got = meta_gradient(point_learner(), params, Episode(towards(support), towards(query)), meta_loss)
    phi = w - alpha * (w - support)
    assert torch.allclose(got["rate.body.w"], -(w - support) * (phi - query), atol=1e-6)
    assert torch.allclose(got["body.w"], (1 - alpha) * (phi - query), atol=1e-6)


def by_distances(learner: Learner, params: Params, task: Episode, sharpness: float) -> Tensor:
    """Prototypical networks by `torch.cdist`, every class in the support."""
    features = learner.features(params, torch.cat([task.support.inputs, task.query.inputs]))
    support, query = features.split([len(task.support.inputs), len(task.query.inputs)])
    means = torch.stack(
        [
            torch.stack(
                [w * f for w, f, t in zip(task.support.weights, support, task.support.targets, strict=True) if t == c]
            ).sum(0)
            / task.support.weights[task.support.targets == c].sum()
            for c in range(params["head.bias"].shape[0])
        ]
    )
    losses = cross_entropy(-sharpness * torch.cdist(query, means) ** 2, task.query.targets, reduction="none")
    return (losses * task.query.weights).sum() / task.query.weights.sum()


@pytest.mark.parametrize(("sharpness", "right"), [(8.0, True), (4.0, False)])
def test_the_prototype_loss_is_that_of_the_distances(sharpness: float, right: bool) -> None:
    learner, params = conv_learner()
    task = episode(7, 5, seed=0)
    loss, wanted = prototype_loss(learner, params, task), by_distances(learner, params, task, sharpness)
    assert (float(loss) == pytest.approx(float(wanted), rel=1e-9)) == right
    body = [name for name in params if name.startswith("body.")]
    got = meta_gradient(learner, params, task, prototype_loss, body)
    leaves = {name: params[name].detach().requires_grad_() for name in body}
    gradients = torch.autograd.grad(by_distances(learner, params | leaves, task, sharpness), list(leaves.values()))
    assert close(got, dict(zip(leaves, gradients, strict=True)), 1e-7) == right


def test_a_query_of_a_class_that_the_support_lacks_counts_nothing() -> None:
    learner, params = conv_learner()
    support, query = images(2, 0), images(5, 1)  # labels 0 and 1; 0, 1, 2, 0, 1
    known = Batch(*(value[query.targets < 2] for value in query))
    loss, alone = (prototype_loss(learner, params, Episode(support, q)) for q in (query, known))
    assert float(loss) == pytest.approx(float(alone), rel=1e-9)
    nothing = evenly(query.inputs[2:3], query.targets[2:3])
    assert float(prototype_loss(learner, params, Episode(support, nothing))) == 0.0
