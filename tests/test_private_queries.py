"""The privacy law, query by query. Each check is a function of how queries are made, so that a planted bug can be
put in place of the real thing and must be caught by the very same check."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.optimizers.optimizer import DPOptimizer
from scipy import stats
from torch import Tensor, nn

import client.private_data
from client.data.dataset import SiteData
from client.grant import Grant
from client.optimizer import PatientDPOptimizer, draw_patients, os_generator
from client.private_data import Mechanism, Patients, PrivateDataset, Unprotected
from common.errors import UnchargedQuery
from common.models import Network, build_model, parameters, part_names
from common.params import Params, norm, select, subtract
from common.plan import ModelSpec, TaskSpec
from common.tasks import TASKS

TASK = TaskSpec(kind="classification", image_size=16, channels=1, label_sets={"two": ["no", "yes"]})
MODEL = ModelSpec(name="conv4", width=8)
CLIP, BATCH, NOISE = 0.5, 7.0, 2.0


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
        logits = torch.func.functional_call(net, leaves, (data.normalised(rows).double(),))
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


class ClipPerImage(DPOptimizer):
    """Stock Opacus: the unit is the image."""

    def group(self, patients: Tensor) -> None:
        pass


class ClipPerBatch(PatientDPOptimizer):
    def clip_and_accumulate(self) -> None:
        self._patients = torch.zeros_like(self._patients)  # type: ignore[arg-type]
        images = len(self.grad_samples[0])
        super().clip_and_accumulate()
        for parameter in self.params:
            parameter.summed_grad = parameter.summed_grad * images


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
            bad = torch.isnan(parameter.grad_sample).any()
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
    nan_patient_leaves_no_trace: [KeepsNaN, ClipPerImage],
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
        logits = torch.func.functional_call(net, params, (data.normalised(rows),))
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
