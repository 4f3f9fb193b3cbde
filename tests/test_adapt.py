"""What a few-shot trial may and may not touch, for every kind of task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.adapt import ceiling_trials, few_shot_trials, sights
from client.answers import judge
from client.data.dataset import SiteData
from client.data.rows import Details
from client.splits import patient_splits, support_groups, support_rows
from common.algorithms import ALGORITHMS
from common.episodes import evenly
from common.errors import DataError
from common.inner_loop import adapt
from common.learner import Learner
from common.models import HEAD, build_model, parameters
from common.params import Params, subtract
from common.plan import AdaptationSpec, RowFilter, StudyPlan
from common.tasks import TASKS
from common.trials import Trial


def plan_of(
    task: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    algorithm: dict[str, Any] | None = None,
    **changes: object,
) -> StudyPlan:
    evaluation = {
        "shots": [1, 5],
        "splits": 2,
        "draws": 2,
        "adaptation": {"steps": 3, "lr": 0.1},
        "compare": [],
        **changes,
    }
    return StudyPlan.model_validate(
        {
            "study": "test",
            "task": {"kind": "classification", "image_size": 16, "label_sets": {"two": ["normal", "ill"]}}
            | (task or {}),
            "sites": {"alder": {"labels": "two", "patients": 10}},
            "model": {"name": "conv4", "width": 8} | (model or {}),
            "algorithm": algorithm or {},
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


def learner(network: nn.Module) -> Learner:
    return Learner(network, TASKS["classification"])  # type: ignore[arg-type]


def everything(data: SiteData) -> Any:
    return evenly(data.inputs(), data.targets)


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
    after = adapt(learner(network), start, everything(data), spec)
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
    images, labels = data.inputs(), data.labels
    spec = AdaptationSpec(trainable="head", steps=5, lr=0.1)
    found = adapt(learner(network), parameters(network), everything(data), spec)
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
    adapt(learner(network), parameters(network), everything(data), AdaptationSpec(trainable="head", steps=7))
    assert len(runs) == 1


def test_meta_gradient_of_the_head_reaches_the_body(data: SiteData) -> None:
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2)
    start: Params = {name: value.requires_grad_() for name, value in parameters(network).items()}
    spec = AdaptationSpec(trainable="head", steps=2)
    phi = adapt(learner(network), start, everything(data), spec, second_order=True)
    phi["head.weight"].square().sum().backward()
    gradient = start[first_convolution(network)].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_the_head_has_its_own_rate(data: SiteData) -> None:
    plan = plan_of()
    network = build_model(plan.model, plan.task, ways=2)
    start = parameters(network)
    slow = adapt(learner(network), start, everything(data), AdaptationSpec(steps=1, lr=0.1))
    fast = adapt(learner(network), start, everything(data), AdaptationSpec(steps=1, lr=0.1, head_lr=0.2))
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


@pytest.fixture
def supports(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of every support set that an adaptation is given, in order."""
    seen: list[Tensor] = []
    plain = ALGORITHMS["reptile"]

    def spy(of: Learner, params: Params, support: Any, *specs: Any) -> Params:
        seen.append(support.inputs.clone())
        return plain.adapt(of, params, support, *specs)

    monkeypatch.setitem(ALGORITHMS, "reptile", replace(plain, adapt=spy))
    return seen


def test_every_start_meets_the_same_images(data: SiteData, supports: list[Tensor]) -> None:
    plan = plan_of()
    few_shot_trials(None, data, plan, arm="random", kind="held-out site", seed=1)
    few_shot_trials(body_of(plan, seed=9), data, plan, arm="meta", kind="held-out site", seed=1)
    assert len(supports) == 16
    assert all(map(torch.equal, supports[:8], supports[8:]))


def body_of(plan: StudyPlan, *, seed: int) -> Params:
    params = parameters(build_model(plan.model, plan.task, ways=2, seed=seed))
    return {name: value for name, value in params.items() if not name.startswith(HEAD)}


def test_support_takes_different_patients_first(data: SiteData, supports: list[Tensor]) -> None:
    few_shot_trials(None, data, plan_of(shots=[3]), arm="random", kind="held-out site", seed=0)
    every = data.inputs()
    for inputs in supports:  # three images of each class from three patients each
        rows = [int((every == image).flatten(1).all(dim=1).nonzero()) for image in inputs]
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
    monkeypatch.setattr("client.adapt._STEPS", 40)
    plan = plan_of()
    trials = ceiling_trials(body_of(plan, seed=2), data, plan, kind="held-out patients", seed=1)
    assert [(t.arm, t.shots, t.split, t.kind) for t in trials] == [
        ("ceiling", 0, split, "held-out patients") for split in (0, 1)
    ]
    assert min(t.metrics["balanced_accuracy"] for t in trials) > 0.9


def test_an_adaptation_that_diverges_counts_as_guessing(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(of: Learner, params: Params, *_: object) -> Params:
        return {name: value * float("nan") for name, value in params.items()}

    monkeypatch.setitem(ALGORITHMS, "reptile", replace(ALGORITHMS["reptile"], adapt=diverge))
    trials = few_shot_trials(None, data, plan_of(), arm="random", kind="held-out site", seed=1)
    assert {trial.note for trial in trials} == {"the adaptation diverged and counts as guessing"}
    assert {trial.metrics["balanced_accuracy"] for trial in trials} == {0.5}


def test_queries_are_capped(data: SiteData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.splits.MAX_QUERIES", 7)
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
    few_shot_trials(None, data, plan_of(), arm="random", kind="held-out site", seed=1)
    assert torch.equal(torch.rand(1), expected)


def findings(count: int) -> SiteData:
    """Stripes across for the first finding, a bright square for the second; each patient has one image."""
    rng = torch.Generator().manual_seed(3)
    labels = torch.tensor([[i % 2, i // 2 % 2] for i in range(count)]).float()
    images = torch.randint(0, 60, (count, 1, 16, 16), generator=rng)
    images = images + 120 * labels[:, 0].reshape(-1, 1, 1, 1).long() * (torch.arange(16) // 2 % 2)
    images[labels[:, 1] > 0, :, 4:10, 4:10] = 250
    ids = tuple(f"p{i}" for i in range(count))
    return SiteData(
        "alder",
        images.clamp(0, 255).to(torch.uint8),
        labels,
        torch.arange(count),
        ("stripes", "square"),
        ids,
        ("train",) * count,
        kind="multilabel",
    )


def squares(count: int) -> SiteData:
    """A bright square somewhere on noise; the mask says where."""
    rng = torch.Generator().manual_seed(4)
    images = torch.randint(0, 90, (count, 1, 16, 16), generator=rng)
    masks = torch.zeros(count, 16, 16, dtype=torch.uint8)
    for i in range(count):
        top, left = torch.randint(0, 9, (2,), generator=rng).tolist()
        masks[i, top : top + 7, left : left + 7] = 1
    images = (images + 160 * masks.unsqueeze(1)).clamp(0, 255).to(torch.uint8)
    ids = tuple(f"p{i}" for i in range(count))
    none = torch.zeros(count, dtype=torch.int64)
    return SiteData(
        "alder",
        images,
        none,
        torch.arange(count),
        ("background", "square"),
        ids,
        ("train",) * count,
        masks=masks,
        kind="segmentation",
    )


def tumours(count: int) -> SiteData:
    """Smooth waves; every third image has a bright blot."""
    rng = torch.Generator().manual_seed(5)
    wave = 100 + 40 * torch.sin(torch.arange(16) / 3).reshape(1, 1, 1, 16)
    images = (wave + torch.randn(count, 1, 16, 16, generator=rng) * 4).expand(count, 1, 16, 16).clone()
    labels = (torch.arange(count) % 3 == 0).long()
    images[labels > 0, :, 5:11, 5:11] = 250
    ids = tuple(f"p{i}" for i in range(count))
    return SiteData(
        "alder",
        images.clamp(0, 255).to(torch.uint8),
        labels,
        torch.arange(count),
        ("healthy", "tumour"),
        ids,
        ("train",) * count,
        kind="anomaly",
    )


FINDINGS = {"kind": "multilabel", "label_sets": {"two": ["stripes", "square"]}}
MASKS = {"kind": "segmentation", "label_sets": {"two": ["background", "square"]}}
HEALTHY = {"kind": "anomaly", "label_sets": {"two": ["healthy", "tumour"]}}
UNET = {"name": "unet"}
AUTOENCODER = {"name": "autoencoder", "head": "shared"}
MOVES = {"trainable": "all", "steps": 30, "lr": 0.3}
REDRAWS = {"trainable": "all", "steps": 30, "lr": 0.03}


@pytest.mark.parametrize(
    ("made", "plan", "metric", "least"),
    [
        (findings, plan_of(FINDINGS, shots=[5], adaptation=MOVES), "balanced_accuracy", 0.8),
        (squares, plan_of(MASKS, UNET, shots=[8], adaptation=MOVES), "dice", 0.7),
        (tumours, plan_of(HEALTHY, shots=[8], adaptation={"trainable": "head"}), "auroc", 0.9),
        (tumours, plan_of(HEALTHY, AUTOENCODER, shots=[8], adaptation=REDRAWS), "auroc", 0.9),
    ],
    ids=["findings", "masks", "healthy prototypes", "reconstruction"],
)
def test_every_kind_of_task_is_learned_from_a_few_images(
    made: Callable[[int], SiteData], plan: StudyPlan, metric: str, least: float
) -> None:
    trials = few_shot_trials(None, made(48), plan, arm="random", kind="held-out site", seed=1)
    assert {trial.note for trial in trials} == {""}
    reached = sum(trial.metrics[metric] for trial in trials) / len(trials)
    assert reached > least
    assert reached > trials[0].chance


def test_only_healthy_images_support_an_anomaly_study() -> None:
    data = tumours(30)
    split = next(patient_splits(data, 1, seed=0))
    (group,) = support_groups(data, split, torch.Generator())
    assert group.name == "healthy"
    assert set(data.labels[group.rows].tolist()) == {0}
    assert 1 in data.labels[split.query]


def test_an_image_with_two_findings_supports_both_and_counts_once() -> None:
    data = findings(40)
    split = next(patient_splits(data, 1, seed=0))
    groups = support_groups(data, split, torch.Generator())
    assert [group.name for group in groups] == ["stripes", "square", "no finding"]
    rows = support_rows(groups, 100)
    assert sorted(rows.tolist()) == sorted(split.support.tolist())


def test_support_sets_are_drawn_from_each_modality(data: SiteData) -> None:
    data = replace(data, modalities=torch.arange(len(data)) % 2)
    split = next(patient_splits(data, 1, seed=0))
    groups = support_groups(data, split, torch.Generator())
    rows = support_rows(groups, 2)
    assert len(groups) == 4
    drawn = [(int(data.labels[row]), int(data.modalities[row])) for row in rows]  # type: ignore[index]
    assert all(drawn.count((label, modality)) == 2 for label in (0, 1) for modality in (0, 1))


class _Says(nn.Module):
    """The body that answers with what stands in the first two pixels."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, 0, 0, :2]


def test_a_patient_with_two_modalities_is_fused_late() -> None:
    """Three images of one modality and one of another count half each, not three quarters to one."""
    network = build_model(plan_of().model, plan_of().task, ways=2)
    network.body, network.head = _Says(), nn.Identity()
    inputs = torch.zeros(5, 1, 1, 2)
    inputs[:3, 0, 0] = torch.tensor([0.0, 1.0])
    inputs[3, 0, 0] = torch.tensor([1.2, 0.0])
    inputs[4, 0, 0] = torch.tensor([0.0, 1.0])
    data = SiteData(
        "alder",
        torch.zeros(5, 1, 1, 2, dtype=torch.uint8),
        torch.tensor([0, 0, 0, 0, 1]),
        torch.tensor([0, 0, 0, 0, 1]),
        ("normal", "ill"),
        ("a", "b"),
        ("test",) * 5,
        modalities=torch.tensor([0, 0, 0, 1, 0]),
    )

    def accuracy(fuse: str) -> float:
        support = evenly(inputs, data.labels)
        return judge(learner(network), {}, support, data, inputs, plan_of(fuse=fuse)).metrics["balanced_accuracy"]

    assert accuracy("image") == pytest.approx((0.25 + 1) / 2)
    assert accuracy("patient") == 1.0  # logits (0.6, 0.5); three quarters to one would say (0.3, 0.75)


def test_a_subgroup_is_a_task_of_its_own(data: SiteData) -> None:
    details = tuple(Details(sex="F" if p % 4 < 2 else "M", age=20.0 + p) for p in data.patients.tolist())
    women = replace(data, details=details).matching(RowFilter(sex=["F"], min_age=24))
    assert set(women.patients.tolist()) == {4, 5, 8, 9}
    trials = few_shot_trials(None, women, plan_of(), arm="random", kind="held-out site", seed=1, target="alder/women")
    assert {trial.target for trial in trials} == {"alder/women"}


def test_unknown_details_match_only_what_asks_nothing() -> None:
    assert Details().match(RowFilter())
    for wanted in (RowFilter(sex=["F"]), RowFilter(min_age=0), RowFilter(max_age=200), RowFilter(scanner=["x"])):
        assert not Details().match(wanted)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "mapping"])
def test_a_new_hospital_adapts_what_any_algorithm_learned(data: SiteData, name: str) -> None:
    pull = {"proximal": 0.1} if name in ("fedprox", "mrmtl") else {}
    plan = plan_of(algorithm={"name": name, **pull}, shots=[5])
    trials = few_shot_trials(body_of(plan, seed=2), data, plan, arm="meta", kind="held-out site", seed=1)
    assert {trial.note for trial in trials} == {""}


def test_a_pull_to_the_mean_leaves_the_head_alone(data: SiteData) -> None:
    """A rate of 2 and a pull of 1 would throw a pulled head about; a new task's head has no mean to be near to."""
    network = build_model(plan_of().model, plan_of().task, ways=2, seed=1)
    spec = AdaptationSpec(trainable="head", steps=20, lr=2.0)
    free, pulled = (adapt(learner(network), parameters(network), everything(data), spec, pull=p) for p in (0.0, 1.0))
    assert torch.equal(free["head.weight"], pulled["head.weight"])
    spec = AdaptationSpec(trainable="all", steps=20, lr=0.1)
    far, near = (
        adapt(learner(network), with_head(parameters(network)), everything(data), spec, pull=p) for p in (0.0, 1.0)
    )
    name, start = first_convolution(network), parameters(network)
    assert (near[name] - start[name]).norm() < (far[name] - start[name]).norm()


def test_learned_rates_are_used(data: SiteData) -> None:
    plan = plan_of(algorithm={"name": "metasgd"}, shots=[5])
    body = body_of(plan, seed=2)
    still = {f"rate.{name}": torch.zeros(1) for name in ("head.weight", "head.bias")}
    run = {
        arm: few_shot_trials(start, data, plan, arm="meta", kind="held-out site", seed=1)
        for arm, start in (("plan's", body), ("none", body | still))
    }
    assert {trial.metrics["balanced_accuracy"] for trial in run["none"]} == {0.5}  # a zero head that never moves
    assert run["plan's"] != run["none"]


def test_sights_show_what_the_first_trial_found() -> None:
    data, plan = squares(24), plan_of(MASKS, UNET, shots=[8], adaptation=MOVES)
    seen = sights(None, data, plan, count=3, seed=1)
    assert len({sight.row for sight in seen}) == 3
    for sight in seen:
        assert sight.found is not None
        assert data.masks is not None
        both = ((sight.found > 0) & (data.masks[sight.row] > 0)).sum()
        assert 2 * both / ((sight.found > 0).sum() + (data.masks[sight.row] > 0).sum()) > 0.5
    anomalies = tumours(30)
    plan = plan_of(HEALTHY, AUTOENCODER, shots=[8], adaptation=REDRAWS)
    shown = sights(None, anomalies, plan, count=4, seed=1)
    unusual = {bool(anomalies.labels[sight.row]): sight for sight in shown}
    assert unusual[True].score > unusual[False].score
    hottest = unusual[True].found
    assert hottest is not None
    assert divmod(int(hottest.argmax()), 16) in [(y, x) for y in range(4, 12) for x in range(4, 12)]
