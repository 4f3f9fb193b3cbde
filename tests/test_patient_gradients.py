"""The patients' gradients: every way to them, against one backward pass per patient in float64; what the site's own
settings and a full memory change, which is nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import client.patient_gradients
import client.private_data
from client.data.dataset import SiteData
from client.grant import Grant
from client.ledger import Ledger, Terms
from client.optimizer import PatientDPOptimizer, os_generator
from client.patient_gradients import Measured, Share, Written, grouping, patient_gradients
from client.private_data import Mechanism, Patients, PrivateDataset, Seen
from client.site import load_site_config
from client.study import open_study
from common.accounting import Event
from common.errors import UnchargedQuery
from common.models import Network, build_model, parameters, part_names
from common.params import Params, norm, subtract, to_arrays
from common.plan import ModelSpec, TaskSpec
from common.starting_point import starting
from common.tasks import TASKS
from tests.conftest import PlanMaker, SiteMaker

CLIP = 0.05
LAYOUTS = {
    "few images": [4] * 6,
    "many images": [8] * 3,
    "one image each": [1] * 20,
    "ragged": [1, 11, 1, 2, 3, 1, 5, 4],
    "one patient": [9],
    "nobody": [],
}
NETWORKS = {
    "conv4": ("conv4", "classification", 16, "all", 0),
    "conv4-film": ("conv4", "classification", 16, "film", 0),
    "conv4-head": ("conv4", "classification", 16, "head", 0),
    "modalities": ("conv4", "classification", 16, "all", 2),
    "resnet": ("resnet", "classification", 16, "all", 0),
    "unet": ("unet", "segmentation", 8, "all", 0),
}
MONAI = pytest.mark.skipif(find_spec("monai") is None, reason="MONAI is not installed: no U-Net")
WAYS_TO_IT = [
    "chosen",
    "written",
    "products",
    "measured by pixels",
    "measured by patches",
    "one backward per patient",
    "chunks of two",
]


def network(name: str) -> tuple[Network, dict[str, nn.Parameter]]:
    """With a head that is not zero, and what is trained of it."""
    model, kind, _, part, modalities = NETWORKS[name]
    names = [f"m{number}" for number in range(modalities)]
    spec = TaskSpec.model_validate(
        {"kind": kind, "image_size": 16, "label_sets": {"two": ["no", "yes"]}, "modalities": names}
    )
    net = build_model(ModelSpec.model_validate({"name": model, "width": 8, "head": "shared"}), spec, ways=2, seed=3)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    trained = part_names(net, part)
    for key, parameter in net.named_parameters():
        parameter.requires_grad_(key in trained)
    return net, {key: parameter for key, parameter in net.named_parameters() if key in trained}


def rows(name: str, images: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets, and patients in no order."""
    _, kind, size, _, modalities = NETWORKS[name]
    rng, count = torch.Generator().manual_seed(0), sum(images)
    inputs = torch.rand(count, 1, size, size, generator=rng)
    if modalities:
        which = torch.arange(count) % modalities
        inputs = torch.cat([inputs, which.reshape(-1, 1, 1, 1).expand_as(inputs).float()], dim=1)
    targets = torch.randint(0, 2, (count, size, size) if kind == "segmentation" else (count,), generator=rng)
    owner = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images, dtype=torch.int64))
    return inputs, targets, owner[torch.randperm(count, generator=rng)]


@contextmanager
def way(name: str) -> Iterator[None]:
    """Nothing but this way to the gradients of layers' weights."""
    with pytest.MonkeyPatch.context() as patch:
        if name in ("measured by pixels", "measured by patches"):
            patch.setattr(client.patient_gradients, "_measuring", lambda *_: (0, name.endswith("pixels")))
            patch.setattr(client.patient_gradients, "_FEW", 0)
        elif name in ("written", "products"):
            patch.setattr(client.patient_gradients, "_FEW", math.inf)
        if name == "products":
            patch.setattr(client.patient_gradients, "_MANY_POSITIONS", 1e9)
            patch.setattr(client.patient_gradients, "_SMALL_WEIGHT", -1)
        yield


def clipped_sum(
    name: str, net: Network, trained: dict[str, nn.Parameter], seen: tuple[Tensor, Tensor, Tensor]
) -> tuple[Params, list[Share]]:
    """The sum, and the shares of which it was made."""
    inputs, targets, owner = seen
    optimizer = PatientDPOptimizer(
        trained.values(),
        scales=[1.0] * len(trained),
        noise_multiplier=0.0,
        max_grad_norm=CLIP,
        expected_batch_size=1,
        generator=os_generator(),
    )
    loss = TASKS["segmentation" if targets.dim() > 1 else "classification"].loss
    found: list[Share] = []
    one_by_one = [torch.nonzero(owner == patient).flatten() for patient in owner.unique()]
    two_by_two = [torch.cat(one_by_one[start : start + 2]) for start in range(0, len(one_by_one), 2)]
    chunks = {"one backward per patient": one_by_one, "chunks of two": two_by_two}
    with way(name):
        for where in chunks.get(name) or [torch.arange(len(owner))]:
            optimizer.group(owner[where])
            groups, shares = patient_gradients(
                net, net, loss, inputs[where], targets[where], optimizer.patients, at_once=5
            )
            optimizer.accumulate(groups, shares)
            found += [share for of_parameter in shares.values() for share in of_parameter]
    return dict(zip(trained, optimizer.release(), strict=True)), found


def formula(net: Network, trained: dict[str, nn.Parameter], seen: tuple[Tensor, Tensor, Tensor]) -> Params:
    """One backward pass per patient."""
    inputs, targets, owner = seen
    loss = TASKS["segmentation" if targets.dim() > 1 else "classification"].loss
    total = {key: torch.zeros_like(value) for key, value in trained.items()}
    for patient in owner.unique():
        mean = loss(net(inputs[owner == patient]), targets[owner == patient]).mean()
        own = dict(zip(trained, torch.autograd.grad(mean, list(trained.values())), strict=True))
        total = {key: value + own[key] * min(1.0, CLIP / (norm(own) * (1 + 1e-6))) for key, value in total.items()}
    return total


def difference(one: Params, other: Params) -> float:
    return norm(subtract(one, other)) / max(norm(other), 1e-30)


CASES = [("conv4", layout) for layout in LAYOUTS] + [(name, "ragged") for name in NETWORKS if name != "conv4"]


@pytest.mark.parametrize(("name", "layout"), [pytest.param(*c, marks=MONAI) if c[0] == "unet" else c for c in CASES])
def test_every_way_leads_to_the_same_clipped_sum(name: str, layout: str) -> None:
    """In float64, where no ReLU changes its mind with the size of a batch."""
    net, trained = network(name)
    net.double()
    inputs, targets, owner = rows(name, LAYOUTS[layout])
    seen = inputs.double(), targets, owner
    want = formula(net, trained, seen)
    for way_to_it in WAYS_TO_IT:
        got, _ = clipped_sum(way_to_it, net, trained, seen)
        assert got.keys() == trained.keys()
        assert difference(got, want) < 1e-6, way_to_it
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.values())
    assert all(parameter.is_contiguous() for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(("name", "last"), [("conv4-film", True), ("conv4", False)])
def test_images_are_in_channels_last_where_no_convolution_is_trained(name: str, last: bool) -> None:
    net, trained = network(name)
    seen = []
    hook = net.body[4].register_forward_hook(lambda *of: seen.append(of[2]))
    clipped_sum("chosen", net, trained, rows(name, LAYOUTS["ragged"]))
    hook.remove()
    assert all(maps.is_contiguous(memory_format=torch.channels_last) == last for maps in seen)
    assert seen


def test_the_way_is_chosen_by_the_data() -> None:
    """Layers with few positions are measured where patients have few images; on a lattice all is written out."""
    net, trained = network("conv4")
    measured = {}
    for layout in ("one image each", "many images"):
        _, shares = clipped_sum("chosen", net, trained, rows("conv4", LAYOUTS[layout]))
        measured[layout] = sum(isinstance(share, Measured) for share in shares)
    assert measured["one image each"] > measured["many images"]
    inputs, targets, owner = rows("conv4", LAYOUTS["one image each"])
    _, found = patient_gradients(
        net, net, TASKS["classification"].loss, inputs, targets, owner, at_once=99, written=True
    )
    assert all(isinstance(share, Written) for shares in found.values() for share in shares)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_a_grouping_holds_each_row_once_with_its_patient(owners: list[int]) -> None:
    patients = torch.tensor(owners)
    groups = grouping(patients)
    assert sorted(groups.order.tolist()) == list(range(len(owners)))
    assert sum(block.patients for block in groups.blocks) == len(set(owners)) == groups.patients
    numbers, ones = torch.arange(len(owners)).float()[groups.order], torch.ones(len(owners))
    first = 0
    for block in groups.blocks:
        found, real = (x.reshape(block.patients, block.each) for x in block.of(numbers, ones))
        for row, there in zip(found, real, strict=True):
            mine = patients[row.long()]
            assert len(mine.unique()) == 1
            assert int(there.sum()) == int((patients == mine[0]).sum()) == int(groups.rows[first])
            assert set(row[there > 0].tolist()) == set(torch.nonzero(patients == mine[0]).flatten().tolist())
            first += 1


@pytest.mark.parametrize("way_to_it", ["written", "measured by patches", "one backward per patient"])
def test_a_patient_who_is_not_finite_leaves_no_trace(way_to_it: str) -> None:
    net, trained = network("conv4")
    inputs, targets, owner = rows("conv4", LAYOUTS["ragged"])
    others = owner != 1
    inputs[torch.nonzero(owner == 1)[0]] = math.inf
    got, _ = clipped_sum(way_to_it, net, trained, (inputs, targets, owner))
    want, _ = clipped_sum(way_to_it, net, trained, (inputs[others], targets[others], owner[others]))
    assert 0 < norm(want) < math.inf
    assert difference(got, want) < 1e-5


def test_squares_are_those_of_float64() -> None:
    values = torch.randn(3, 7, 1001, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 1001)
    want = values.double().flatten(1).square().sum(dim=1)
    assert torch.allclose(Written(values).squares(), want, rtol=8e-7, atol=0.0)


@given(
    transposed=st.booleans(),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
@settings(deadline=None)
def test_patches_are_those_of_unfold_and_products_of_pixels_theirs(
    transposed: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    make, rng = nn.ConvTranspose2d if transposed else nn.Conv2d, torch.Generator().manual_seed(0)
    layer: Any = make(2, 3, kernel, stride, padding, dilation=dilation)
    inputs = torch.randn(6, 2, 7, 6, generator=rng)
    gradients = torch.randn(layer(inputs).shape, generator=rng)
    narrow, wide = (inputs, gradients) if transposed else (gradients, inputs)
    patches = functional.unfold(wide, kernel, dilation, padding, stride)
    a, b = (x.unflatten(0, (3, 2)).transpose(1, 2).flatten(2) for x in (narrow.flatten(2), patches))
    of_site = client.patient_gradients
    left, right = of_site._columns(layer, inputs, gradients, 3)
    assert torch.equal(left, a)
    assert torch.equal(right, b)
    for pixels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of_site, "_measuring", lambda *_, pixels=pixels: (0, pixels))
            left, right = of_site._products(layer, inputs, gradients, 3)
        assert torch.allclose(left, a.mT.double() @ a.double())
        assert torch.allclose(right, b.mT.double() @ b.double())


def sums_are_within_their_norms(seed: int, positions: int, *, cancelling: bool) -> bool:
    """Whether what float32 makes of a patient's sum is no longer than what is measured; some patients' true sums are
    next to nothing beside their terms."""
    rng = torch.Generator().manual_seed(seed)
    layer = nn.Linear(6, 5)
    inputs = torch.randn(4, positions, 6, generator=rng)
    gradients = torch.randn(4, positions, 5, generator=rng)
    if cancelling:
        inputs[:] = inputs[:, :1]
        gradients[:, -1] = -gradients[:, :-1].sum(dim=1)
    groups = grouping(torch.arange(4))
    measured = Measured(layer, inputs, gradients, groups.owner, groups.blocks)
    factors = 0.3 + 0.7 * torch.rand(4, dtype=torch.float64, generator=rng)
    alone = torch.stack([measured.sum(factors * one).double().norm() for one in torch.eye(4)])
    return bool((alone <= factors * measured.squares().sqrt()).all())


@given(seed=st.integers(0, 2**32 - 1), positions=st.integers(2, 200), cancelling=st.booleans())
def test_rounding_is_part_of_the_norm(seed: int, positions: int, cancelling: bool) -> None:
    assert sums_are_within_their_norms(seed, positions, cancelling=cancelling)


def test_without_its_allowance_a_cancelling_sum_is_longer_than_its_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.patient_gradients, "_rounding", lambda dtype: 0.0)
    assert not all(sums_are_within_their_norms(seed, 30, cancelling=True) for seed in range(10))


# ---- in the query: chunks, bfloat16, a full memory --------------------------------------------------------------


def site(images: list[int]) -> SiteData:
    rng, count = torch.Generator().manual_seed(0), sum(images)
    return SiteData(
        site="alder",
        images=torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=rng),
        labels=torch.randint(0, 2, (count,), generator=rng),
        patients=torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images)),
        label_names=("no", "yes"),
        patient_ids=tuple(f"p{number}" for number in range(len(images))),
        split=("train",) * count,
    )


def private(images: list[int], grant: Grant | None = None, *, noise: float = 1e-12, **of_site: Any) -> PrivateDataset:
    net, _ = network("conv4")
    mechanism = Mechanism(sample_rate=1.0, noise_multiplier=noise, clip=CLIP, batch=1.0, max_images=99, views=2)
    return PrivateDataset(Patients(site(images), net, TASKS["classification"], **of_site), mechanism, grant or Grant(9))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def a_patient_of_many_chunks_moves_no_more_than_clip() -> bool:
    dataset = private([12], chunk_images=5)
    return norm(dataset.gradient(parameters(dataset.learner.network))) < CLIP * (1 + 1e-4)


def test_a_patient_larger_than_a_chunk_is_clipped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert a_patient_of_many_chunks_moves_no_more_than_clip()

    def anywhere(self: Seen, at_once: int) -> list[Seen]:
        parts = zip(*(x.split(at_once) for x in (self.inputs, self.targets, self.patient)), strict=True)
        return [Seen(*part) for part in parts]

    monkeypatch.setattr(Seen, "cut", anywhere)  # the planted error: a clip per chunk
    assert not a_patient_of_many_chunks_moves_no_more_than_clip()


def clipped_under_autocast() -> float:
    """How far beyond C the farthest of a few patients is, each alone and beside another, as a share of C."""
    beyond = []
    for images in ([1], [4], [9]):
        alone, pair = (private(some, bf16=True) for some in (images, [*images, *images]))
        params = parameters(alone.learner.network)
        beyond.append(norm(alone.gradient(params)) / CLIP - 1)
        beyond.append(norm(pair.gradient(params)) / (2 * CLIP) - 1)
    return max(beyond)


def test_clipping_is_right_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.private_data, "os_generator", seeded)
    assert clipped_under_autocast() < 1e-5

    def in_bfloat16(self: Written) -> Tensor:
        total = torch.zeros(self.patients, dtype=torch.bfloat16)
        for numbers in self.values.bfloat16().flatten(1).split(4, dim=1):
            total += numbers.square().sum(dim=1)
        return total.double()

    monkeypatch.setattr(Written, "squares", in_bfloat16)  # the planted error
    assert clipped_under_autocast() > 1e-3


def test_bfloat16_is_used_where_the_site_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.private_data, "os_generator", seeded)
    params = parameters(network("conv4")[0])
    exact, rounded = (private([2, 3, 1], bf16=bf16).gradient(params) for bf16 in (False, True))
    assert 1e-4 < difference(rounded, exact) < 0.1
    assert all(value.dtype == torch.float32 for value in rounded.values())


class _FullOnTheWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor) -> Tensor:
        ctx.rows = len(outputs)
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if ctx.rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return gradient


def full_on_the_way(patch: pytest.MonkeyPatch) -> None:
    honest = Network.forward

    def forward(self: Network, inputs: Tensor) -> Tensor:
        if len(inputs) > 3:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return honest(self, inputs)

    patch.setattr(Network, "forward", forward)


def full_on_the_way_back(patch: pytest.MonkeyPatch) -> None:
    honest = Network.forward
    patch.setattr(Network, "forward", lambda self, inputs: _FullOnTheWayBack.apply(honest(self, inputs)))


def full_at_the_clip(patch: pytest.MonkeyPatch) -> None:
    honest = Written.sum

    def summed(self: Written, factors: Tensor) -> Tensor:
        if self.patients > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(self, factors)

    patch.setattr(Written, "sum", summed)


@pytest.mark.parametrize("full", [full_on_the_way, full_on_the_way_back, full_at_the_clip])
def test_a_full_memory_changes_no_answer_and_costs_nothing(
    full: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows at once, and again: no second charge, no second draw of patients, of views or of noise."""
    draws: list[str] = []
    ledger = Ledger.open(tmp_path, Terms(epsilon=50.0, delta=1e-3))
    grant = ledger.charge(study="a" * 64, round=1, event=Event(0.5, 2.0, 2))

    def counted(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **more: draws.append(name) or honest(*args, **more)

    monkeypatch.setattr(client.private_data, "os_generator", counted("generator", seeded))
    monkeypatch.setattr(client.private_data, "draw_patients", counted("patients", client.private_data.draw_patients))
    monkeypatch.setattr(client.private_data, "augment", counted("views", client.private_data.augment))
    monkeypatch.setattr(PatientDPOptimizer, "add_noise", counted("noise", PatientDPOptimizer.add_noise))
    images, params = [1, 4, 2, 1], parameters(network("conv4")[0])
    want = private(images, noise=1.0).gradient(params)
    once, fine = list(draws), private(images, noise=1.0).score(params)
    draws.clear()
    with pytest.MonkeyPatch.context() as patch:
        full(patch)
        dataset = private(images, grant, noise=1.0)
        got = dataset.gradient(params)
        assert draws == once
        assert difference(got, want) < 1e-5
        assert dataset.score(params) == pytest.approx(fine, abs=1e-6)
    assert grant.left == 0
    assert ledger.head()[0] == 1
    with pytest.raises(UnchargedQuery):
        dataset.gradient(params)


def test_a_memory_too_small_for_one_image_and_other_errors_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(network("conv4")[0])
    for message in ("can't allocate memory", "something else"):

        def fails(self: Network, inputs: Tensor, message: str = message) -> Tensor:
            raise RuntimeError(message)

        monkeypatch.setattr(Network, "forward", fails)
        with pytest.raises(RuntimeError, match=message):
            private([2, 1]).gradient(params)


def test_the_site_says_how_much_goes_at_once(make_site: SiteMaker, make_plan: PlanMaker) -> None:
    """From site.yaml to the study; the plan has no say in it."""
    folder, plan = make_site("alder"), make_plan(privacy=None)
    net = build_model(plan.model, plan.task, ways=2)
    initial = to_arrays(starting(plan, net))
    for text, want in (("", 64), ("hardware: {chunk_images: 3, bf16: true}\n", 3)):
        with (folder / "site.yaml").open("a") as file:
            file.write(text)
        study = open_study(folder, folder / "state", load_site_config(folder), plan, initial)
        assert study.patients.chunk_images == want
        assert study.patients._bf16 is bool(text)
