"""The privacy law, query by query. Each check is a function of how queries are made, so that a planted bug can be
put in place of the real thing and must be caught by the very same check."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import one_hot

import client.private_data
from client.data.dataset import SiteData
from client.grant import Grant
from client.optimizer import PatientDPOptimizer, draw_patients, os_generator
from client.private_data import Mechanism, Patients, PrivateDataset, Seen, Unprotected
from common.algorithms.interface import ClassSums
from common.episodes import Episode
from common.errors import UnchargedQuery
from common.learner import Learner
from common.models import Network, build_model, parameters, part_names
from common.params import Params, norm, select, subtract
from common.plan import ModelSpec, TaskSpec
from common.tasks import CUT_PASTE, CUT_PASTE_OF_A_MODALITY, RECONSTRUCTION, TASKS, Task

TASK = TaskSpec(kind="classification", image_size=16, channels=1, label_sets={"two": ["no", "yes"]})
MODEL = ModelSpec(name="conv4", width=8)
CLIP, BATCH, NOISE = 0.5, 7.0, 2.0
MONAI = pytest.mark.skipif(find_spec("monai") is None, reason="MONAI is not installed: no U-Net")


def site(images_of_patients: list[int], seed: int = 0) -> SiteData:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(images_of_patients)
    return SiteData(
        site="alder",
        images=torch.randint(0, 256, (rows, 1, 16, 16), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, 2, (rows,), generator=generator),
        patients=torch.repeat_interleave(torch.arange(len(images_of_patients)), torch.tensor(images_of_patients)),
        label_names=("no", "yes"),
        patient_ids=tuple(f"p{i}" for i in range(len(images_of_patients))),
        split=("train",) * rows,
    )


def network(part: str = "all") -> tuple[Network, Params]:
    net = build_model(MODEL, TASK, ways=2, seed=3)
    params = select(parameters(net), part_names(net, part))
    generator = torch.Generator().manual_seed(1)
    params["head.weight"] = torch.randn(params["head.weight"].shape, generator=generator)
    return net, params


def dataset(
    data: SiteData, net: nn.Module, *, queries: int = 1000, chunk: int = 256, **changes: float
) -> PrivateDataset:
    values = {"sample_rate": 1.0, "noise_multiplier": NOISE, "clip": CLIP, "batch": BATCH, "max_images": 99} | changes
    mechanism = Mechanism(**values)  # type: ignore[arg-type]
    return PrivateDataset(Patients(data, net, TASKS["classification"], chunk_images=chunk), mechanism, Grant(queries))


def reference(data: SiteData, net: Network, params: Params, *, clip: float, batch: float) -> Params:
    """The formula, written out: one backward pass per patient, in float64."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
    net = net.double()
    leaves = {name: value.double().requires_grad_() for name, value in params.items()}
    for patient in data.patients.unique().tolist():
        rows = torch.nonzero(data.patients == patient).flatten()
        logits = torch.func.functional_call(net, leaves, (data.inputs(rows).double(),))
        loss = nn.functional.cross_entropy(logits, data.labels[rows])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        size = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for name, gradient in zip(leaves, gradients, strict=True):
            total[name] += gradient * min(1.0, clip / size)
    net.float()
    return {name: (value / batch).float() for name, value in total.items()}


# ---- the gradient query against the formula ---------------------------------------------------------------------


@pytest.mark.parametrize("part", ["all", "film", "head"])
@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_gradient_is_the_clipped_patient_mean_over_the_public_batch(part: str, chunk: int) -> None:
    net, params = network(part)
    data = site([1, 4, 2, 12, 1])
    got = dataset(data, net, chunk=chunk, noise_multiplier=1e-12).gradient(params)
    want = reference(data, net, params, clip=CLIP, batch=BATCH)
    assert got.keys() == params.keys()
    assert norm(subtract(got, want)) < 1e-5 * norm(want)


def test_a_head_scale_shares_the_clip_and_keeps_the_guarantee() -> None:
    """In scaled coordinates one patient moves at most C / B, and the noise there is z C / B for every entry."""
    net, params = network("film")
    scale = 0.1
    alone = dataset(site([3]), net, noise_multiplier=1e-12, clip=1e-3, head_scale=scale).gradient(params)
    inside = {name: value * (scale if name.startswith("head.") else 1.0) for name, value in alone.items()}
    assert norm(inside) * BATCH == pytest.approx(1e-3, rel=1e-3)
    nobody = site([1]).rows(torch.zeros(0, dtype=torch.int64))
    noise = dataset(nobody, net, head_scale=scale).gradient(params)
    for part, size in (("head.weight", NOISE * CLIP / BATCH / scale), ("body.2.weight", NOISE * CLIP / BATCH)):
        low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], noise[part].numel())
        assert low < float((noise[part].double() / size).square().sum()) < high


def test_a_head_scale_changes_nothing_where_nothing_is_clipped() -> None:
    net, params = network("film")
    data = site([1, 4, 2])
    got = dataset(data, net, noise_multiplier=1e-15, clip=1e6, head_scale=0.1).gradient(params)
    want = reference(data, net, params, clip=1e6, batch=BATCH)
    for name in params:
        assert norm({name: got[name] - want[name]}) < 1e-4 * norm({name: want[name]}) + 1e-7, name


def test_unprotected_gradient_is_the_mean_over_the_patients_who_joined() -> None:
    net, params = network()
    data = site([1, 4, 2])
    patients = Patients(data, net, TASKS["classification"], chunk_images=4)
    got = PrivateDataset(patients, Unprotected(sample_rate=1.0, max_images=99, seed=0), Grant(1)).gradient(params)
    want = reference(data, net, params, clip=1e9, batch=3)
    assert norm(subtract(got, want)) < 1e-4 * norm(want)


def test_at_most_m_images_of_a_patient_are_seen() -> None:
    net, _ = network()
    patients = Patients(site([9, 2, 30]), net, TASKS["classification"])
    drawn = patients.draw(sample_rate=1.0, max_images=3, generator=os_generator())
    assert [len(rows) for rows in drawn] == [3, 2, 3]
    assert len({tuple(sorted(patients.draw(sample_rate=1.0, max_images=3, generator=os_generator())[2].tolist()))
                for _ in range(20)}) > 1  # fmt: skip


# ---- laws, each with bugs that break it ---------------------------------------------------------------------------


class ClipPerImage(PatientDPOptimizer):
    """As stock Opacus: the unit is the image."""

    def group(self, patients: Tensor) -> None:
        super().group(torch.arange(len(patients)))


class ClipPerBatch(PatientDPOptimizer):
    def group(self, patients: Tensor) -> None:
        self.images = len(patients)
        super().group(torch.zeros_like(patients))

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        for parameter in self.params:
            parameter.summed_grad = parameter.summed_grad * self.images


class NoClip(PatientDPOptimizer):
    def clip_and_accumulate(self) -> None:
        bound, self.max_grad_norm = self.max_grad_norm, 1e12
        super().clip_and_accumulate()
        self.max_grad_norm = bound


class NoNoise(PatientDPOptimizer):
    def add_noise(self) -> None:
        for parameter in self.params:
            parameter.grad = parameter.summed_grad


class HalfNoise(PatientDPOptimizer):
    def add_noise(self) -> None:
        self.noise_multiplier /= 2
        super().add_noise()


class CountInNoise(PatientDPOptimizer):
    """Opacus' make_private: divides by the private number of rows."""

    def group(self, patients: Tensor) -> None:
        super().group(patients)
        self.expected_batch_size = max(1, len(patients))


class GlobalSeed(PatientDPOptimizer):
    def add_noise(self) -> None:
        self.generator = torch.default_generator
        super().add_noise()


class KeepsNaN(PatientDPOptimizer):
    def clip_and_accumulate(self) -> None:
        for parameter in self.params:
            bad = any(bool(torch.isnan(share.squares()).any()) for share in parameter.grad_sample)
        super().clip_and_accumulate()
        if bad:
            for parameter in self.params:
                parameter.summed_grad = parameter.summed_grad * math.nan


def patient_never_moves_more_than_clip() -> bool:
    """Present against absent, without noise: at most C/B, for one image and for twelve, alone and in a crowd."""
    net, params = network()
    params["head.weight"] = params["head.weight"] * 50  # gradients far above C
    for others in ([], [1, 3]):
        for images in (1, 12):
            data = site([*others, images])
            absent = data.rows(torch.nonzero(data.patients < len(others)).flatten())
            with_patient = dataset(data, net, noise_multiplier=1e-12).gradient(params)
            without = dataset(absent, net, noise_multiplier=1e-12).gradient(params)
            if norm(subtract(with_patient, without)) * BATCH > CLIP * (1 + 1e-4):
                return False
    return True


def noise_has_the_declared_scale() -> bool:
    """Queries on nobody are pure noise: std z C / B, checked by a chi-square interval at 1e-9."""
    net, params = network()
    nobody = site([1]).rows(torch.zeros(0, dtype=torch.int64))
    values = torch.cat([v.flatten().double() for v in dataset(nobody, net).gradient(params).values()])
    statistic = float((values / (NOISE * CLIP / BATCH)).square().sum())
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(values))
    return bool(low < statistic < high)


def noise_scale_ignores_who_is_there() -> bool:
    """The same noise scale with 1 and with 40 patients: differences of two queries have std sqrt(2) z C / B."""
    net, params = network()
    for patients in (1, 40):
        private = dataset(site([1] * patients), net)
        difference = subtract(private.gradient(params), private.gradient(params))
        values = torch.cat([v.flatten().double() for v in difference.values()])
        statistic = float((values / (math.sqrt(2) * NOISE * CLIP / BATCH)).square().sum())
        low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(values))
        if not low < statistic < high:
            return False
    return True


def same_experiment_seed_gives_other_noise() -> bool:
    net, params = network()
    nobody = site([1]).rows(torch.zeros(0, dtype=torch.int64))
    noises = []
    for _ in range(2):  # two sites that were given the same seed
        torch.manual_seed(0)
        noises.append(dataset(nobody, net).gradient(params))
    return norm(subtract(*noises)) > 0.1


def nan_patient_leaves_no_trace() -> bool:
    """One patient's images make the loss infinite: the release is finite and equal to the one without them."""
    net, params = network()
    data = site([2, 2])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses * torch.where(torch.arange(len(losses)) >= 2, math.nan, 1.0)

    task = type(TASKS["classification"])(loss=loss, score=TASKS["classification"].score)
    mechanism = Mechanism(sample_rate=1.0, noise_multiplier=1e-12, clip=CLIP, batch=BATCH, max_images=9)
    got = PrivateDataset(Patients(data, net, task), mechanism, Grant(1)).gradient(params)
    want = dataset(data.rows(torch.tensor([0, 1])), net, noise_multiplier=1e-12).gradient(params)
    return bool(norm(subtract(got, want)) < 1e-6)


LAWS = {
    patient_never_moves_more_than_clip: [ClipPerImage, ClipPerBatch, NoClip],
    noise_has_the_declared_scale: [NoNoise, HalfNoise, CountInNoise],
    noise_scale_ignores_who_is_there: [NoNoise, HalfNoise, CountInNoise],
    same_experiment_seed_gives_other_noise: [NoNoise, GlobalSeed],
    nan_patient_leaves_no_trace: [KeepsNaN],
}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_holds(law) -> None:  # type: ignore[no-untyped-def]
    assert law()


@pytest.mark.parametrize(
    ("law", "bug"), [(law, bug) for law, bugs in LAWS.items() for bug in bugs], ids=lambda x: x.__name__
)
def test_planted_bug_is_caught(law, bug, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(client.private_data, "PatientDPOptimizer", bug)
    assert not law()


# ---- traps that are refused ---------------------------------------------------------------------------------------


def test_step_without_patients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientDPOptimizer, "group", lambda self, patients: None)
    net, params = network()
    with pytest.raises(RuntimeError, match="every step needs the patient of each row"):
        dataset(site([1, 2]), net).gradient(params)


def test_empty_draw_still_adds_noise() -> None:
    net, params = network("film")
    release = dataset(site([2, 1]), net, sample_rate=1e-12).gradient(params)
    assert all(float(value.abs().sum()) > 0 for value in release.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_norm_is_refused(frozen: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(2))
    for parameter in net[1].parameters():
        parameter.requires_grad_(not frozen)  # frozen, Opacus' own validator lets it pass
    with pytest.raises(ValueError, match="1 is a BatchNorm2d: it mixes patients; use GroupNorm"):
        Patients(site([1]), net, TASKS["classification"])


def test_running_statistics_of_instance_norm_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, track_running_stats=True))
    with pytest.raises(ValueError, match="InstanceNorm2d"):
        Patients(site([1]), net, TASKS["classification"])


class _Counting(nn.Module):
    """A layer that carries data out in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += images.sum()
        return images


def test_a_buffer_that_changes_is_refused() -> None:
    net, params = network()
    net.body.append(_Counting())  # type: ignore[operator]
    patients = Patients(site([1, 2]), net, TASKS["classification"])
    private = PrivateDataset(patients, Unprotected(sample_rate=1.0, max_images=9, seed=0), Grant(1))
    with pytest.raises(UnchargedQuery, match="a buffer of the network changed"):
        private.gradient(params)


def test_no_query_without_a_grant() -> None:
    net, params = network("head")
    private = dataset(site([1, 2]), net, queries=2)
    private.gradient(params)
    private.score(params)
    for query in (private.gradient, private.score):
        with pytest.raises(UnchargedQuery, match="more private queries were asked than were charged"):
            query(params)


def test_nothing_of_a_query_stays_in_the_network() -> None:
    net, params = network()
    dataset(site([1, 2]), net).gradient(params)
    for parameter in net.parameters():
        assert parameter.grad is None
        assert getattr(parameter, "grad_sample", None) is None
        assert getattr(parameter, "summed_grad", None) is None


# ---- randomness ---------------------------------------------------------------------------------------------------


def test_torch_keeps_only_32_bits_of_a_cpu_seed() -> None:
    """The reason for `os_generator`: if this ever fails, torch has changed, and manual_seed may be enough."""
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.randn(9, generator=one), torch.randn(9, generator=two))


def test_os_generator_is_normal_and_never_repeats() -> None:
    draws = [torch.randn(20_000, dtype=torch.float64, generator=os_generator()) for _ in range(3)]
    assert len({float(d[0]) for d in draws}) == 3
    assert all(stats.kstest(d.numpy(), "norm").pvalue > 1e-9 for d in draws)
    state = os_generator().get_state()[24 : 24 + 8 * 624].reshape(-1, 8)
    assert len({tuple(word) for word in state.tolist()}) > 600  # the whole state, not a stretched seed
    assert int(state[:, 4:].sum()) == 0  # words of 32 bits


@pytest.mark.parametrize("rate", [0.05, 0.5, 1.0])
def test_poisson_coins_have_the_rate(rate: float) -> None:
    joined = sum(len(draw_patients(1000, sample_rate=rate, generator=os_generator())) for _ in range(20))
    assert stats.binomtest(joined, 20_000, rate).pvalue > 1e-9


# ---- the statistic query ------------------------------------------------------------------------------------------


def exact_score(data: SiteData, net: Network, params: Params) -> Iterator[float]:
    for patient in data.patients.unique().tolist():
        rows = torch.nonzero(data.patients == patient).flatten()
        logits = torch.func.functional_call(net, params, (data.inputs(rows),))
        yield float((logits.argmax(1) == data.labels[rows]).float().mean())


def test_score_is_the_mean_over_patients() -> None:
    net, params = network()
    data = site([1, 5, 2, 3])
    scores = list(exact_score(data, net, params))
    got = dataset(data, net, noise_multiplier=1e-12, batch=4.0, chunk=4).score(params)
    assert got == pytest.approx(sum(scores) / 4, abs=1e-6)


def test_score_noise_is_half_of_z_over_b() -> None:
    net, params = network()
    nobody = site([1]).rows(torch.zeros(0, dtype=torch.int64))
    private = dataset(nobody, net, batch=100.0)
    values = torch.tensor([private.score(params) for _ in range(400)], dtype=torch.float64) - 0.5
    statistic = float((values / (NOISE / (2 * 100.0))).square().sum())
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(values))
    assert low < statistic < high


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=6), st.integers(1, 4)
)
def test_a_patient_moves_a_statistic_by_at_most_its_radius(outputs: list[float], size: int) -> None:
    """Whatever fn returns, even outside [0, 1]: zeroing one patient moves the sum by at most sqrt(k)/2."""
    net, params = network("head")
    rows = site([len(outputs)])

    def fn(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.tensor(outputs[: len(labels)]).reshape(-1, 1).expand(-1, size)

    private = dataset(rows, net, noise_multiplier=1e-12, batch=1e3)
    moved = (private.statistic(params, fn).double() - 0.5) * 1e3
    assert float(moved.norm()) <= math.sqrt(size) / 2 * (1 + 1e-3) + 1e-3


# ---- the gradient query: other parameters, views, every kind of task ----------------------------------------------


def test_parameters_that_are_not_given_are_the_fixed_ones_or_public() -> None:
    """A gradient under a head that no gradient is taken in, and nothing of it in the next query."""
    net, params = network()
    data, body = site([2, 1, 3]), {name: value for name, value in params.items() if name.startswith("body.")}
    head = {name: value for name, value in params.items() if name.startswith("head.")}
    public = {**parameters(net)}
    private = dataset(data, net, noise_multiplier=1e-12)
    under_zero = private.gradient(body)
    under_head = private.gradient(body, fixed=head)
    assert under_head.keys() == body.keys()
    every = reference(data, net, params, clip=1e9, batch=1.0)
    far = dataset(data, net, noise_multiplier=1e-12, clip=1e4, batch=1.0)
    assert norm(subtract(far.gradient(body, fixed=head), select(every, body))) < 1e-4 * norm(select(every, body))
    assert norm(under_zero) < 1e-9 < norm(under_head)  # a zero head shields the body
    assert norm(subtract(private.gradient(body), under_zero)) < 1e-9
    assert all(torch.equal(private.public[name], value) for name, value in public.items())


def test_a_parameter_that_the_network_lacks_is_refused() -> None:
    net, params = network("head")
    with pytest.raises(ValueError, match=r"the network has no parameters \['body.nowhere'\]"):
        dataset(site([1]), net).gradient(params | {"body.nowhere": torch.zeros(1)})


@pytest.mark.parametrize("chunk", [1, 256])
def test_views_that_change_nothing_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views are more rows of the same patient: with the image itself as view, the very gradient of one view."""
    net, params = network()
    data = site([1, 4, 2])
    monkeypatch.setattr(client.private_data, "augment", lambda images, rng: images)
    one, many = (dataset(data, net, chunk=chunk, noise_multiplier=1e-12, views=v).gradient(params) for v in (1, 5))
    assert norm(subtract(one, many)) < 1e-5 * norm(one)
    plain = [
        PrivateDataset(
            Patients(data, net, TASKS["classification"], chunk_images=chunk),
            Unprotected(sample_rate=1.0, max_images=99, seed=0, views=v),
            Grant(1),
        ).gradient(params)
        for v in (1, 5)
    ]
    assert norm(subtract(*plain)) < 1e-5 * norm(plain[0])


def test_views_paired_with_the_wrong_patient_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted error: rows are taken to stand image by image, where they stand view by view."""
    net, params = network()
    data = site([1, 4, 2])
    monkeypatch.setattr(client.private_data, "augment", lambda images, rng: images)
    one = dataset(data, net, noise_multiplier=1e-12).gradient(params)

    def interleaved(patient: Tensor, rows: int) -> Tensor:
        return patient.repeat_interleave(rows // max(1, len(patient)))

    monkeypatch.setattr(client.private_data, "_repeated", interleaved)
    assert norm(subtract(dataset(data, net, noise_multiplier=1e-12, views=5).gradient(params), one)) > 0.01 * norm(one)


@pytest.mark.parametrize("kind", ["classification", pytest.param("segmentation", marks=MONAI), "autoencoder"])
def test_a_patient_of_many_views_moves_no_more_than_clip_and_an_empty_draw_adds_noise(kind: str) -> None:
    net, data, task = of_kind(kind, [4])
    params = parameters(net)
    nobody = data.rows(torch.zeros(0, dtype=torch.int64))

    def release(rows: SiteData, noise: float) -> Params:
        mechanism = Mechanism(sample_rate=1.0, noise_multiplier=noise, clip=1e-3, batch=BATCH, max_images=9, views=4)
        return PrivateDataset(Patients(rows, net, task), mechanism, Grant(1)).gradient(params)

    assert norm(release(data, 1e-12)) * BATCH == pytest.approx(1e-3, rel=1e-3)
    assert norm(release(nobody, 1e-12)) < 1e-9
    assert all(float(value.abs().sum()) > 0 for value in release(nobody, 1.0).values())


KINDS: dict[str, tuple[str, str, int, Task]] = {
    "classification": ("conv4", "classification", 0, TASKS["classification"]),
    "modalities": ("conv4", "classification", 2, TASKS["classification"]),
    "modalities-resnet": ("resnet", "classification", 2, TASKS["classification"]),
    "multilabel": ("conv4", "multilabel", 0, TASKS["multilabel"]),
    "segmentation": ("unet", "segmentation", 0, TASKS["segmentation"]),
    "cut-paste": ("conv4", "anomaly", 0, CUT_PASTE),
    "cut-paste-modalities": ("conv4", "anomaly", 2, CUT_PASTE_OF_A_MODALITY),
    "autoencoder": ("autoencoder", "anomaly", 0, RECONSTRUCTION),
}


def of_kind(kind: str, images: list[int]) -> tuple[Network, SiteData, Task]:
    """A network with a head that is not zero, a site's data, and the task."""
    model, task_kind, modalities, task = KINDS[kind]
    spec = TaskSpec.model_validate(
        {
            "kind": task_kind,
            "image_size": 16,
            "label_sets": {"two": ["no", "yes"]},
            "modalities": [f"m{number}" for number in range(modalities)],
        }
    )
    net = build_model(ModelSpec.model_validate({"name": model, "width": 8, "head": "shared"}), spec, ways=2, seed=3)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    data = site(images)
    rows = len(data)
    return (
        net,
        dataclasses.replace(
            data,
            kind=task_kind,  # type: ignore[arg-type]
            labels=torch.randint(0, 2, (rows, 2), generator=rng).float() if task_kind == "multilabel" else data.labels,
            masks=torch.randint(0, 2, (rows, 16, 16), dtype=torch.uint8, generator=rng),
            modalities=torch.arange(rows) % modalities if modalities else None,
        ),
        task,
    )


@pytest.mark.parametrize("kind", [pytest.param(k, marks=MONAI) if k == "segmentation" else k for k in KINDS])
@pytest.mark.parametrize("views", [1, 2])
def test_the_private_gradient_is_the_mean_over_patients_for_every_kind_of_task(
    kind: str, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly any noise, no clipping, everybody: plain autograd, patient by patient, on the same views."""
    net, data, task = of_kind(kind, [1, 4, 2])
    params, patients, seen = parameters(net), Patients(data, net, task), []
    honest = Patients.batch

    def watched(self: Patients, rows: Tensor, generator: torch.Generator, *, views: int = 1) -> tuple[Tensor, Tensor]:
        made = honest(self, rows, generator, views=views)
        seen.append((rows, *made))
        return made

    monkeypatch.setattr(Patients, "batch", watched)
    private = Mechanism(sample_rate=1.0, noise_multiplier=1e-14, clip=1e4, batch=3.0, max_images=99, views=views)
    plain = Unprotected(sample_rate=1.0, max_images=99, seed=0, views=views)
    for mechanism in (private, plain):
        got = PrivateDataset(patients, mechanism, Grant(1)).gradient(params)
        rows, inputs, targets = seen.pop()
        owner = data.patients[rows].repeat(len(inputs) // len(rows))
        assert len(inputs) == views * len(rows) * (2 if "cut-paste" in kind else 1)
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        for patient in range(3):
            leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
            loss = task.loss(functional_call(net, leaves, (inputs[owner == patient],)), targets[owner == patient])
            gradients = torch.autograd.grad(loss.mean(), list(leaves.values()))
            total = {name: total[name] + g / 3 for name, g in zip(total, gradients, strict=True)}
        assert norm(subtract(got, total)) < 1e-4 * norm(total)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=MONAI) if k == "segmentation" else k for k in KINDS])
@pytest.mark.parametrize("protected", [True, False])
def test_every_query_answers_where_nobody_joined(kind: str, protected: bool) -> None:
    """An empty Poisson draw is like any other; to fail then would tell that nobody joined."""
    net, data, task = of_kind(kind, [1, 4, 2])
    params, settings = parameters(net), {"sample_rate": 1e-12, "max_images": 9, "views": 2}
    mechanism: Mechanism | Unprotected = Unprotected(seed=0, **settings)  # type: ignore[arg-type]
    if protected:
        mechanism = Mechanism(noise_multiplier=1e-12, clip=1.0, batch=1.0, **settings)  # type: ignore[arg-type]
    private = PrivateDataset(Patients(data, net, task), mechanism, Grant(9))
    for release in (private.gradient(params), private.episode_gradient(params, constant_direction)):
        assert release.keys() == params.keys()
        assert norm(release) < 1e-8
    assert private.score(params) == pytest.approx(0.5)
    if data.kind == "classification":
        assert norm(private.class_sums(params)._asdict() | {"std": torch.zeros(1)}) < 1e-8


# ---- one unit of the grant for each query -------------------------------------------------------------------------


def constant_direction(learner: Learner, params: Params, task: Episode) -> Tensor:
    """A meta-loss whose gradient points one way and is far longer than C."""
    return 1e6 * params["head.weight"].sum()


QUERIES: dict[str, Callable[[PrivateDataset, Params], object]] = {
    "gradient": lambda private, params: private.gradient(params),
    "episode_gradient": lambda private, params: private.episode_gradient(params, constant_direction),
    "class_sums": lambda private, params: private.class_sums(params),
    "score": lambda private, params: private.score(params),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("protected", [True, False])
def test_each_query_uses_one_unit_and_without_one_computes_nothing(
    query: str, protected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, params = network("head")
    grant = Grant(2)
    mechanism: Mechanism | Unprotected = Unprotected(sample_rate=1.0, max_images=9, seed=0)
    if protected:
        mechanism = Mechanism(sample_rate=1.0, noise_multiplier=1.0, clip=1.0, batch=2.0, max_images=9)
    private = PrivateDataset(Patients(site([1, 2]), net, TASKS["classification"]), mechanism, grant)
    for left in (1, 0):
        QUERIES[query](private, params)
        assert grant.left == left
    monkeypatch.setattr(Patients, "draw", lambda *_, **__: pytest.fail("a patient was drawn"))
    with pytest.raises(UnchargedQuery, match="more private queries were asked than were charged"):
        QUERIES[query](private, params)


@pytest.mark.parametrize("first", QUERIES)
def test_nothing_of_a_query_is_in_the_next_one(first: str) -> None:
    """Whatever was asked before, at whatever parameters: the answer is that of a fresh data set."""
    net, params = network()
    data, head = site([2, 1, 3]), {name: value for name, value in params.items() if name.startswith("head.")}
    wanted = dataset(data, net, noise_multiplier=1e-12).gradient(head)
    private = dataset(data, net, noise_multiplier=1e-12)
    QUERIES[first](private, {name: value + 1.0 for name, value in params.items()})
    assert norm(subtract(private.gradient(head), wanted)) < 1e-6 * norm(wanted)


# ---- the episode query --------------------------------------------------------------------------------------------

EPISODES = 4


class Present(Patients):
    """Everybody joins but those in `absent`, whose records are zeroed out. Coins are the same either way."""

    absent: tuple[int, ...] = ()

    def draw(self, *, sample_rate: float, max_images: int, generator: torch.Generator) -> list[Tensor]:
        return [rows[:0] if p in self.absent else rows for p, rows in enumerate(self.images_of)]


def sign_of_content(learner: Learner, params: Params, task: Episode) -> Tensor:
    """The worst meta-loss: whoever joins or leaves an episode may turn its long gradient around."""
    content = task.support.inputs.double().sum() + task.query.inputs.double().sum()
    return 1e6 * torch.sign(torch.sin(content)) * params["head.weight"].sum()


def direction_of_content(learner: Learner, params: Params, task: Episode) -> Tensor:
    """Every other content pulls another way, so that what several episodes move by does not cancel."""
    content = task.support.inputs.double().sum() + 2 * task.query.inputs.double().sum()
    weight = params["head.weight"].flatten()
    return 1e6 * (torch.sin(content * torch.arange(1, len(weight) + 1)) * weight).sum()


class NoiseForC(PrivateDataset):
    def _noisy_sum_of_episodes(self, gradients: Any, params: Params, mechanism: Mechanism, generator: Any) -> Params:
        half = dataclasses.replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
        return super()._noisy_sum_of_episodes(gradients, params, half, generator)


class WithoutNoise(PrivateDataset):
    def _noisy_sum_of_episodes(self, gradients: Any, params: Params, mechanism: Mechanism, generator: Any) -> Params:
        silent = dataclasses.replace(mechanism, noise_multiplier=1e-12)
        return super()._noisy_sum_of_episodes(gradients, params, silent, generator)


class DividedByTheUsable(PrivateDataset):
    def _noisy_sum_of_episodes(self, gradients: Any, params: Params, mechanism: Mechanism, generator: Any) -> Params:
        usable = list(gradients)
        counted = dataclasses.replace(mechanism, episodes=max(1, len(usable)))
        return super()._noisy_sum_of_episodes(iter(usable), params, counted, generator)


class EpisodesNotClipped(PrivateDataset):
    """As if clipping patients, somewhere in the meta-loss, were enough."""

    def _noisy_sum_of_episodes(self, gradients: Any, params: Params, mechanism: Mechanism, generator: Any) -> Params:
        noise = mechanism.noise_multiplier * mechanism.clip / 1e9
        open_ = dataclasses.replace(mechanism, clip=1e9, noise_multiplier=noise)
        return super()._noisy_sum_of_episodes(gradients, params, open_, generator)


class ChunksOfPatients(PrivateDataset):
    """The list of those who joined, cut into episodes: who leaves shifts everyone behind."""

    def _episodes(self, generator: torch.Generator) -> list[Episode]:
        joined = [rows for rows in self._draw(generator) if len(rows)]
        size = max(2, math.ceil(len(joined) / EPISODES))
        chunks = [joined[start : start + size] for start in range(0, len(joined), size)]
        return [
            Episode(self._side(chunk[: len(chunk) // 2], generator), self._side(chunk[len(chunk) // 2 :], generator))
            for chunk in chunks
            if len(chunk) > 1
        ]


class KeepsNaNEpisodes(PrivateDataset):
    def _noisy_sum_of_episodes(self, gradients: Any, params: Params, mechanism: Mechanism, generator: Any) -> Params:
        every = list(gradients)
        total = super()._noisy_sum_of_episodes(iter(every), params, mechanism, generator)
        bad = any(bool(torch.isnan(value).any()) for gradient in every for value in gradient.values())
        return {name: value * math.nan for name, value in total.items()} if bad else total


def episode_query(
    make: type[PrivateDataset],
    meta_loss: Callable[[Learner, Params, Episode], Tensor],
    *,
    patients: int = 16,
    absent: tuple[int, ...] = (),
    seed: int = 0,
    noise: float = 1e-12,
) -> Params:
    """One release over patients of one and two images, all coins from `seed`."""
    net, params = network("head")
    everyone = Present(site([1, 2] * (patients // 2)), net, TASKS["classification"])
    everyone.absent = absent
    mechanism = Mechanism(
        sample_rate=1.0, noise_multiplier=noise, clip=CLIP, batch=BATCH, max_images=9, episodes=EPISODES
    )
    with pytest.MonkeyPatch.context() as patch:
        if noise < 1e-6:  # noise itself is never seeded
            patch.setattr(client.private_data, "os_generator", lambda: torch.Generator().manual_seed(seed))
        return make(everyone, mechanism, Grant(1)).episode_gradient(params, meta_loss)


def moves(make: type[PrivateDataset], meta_loss: Callable[[Learner, Params, Episode], Tensor]) -> Iterator[float]:
    """How far the sum over episodes moves, in units of C, as each of some patients is taken out."""
    for seed in range(4):
        everybody = episode_query(make, meta_loss, seed=seed)
        for patient in range(0, 16, 3):
            without = episode_query(make, meta_loss, absent=(patient,), seed=seed)
            yield norm(subtract(everybody, without)) * EPISODES / CLIP


def a_patient_moves_the_episodes_by_two_c_at_most(make: type[PrivateDataset]) -> bool:
    return max(*moves(make, sign_of_content), *moves(make, direction_of_content)) <= 2 * (1 + 1e-5)


def episode_noise_is_that_of_two_c(make: type[PrivateDataset]) -> bool:
    """Nobody there: std 2 z C / m, whatever is usable; by a chi-square interval at 1e-9."""
    nobody = tuple(range(16))
    released = [episode_query(make, constant_direction, absent=nobody, noise=NOISE) for _ in range(20)]
    values = torch.cat([value.flatten().double() for release in released for value in release.values()])
    statistic = float((values / (2 * NOISE * CLIP / EPISODES)).square().sum())
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(values))
    return bool(low < statistic < high)


def an_episode_that_cannot_be_used_adds_nothing(make: type[PrivateDataset]) -> bool:
    """Of m episodes all pull one way: the release is (usable / m) C, with few patients for less than all of m."""
    sizes = {
        round(norm(episode_query(make, constant_direction, patients=patients, seed=seed)) / CLIP * EPISODES, 4)
        for patients in (2, 4, 8)
        for seed in range(12)
    }
    return sizes <= {0.0, 1.0, 2.0, 3.0, 4.0} and {0.0, 1.0, 2.0} <= sizes


def a_nan_episode_adds_nothing(make: type[PrivateDataset]) -> bool:
    """One of the episodes has no finite gradient; the others' sum is all there is."""

    def spoiled(learner: Learner, params: Params, task: Episode) -> Tensor:
        loss = constant_direction(learner, params, task)
        return loss * math.nan if bool((len(task.support.inputs) + len(task.query.inputs)) % 2) else loss

    released = [episode_query(make, spoiled, seed=seed) for seed in range(6)]
    sizes = [norm(release) / CLIP * EPISODES for release in released]
    return all(math.isfinite(size) and abs(size - round(size)) < 1e-3 for size in sizes) and 0 < min(sizes) < 4


EPISODE_LAWS: dict[Callable[[type[PrivateDataset]], bool], list[type[PrivateDataset]]] = {
    a_patient_moves_the_episodes_by_two_c_at_most: [EpisodesNotClipped, ChunksOfPatients],
    episode_noise_is_that_of_two_c: [NoiseForC, WithoutNoise, DividedByTheUsable],
    an_episode_that_cannot_be_used_adds_nothing: [DividedByTheUsable, EpisodesNotClipped],
    a_nan_episode_adds_nothing: [KeepsNaNEpisodes],
}


@pytest.mark.parametrize("law", EPISODE_LAWS, ids=lambda law: law.__name__)
def test_episode_law_holds(law: Callable[[type[PrivateDataset]], bool]) -> None:
    assert law(PrivateDataset)


@pytest.mark.parametrize(
    ("law", "bug"), [(law, bug) for law, bugs in EPISODE_LAWS.items() for bug in bugs], ids=lambda x: x.__name__
)
def test_planted_episode_bug_is_caught(law: Callable[[type[PrivateDataset]], bool], bug: type[PrivateDataset]) -> None:
    assert not law(bug)


def test_two_c_is_attained() -> None:
    """So the noise may not be for less: the worst meta-loss turns one episode around."""
    assert max(moves(PrivateDataset, sign_of_content)) == pytest.approx(2.0, abs=1e-3)


def test_the_episode_gradient_is_the_mean_of_the_episodes_meta_gradients() -> None:
    """Patients of an episode count alike, however many images they have; unprotected, the mean over usable ones."""
    net, params = network()
    data, seen = site([1, 4, 2, 1, 3, 2]), []

    def watched(learner: Learner, params: Params, task: Episode) -> Tensor:
        seen.append(task)
        return learner.loss(learner.outputs(params, task.query.inputs), task.query)

    patients = Patients(data, net, TASKS["classification"])
    plain = Unprotected(sample_rate=1.0, max_images=99, seed=1, episodes=2)
    got = PrivateDataset(patients, plain, Grant(1)).episode_gradient(params, watched)
    assert seen
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for task in seen:
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        losses = nn.functional.cross_entropy(
            functional_call(net, leaves, (task.query.inputs,)), task.query.targets, reduction="none"
        )
        owner = owners(task.query.inputs, data)
        by_patient = torch.stack([losses[owner == p].mean() for p in owner.unique()])
        gradients = torch.autograd.grad(by_patient.mean(), list(leaves.values()))
        total = {name: total[name] + g / len(seen) for name, g in zip(total, gradients, strict=True)}
    assert norm(subtract(got, total)) < 1e-4 * norm(total)
    sides = [set(owners(side.inputs, data).tolist()) for task in seen for side in task]
    assert sum(map(len, sides)) == len(set().union(*sides))  # each patient is in one episode and on one side


def owners(inputs: Tensor, data: SiteData) -> Tensor:
    """The patient of each image."""
    every = data.inputs()
    return torch.stack([data.patients[(every == image).flatten(1).all(dim=1)][0] for image in inputs])


def test_each_episode_is_of_one_modality_and_every_modality_has_episodes() -> None:
    net, data, task = of_kind("modalities", [4] * 30)
    seen: list[set[float]] = []

    def watched(learner: Learner, params: Params, task: Episode) -> Tensor:
        seen.append({float(v) for side in task for v in side.inputs[:, -1].unique()})
        return constant_direction(learner, params, task)

    mechanism = Mechanism(
        sample_rate=1.0, noise_multiplier=1e-12, clip=1.0, batch=1.0, max_images=9, episodes=6, modalities=2
    )
    PrivateDataset(Patients(data, net, task), mechanism, Grant(1)).episode_gradient(parameters(net), watched)
    assert {frozenset(modalities) for modalities in seen} == {frozenset({0.0}), frozenset({1.0})}


def test_a_head_scale_shares_the_clip_of_an_episode() -> None:
    net, params = network()
    scale = 0.1

    def both(learner: Learner, params: Params, task: Episode) -> Tensor:
        return 1e6 * (params["head.weight"].sum() + params["body.2.weight"].sum())

    private = dataset(site([1] * 40), net, noise_multiplier=1e-12, head_scale=scale, episodes=2)
    release = private.episode_gradient(params, both)
    inside = {name: value * (scale if name.startswith("head.") else 1.0) for name, value in release.items()}
    assert norm(inside) == pytest.approx(CLIP, rel=1e-3)  # two episodes of C each, over m = 2


# ---- class sums ---------------------------------------------------------------------------------------------------

RADIUS = 2.0


def sums(make: type[PrivateDataset], data: SiteData, params: Params, net: Network, **changes: float) -> ClassSums:
    values = {"sample_rate": 1.0, "noise_multiplier": 1e-12, "clip": CLIP, "batch": BATCH, "max_images": 99} | changes
    mechanism = Mechanism(**values, feature_clip=RADIUS)  # type: ignore[arg-type]
    return make(Patients(data, net, TASKS["classification"]), mechanism, Grant(1)).class_sums(params)


def coordinates(found: ClassSums) -> Tensor:
    """The numbers to which noise was added: features / R and counts, times B / sqrt(2)."""
    parts = torch.cat([found.features / RADIUS, found.counts.unsqueeze(1)], dim=1)
    return parts.double().flatten() * BATCH / 2**0.5


class SumOverImages(PrivateDataset):
    """Each image bounded, but the sum of a patient's and not the mean."""

    def _class_vectors(self, seen: Seen, at_once: int, radius: float) -> Tensor:
        alone = dataclasses.replace(seen, patient=torch.arange(len(seen.patient)))
        return super()._class_vectors(alone, at_once, radius)


class FeaturesNotBounded(PrivateDataset):
    def _class_vectors(self, seen: Seen, at_once: int, radius: float) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client.private_data, "_sum_of_patients", _sum_of_means)
            return super()._class_vectors(seen, at_once, 1e9) * torch.tensor([1e9 / radius] * 32 + [1.0])


def _sum_of_means(values: Tensor, patient: Tensor, radius: float, lattice: object) -> Tensor:
    return torch.stack([values[patient == p].mean(dim=0) for p in patient.unique()]).sum(dim=0)


class DividedByTheTrueCount(PrivateDataset):
    def class_sums(self, params: Params) -> ClassSums:
        found = super().class_sums(params)
        labels = self._patients.data.labels
        counts = one_hot(labels, 2).sum(dim=0).clamp(min=1).float()
        return found._replace(features=found.features * BATCH / counts.unsqueeze(1))


class SumsWithoutNoise(PrivateDataset):
    def class_sums(self, params: Params) -> ClassSums:
        assert isinstance(self._mechanism, Mechanism)
        self._mechanism = dataclasses.replace(self._mechanism, noise_multiplier=1e-12)
        return super().class_sums(params)


def a_patient_moves_class_sums_by_one_at_most(make: type[PrivateDataset]) -> bool:
    """Of one image or thirty, of one label or two, with features far longer than R; nearly 1 is attained."""
    net, _ = network()
    (gain,) = (name for name in parameters(net) if name.endswith(".gain"))
    moved = []
    for images in (1, 30):
        for size in (1.0, 1e6):
            data = site([2, images])
            if images == 30:
                data = dataclasses.replace(data, labels=torch.ones_like(data.labels))
            params = {gain: torch.tensor([size])}
            alone = coordinates(sums(make, data.rows(torch.tensor([0, 1])), params, net))
            moved.append(float((coordinates(sums(make, data, params, net)) - alone).norm()))
    return max(moved) <= 1 + 1e-5 and max(moved) > 0.99


def class_sum_noise_is_z(make: type[PrivateDataset]) -> bool:
    """Differences of two releases on the same patients: std sqrt(2) z in the clipped coordinates, and so it is told."""
    net, _ = network()
    for data in (site([1] * 30), site([1]).rows(torch.zeros(0, dtype=torch.int64))):
        released = [sums(make, data, {}, net, noise_multiplier=NOISE) for _ in range(10)]
        values = torch.cat(
            [coordinates(a) - coordinates(b) for a, b in zip(released[::2], released[1::2], strict=True)]
        )
        statistic = float((values / (math.sqrt(2) * NOISE)).square().sum())
        low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(values))
        told = released[0].std == pytest.approx(NOISE * math.sqrt(2) * RADIUS / BATCH)
        if not (low < statistic < high and told):
            return False
    return True


def class_sums_are_unbiased(make: type[PrivateDataset]) -> bool:
    """Sums over patients of the means of their images' features by class, over B; shares of images likewise."""
    net, _ = network()
    (gain,) = (name for name in parameters(net) if name.endswith(".gain"))
    data, params = site([1, 5, 2, 3]), {gain: torch.tensor([1.0])}  # features of norm about 1, below R
    got = sums(make, data, params, net)
    with torch.no_grad():
        features = Learner(net, TASKS["classification"]).features(parameters(net) | params, data.inputs())
    wanted, counts = torch.zeros(2, 32), torch.zeros(2)
    for patient in range(4):
        mine = data.patients == patient
        for label in (0, 1):
            rows = mine & (data.labels == label)
            wanted[label] += features[rows].sum(dim=0) / mine.sum() / BATCH
            counts[label] += rows.sum() / mine.sum() / BATCH
    return torch.allclose(got.features, wanted, atol=1e-5) and torch.allclose(got.counts, counts, atol=1e-5)


SUM_LAWS: dict[Callable[[type[PrivateDataset]], bool], list[type[PrivateDataset]]] = {
    a_patient_moves_class_sums_by_one_at_most: [SumOverImages, FeaturesNotBounded],
    class_sum_noise_is_z: [SumsWithoutNoise, DividedByTheTrueCount],
    class_sums_are_unbiased: [SumOverImages, DividedByTheTrueCount],
}


@pytest.mark.parametrize("law", SUM_LAWS, ids=lambda law: law.__name__)
def test_class_sum_law_holds(law: Callable[[type[PrivateDataset]], bool]) -> None:
    assert law(PrivateDataset)


@pytest.mark.parametrize(
    ("law", "bug"), [(law, bug) for law, bugs in SUM_LAWS.items() for bug in bugs], ids=lambda x: x.__name__
)
def test_planted_class_sum_bug_is_caught(
    law: Callable[[type[PrivateDataset]], bool], bug: type[PrivateDataset]
) -> None:
    assert not law(bug)


def test_a_patient_whose_features_are_not_finite_adds_nothing_to_class_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = network()
    data = site([2, 2])
    wanted = sums(PrivateDataset, data.rows(torch.tensor([0, 1])), {}, net)
    honest = net.body.forward

    def spoiled(inputs: Tensor, modality: Tensor | None = None) -> Tensor:
        features = honest(inputs)
        return features * torch.where(torch.arange(len(features)) >= 2, math.nan, 1.0).unsqueeze(1)

    monkeypatch.setattr(net.body, "forward", spoiled)
    draw = Patients.draw
    monkeypatch.setattr(
        Patients, "draw", lambda self, **settings: [rows.sort().values for rows in draw(self, **settings)]
    )
    got = sums(PrivateDataset, data, {}, net)
    assert torch.allclose(got.features, wanted.features, atol=1e-6)
    assert torch.allclose(got.counts, wanted.counts, atol=1e-6)


def test_without_protection_class_sums_are_over_those_who_joined() -> None:
    net, _ = network()
    plain = Unprotected(sample_rate=1.0, max_images=99, seed=0, feature_clip=RADIUS)
    got = PrivateDataset(Patients(site([1, 4, 2]), net, TASKS["classification"]), plain, Grant(1)).class_sums({})
    noisy = sums(PrivateDataset, site([1, 4, 2]), {}, net, batch=3.0)
    assert torch.allclose(got.features, noisy.features, atol=1e-6)
    assert float(got.counts.sum()) == pytest.approx(1.0)
    assert got.std == 0.0
