"""Adaptation against its closed form, and what a few-shot trial may and may not touch."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from client.adapt import ceiling_trials, few_shot_trials, patient_splits
from client.data.dataset import SiteData
from common.errors import DataError
from common.inner_loop import adapt
from common.models import HEAD, build_model, parameters
from common.params import Params, subtract
from common.plan import AdaptationSpec, StudyPlan
from common.trials import Trial

RATE, STEPS = 0.3, 4
W0, Y = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([0.5, 0.5, 0.5])


class Point(nn.Module):
    """The network whose output is its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 7.0))  # never read: adapt() goes by the parameters it is given

    def forward(self, _: Tensor) -> Tensor:
        return self.w


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum()


def adapt_point(start: Tensor, *, create_graph: bool = False) -> Tensor:
    spec = AdaptationSpec(trainable="all", steps=STEPS, lr=RATE)
    none = torch.zeros(0)
    return adapt(Point(), {"w": start}, none, Y, spec, loss=half_square, create_graph=create_graph)["w"]


def test_steps_on_the_quadratic() -> None:
    phi = adapt_point(W0)
    torch.testing.assert_close(phi, Y + (1 - RATE) ** STEPS * (W0 - Y))
    assert not phi.requires_grad


def test_exact_meta_gradient_on_the_quadratic() -> None:
    start = W0.clone().requires_grad_()
    half_square(adapt_point(start, create_graph=True), Y).backward()
    torch.testing.assert_close(start.grad, (1 - RATE) ** (2 * STEPS) * (W0 - Y))


def test_first_order_meta_gradient_on_the_quadratic() -> None:
    phi = adapt_point(W0.clone().requires_grad_()).requires_grad_()
    half_square(phi, Y).backward()
    torch.testing.assert_close(phi.grad, (1 - RATE) ** STEPS * (W0 - Y))


def plan_of(**changes: object) -> StudyPlan:
    evaluation = {"shots": [1, 5], "splits": 2, "draws": 2, "adaptation": {"steps": 3, "lr": 0.1}, **changes}
    return StudyPlan.model_validate(
        {
            "study": "test",
            "task": {"kind": "classification", "image_size": 16, "label_sets": {"two": ["normal", "ill"]}},
            "sites": {"alder": {"labels": "two", "patients": 10}},
            "model": {"name": "conv4", "width": 8},
            "rounds": 1,
            "quorum": 1,
            "privacy": "none",
            "evaluation": evaluation,
        }
    )


def site(patients: list[int], labels: list[int], names: tuple[str, ...] = ("normal", "ill")) -> SiteData:
    """Noise of 16 x 16 pixels under stripes, the narrower the higher the label."""
    count, rng = len(labels), torch.Generator().manual_seed(0)
    noise = torch.randint(0, 100, (count, 1, 16, 16), generator=rng)
    stripes = torch.stack([(torch.arange(16) // 2 ** (2 - label) % 2).expand(1, 16, 16) for label in labels])
    images = (noise + 150 * stripes).to(torch.uint8)
    ids = tuple(f"p{i}" for i in range(max(patients) + 1))
    return SiteData("alder", images, torch.tensor(labels), torch.tensor(patients), names, ids, ("train",) * count)


@pytest.fixture
def data() -> SiteData:
    """Twelve patients of three images each; odd patients are ill."""
    patients = [p for p in range(12) for _ in range(3)]
    return site(patients, [p % 2 for p in patients])


def with_head(params: Params) -> Params:
    """A head that is not zero, so that the body has a gradient."""
    rng = torch.Generator().manual_seed(8)
    return params | {"head.weight": torch.randn(2, 32, generator=rng), "head.bias": torch.tensor([1.0, -1.0])}


def first_convolution(network: nn.Module) -> str:
    return next(name for name, value in network.named_parameters() if value.ndim == 4)


@pytest.mark.parametrize(("part", "moves"), [("all", None), ("film", "norm"), ("head", "head")])
def test_only_the_named_part_moves(data: SiteData, part: str, moves: str | None) -> None:
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2, seed=1)
    start = with_head(parameters(network))
    spec = AdaptationSpec(trainable=part, steps=2, lr=0.1)
    after = adapt(network, start, data.normalised(), data.labels, spec)
    moved = {name for name, change in subtract(after, start).items() if change.abs().max() > 0}
    norms = {
        f"{prefix}.{leaf}"
        for prefix, module in network.named_modules()
        if isinstance(module, nn.GroupNorm)
        for leaf in ("weight", "bias")
    }
    heads = {"head.weight", "head.bias"}
    allowed = {None: set(start), "norm": norms | heads, "head": heads}[moves]
    assert heads <= moved <= allowed
    assert (moved == heads) == (part == "head")


def test_cached_features_change_nothing(data: SiteData) -> None:
    """Adapting the head alone equals descent on the whole network with the body frozen."""
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2, seed=1)
    images, labels = data.normalised(), data.labels
    found = adapt(network, parameters(network), images, labels, AdaptationSpec(trainable="head", steps=5, lr=0.1))
    heads = [p for name, p in network.named_parameters() if name.startswith(HEAD)]
    for _ in range(5):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(network(images), labels), heads)
        with torch.no_grad():
            for parameter, gradient in zip(heads, gradients, strict=True):
                parameter -= 0.1 * gradient
    torch.testing.assert_close(found["head.weight"], heads[0].detach())


def test_the_body_runs_once_for_the_head(data: SiteData) -> None:
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2)
    runs: list[int] = []
    network.body.register_forward_hook(lambda *_: runs.append(1))
    adapt(network, parameters(network), data.normalised(), data.labels, AdaptationSpec(trainable="head", steps=7))
    assert len(runs) == 1


def test_meta_gradient_of_the_head_reaches_the_body(data: SiteData) -> None:
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2)
    start: Params = {name: value.requires_grad_() for name, value in parameters(network).items()}
    spec = AdaptationSpec(trainable="head", steps=2)
    phi = adapt(network, start, data.normalised(), data.labels, spec, create_graph=True)
    phi["head.weight"].square().sum().backward()
    gradient = start[first_convolution(network)].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_the_head_has_its_own_rate(data: SiteData) -> None:
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2)
    start = parameters(network)
    slow = adapt(network, start, data.normalised(), data.labels, AdaptationSpec(steps=1, lr=0.1))
    fast = adapt(network, start, data.normalised(), data.labels, AdaptationSpec(steps=1, lr=0.1, head_lr=0.2))
    torch.testing.assert_close(fast["head.weight"], 2 * slow["head.weight"])
    body = first_convolution(network)
    torch.testing.assert_close(fast[body], slow[body])


def test_no_patient_is_on_both_sides(data: SiteData) -> None:
    for split in patient_splits(data, 20, seed=3):
        support, query = set(data.patients[split.support].tolist()), set(data.patients[split.query].tolist())
        assert not support & query
        assert len(support) == len(query) == 6
        assert set(data.labels[split.support].tolist()) == set(data.labels[split.query].tolist()) == {0, 1}


def test_a_rare_class_is_on_both_sides() -> None:
    """Only two patients show label 2, and both show label 0 as well."""
    patients = [p for p in range(10) for _ in range(2)]
    labels = [2 if p in (3, 4) and i % 2 else p % 2 if p not in (3, 4) else 0 for i, p in enumerate(patients)]
    data = site(patients, labels, ("normal", "ill", "rare"))
    for split in patient_splits(data, 20, seed=0):
        assert 2 in data.labels[split.support]
        assert 2 in data.labels[split.query]


def test_splits_differ_and_come_back_by_seed(data: SiteData) -> None:
    first, second = patient_splits(data, 2, seed=5)
    again, _ = patient_splits(data, 2, seed=5)
    other, _ = patient_splits(data, 2, seed=6)
    assert torch.equal(first.support, again.support)
    assert not torch.equal(first.support, second.support)
    assert not torch.equal(first.support, other.support)


def test_every_start_meets_the_same_images(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    seen: dict[str, list[Tensor]] = {}
    for arm, start in (("random", None), ("meta", body_of(plan, seed=9))):
        seen[arm] = []

        def spy(*args: object, to: list[Tensor] = seen[arm], **kwargs: object) -> Params:
            to.append(args[2].clone())  # type: ignore[attr-defined]
            return adapt(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr("client.adapt.adapt", spy)
        few_shot_trials(start, data, plan, arm=arm, kind="held-out site", seed=1)
    assert len(seen["random"]) == 8
    assert all(map(torch.equal, seen["random"], seen["meta"]))


def body_of(plan: StudyPlan, *, seed: int) -> Params:
    params = parameters(build_model(plan.model, plan.task, ways=2, seed=seed))
    return {name: value for name, value in params.items() if not name.startswith(HEAD)}


def test_support_takes_different_patients_first(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    supports: list[Tensor] = []

    def spy(network: nn.Module, params: Params, images: Tensor, labels: Tensor, spec: AdaptationSpec) -> Params:
        supports.append(images)
        return params

    monkeypatch.setattr("client.adapt.adapt", spy)
    few_shot_trials(None, data, plan_of(shots=[3]), arm="random", kind="held-out site", seed=0)
    everything = data.normalised()
    for images in supports:  # three images of each class from three patients each
        rows = [int((everything == image).flatten(1).all(dim=1).nonzero()) for image in images]
        assert len(set(data.patients[rows].tolist())) == 6
        assert sorted(data.labels[rows].tolist()) == [0, 0, 0, 1, 1, 1]


def test_trials_say_what_they_are_and_repeat(data: SiteData) -> None:
    plan = plan_of()
    trials = few_shot_trials(None, data, plan, arm="random", kind="held-out site", seed=1)
    assert [(t.shots, t.split, t.draw) for t in trials] == [
        (shots, split, draw) for split in (0, 1) for draw in (0, 1) for shots in (1, 5)
    ]
    assert {(t.target, t.kind, t.arm, t.ways, t.note) for t in trials} == {("alder", "held-out site", "random", 2, "")}
    assert trials == few_shot_trials(None, data, plan, arm="random", kind="held-out site", seed=1)


def test_too_few_images_are_used_and_said(data: SiteData) -> None:
    trials = few_shot_trials(None, data, plan_of(shots=[1, 20]), arm="random", kind="held-out site", seed=1)
    notes = {trial.shots: trial.note for trial in trials}
    assert notes == {1: "", 20: "too few images of normal, ill"}


def test_the_ceiling_learns_what_is_easy(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.adapt._CEILING_STEPS", 40)
    plan = plan_of()
    trials = ceiling_trials(body_of(plan, seed=2), data, plan, kind="held-out patients", seed=1)
    assert [(t.arm, t.shots, t.split, t.kind) for t in trials] == [
        ("ceiling", 0, split, "held-out patients") for split in (0, 1)
    ]
    assert min(t.metrics["balanced_accuracy"] for t in trials) > 0.9


def test_an_adaptation_that_diverges_counts_as_guessing(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(network: nn.Module, params: Params, *_: object) -> Params:
        return {name: value * float("nan") for name, value in params.items()}

    monkeypatch.setattr("client.adapt.adapt", diverge)
    trials = few_shot_trials(None, data, plan_of(), arm="random", kind="held-out site", seed=1)
    assert {trial.note for trial in trials} == {"the adaptation diverged and counts as guessing"}
    assert {trial.metrics["balanced_accuracy"] for trial in trials} == {0.5}


def test_queries_are_capped(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.adapt.MAX_QUERIES", 7)
    split = next(patient_splits(data, 1, seed=0))
    assert len(split.query) == 7
    assert len(split.support) == 18


@pytest.mark.parametrize(("patients", "labels"), [([0, 0, 0], [0, 1, 1]), ([0, 1, 2], [1, 1, 1])])
def test_a_site_that_cannot_be_evaluated_is_named(patients: list[int], labels: list[int]) -> None:
    expected = f"site alder: {len(set(patients))} patients and {len(set(labels))} labels to evaluate on"
    with pytest.raises(DataError, match=expected):
        few_shot_trials(None, site(patients, labels), plan_of(), arm="random", kind="held-out site", seed=0)


def test_a_start_without_a_body_is_refused(data: SiteData) -> None:
    with pytest.raises(ValueError, match=r"the start lacks body\."):
        few_shot_trials({}, data, plan_of(), arm="meta", kind="held-out site", seed=0)


def test_a_head_of_another_site_is_not_taken(data: SiteData) -> None:
    """Unless the plan shares the head, a start's head does not reach the trial."""
    plan = plan_of()
    body = body_of(plan, seed=2)
    foreign = with_head(body)

    def run(start: Params) -> list[Trial]:
        return few_shot_trials(start, data, plan, arm="meta", kind="held-out site", seed=1)

    assert run(body) == run(foreign)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"head": "shared"})})
    assert run(body) != run(foreign)


def test_trials_do_not_touch_global_randomness(data: SiteData) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    few_shot_trials(None, replace(data, site="birch"), plan_of(), arm="random", kind="held-out site", seed=1)
    assert torch.equal(torch.rand(1), expected)
