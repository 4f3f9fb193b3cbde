"""What a patient-level private gradient costs beside a plain one, and beside Opacus' image-level ones.

    python -m deploy.benchmarks.private_gradient --repeats 5

measures one training step of 64 images: drawing those who joined, reading them as inputs, forward, backward, clipping,
noise and the step, for Conv-4, ResNet-18 (GroupNorm) and U-Net. All rows of a network are measured in turn, `--repeats`
times over, each after a step of its own that does not count, for the row before left the memory as it needed it. The
first line of the output names the machine. Functorch mode and one patient after the other take too long with ResNet-18
and are left out there. `--device cuda` is for a GPU: not measured on one.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from client.data.dataset import SiteData
from client.grant import Grant
from client.patient_gradients import Written, patient_gradients
from client.private_data import Mechanism, Patients, PrivateDataset
from common.command_line import run
from common.models import MeanOverImage, Network, build_model, parameters, part_names
from common.params import select
from common.plan import ModelSpec, TaskSpec
from common.tasks import TASKS
from deploy.benchmarks.machine import TELLS_PEAKS, begin_peak, peak, processor

IMAGES, LR = 64, 0.01
LAYOUTS = {
    "16 x 4": [4] * 16,
    "8 x 8": [8] * 8,
    "64 x 1": [1] * 64,
    "ragged": [1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 8, 10, 14],
}
NETWORKS = {  # name -> model of a plan (ResNet-18 is not one), side of the images, task
    "Conv-4, 28 px": ("conv4", 28, "classification"),
    "Conv-4, 64 px": ("conv4", 64, "classification"),
    "ResNet-18, 32 px": ("resnet18", 32, "classification"),
    "U-Net, 32 px": ("unet", 32, "segmentation"),
}
SAFE = Mechanism(sample_rate=1.0, noise_multiplier=1.0, clip=1.0, batch=16.0, max_images=99)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Row:
    """One way to make a step."""

    name: str
    step: Callable[[], None]
    way: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


class _Basic(nn.Module):
    """ResNet's basic block (He 2016)."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        super().__init__()
        stride = 1 if incoming == outgoing else 2
        self.first = nn.Conv2d(incoming, outgoing, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(outgoing // 8, outgoing)
        self.second = nn.Conv2d(outgoing, outgoing, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(outgoing // 8, outgoing)
        self.short: nn.Module = nn.Identity()
        if stride == 2:
            convolution = nn.Conv2d(incoming, outgoing, 1, stride, bias=False)
            self.short = nn.Sequential(convolution, nn.GroupNorm(outgoing // 8, outgoing))

    def forward(self, maps: Tensor) -> Tensor:
        inside = torch.relu(self.first_norm(self.first(maps)))
        return torch.relu(self.second_norm(self.second(inside)) + self.short(maps))


def resnet18() -> nn.Sequential:
    """ResNet-18 with GroupNorm, one channel in, 512 features out."""
    stem = [
        nn.Conv2d(1, 64, 7, 2, padding=3, bias=False),
        nn.GroupNorm(8, 64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
    ]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    return nn.Sequential(*stem, *(_Basic(*pair) for pair in pairwise(widths)), MeanOverImage())


def network_of(model: str, side: int, kind: str) -> Network:
    """With a head that is not zero: else no gradient would reach the body."""
    if model == "resnet18":
        network = Network(resnet18(), nn.Linear(512, 2))
    else:
        spec = TaskSpec.model_validate({"kind": kind, "image_size": side, "label_sets": {"two": ["no", "yes"]}})
        width = 16 if model == "unet" else 32
        network = build_model(ModelSpec.model_validate({"name": model, "width": width, "head": "shared"}), spec, ways=2)
    for parameter in network.head.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    return network


def site(images: list[int], side: int, kind: str) -> SiteData:
    """Drawn images of patients who have so many each."""
    rng = torch.Generator().manual_seed(0)
    return SiteData(
        site="alder",
        images=torch.randint(0, 256, (IMAGES, 1, side, side), dtype=torch.uint8, generator=rng),
        labels=torch.randint(0, 2, (IMAGES,), generator=rng),
        patients=torch.repeat_interleave(torch.arange(len(images)), torch.tensor(images)),
        label_names=("no", "yes"),
        patient_ids=tuple(f"p{number}" for number in range(len(images))),
        split=("train",) * IMAGES,
        kind=kind,  # type: ignore[arg-type]
        masks=torch.randint(0, 2, (IMAGES, side, side), dtype=torch.uint8, generator=rng),
    )


@dataclass(frozen=True)
class Bench:
    """One network, its task and its images."""

    network: Network
    side: int
    kind: str
    device: str
    chunk: int

    def patients(self, layout: str, chunk: int | None = None) -> Patients:
        data = site(LAYOUTS[layout], self.side, self.kind)
        own = copy.deepcopy(self.network)
        return Patients(data, own, TASKS[self.kind], device=self.device, chunk_images=chunk or self.chunk)

    def plain(self, part: str = "all") -> Callable[[], None]:
        """Non-private SGD."""
        patients = self.patients("16 x 4")
        trained = _train(patients.network, part)

        def step() -> None:
            inputs, targets = patients.batch(torch.arange(IMAGES), torch.Generator())
            loss = patients.task.loss(patients.network(inputs), targets).mean()
            for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                parameter.data.sub_(gradient, alpha=LR)

        return step

    def ours(self, layout: str, part: str = "all", chunk: int | None = None) -> Callable[[], None]:
        """The private query, as an algorithm asks it."""
        patients = self.patients(layout, chunk)
        private = PrivateDataset(patients, SAFE, Grant(10**9))
        params = select(parameters(patients.network), part_names(patients.network, part))
        params = {name: value.cpu() for name, value in params.items()}

        def step() -> None:
            for name, gradient in private.gradient(params).items():
                params[name].sub_(gradient, alpha=LR)

        return step

    def way(self, layout: str, part: str = "all") -> str:
        """How the weights' gradients came about in the private query."""
        patients = self.patients(layout)
        _train(patients.network, part)
        drawn = patients.draw(sample_rate=1.0, max_images=99, generator=torch.Generator())
        count: Counter[str] = Counter()
        for rows, owner in patients.chunks(drawn):
            inputs, targets = patients.batch(rows, torch.Generator())
            _, shares = patient_gradients(
                patients.outputs, patients.network, patients.task.loss, inputs, targets, owner, at_once=IMAGES
            )
            for parameter, parts in shares.items():
                if parameter.dim() > 1:
                    for share in parts:
                        count["written" if isinstance(share, Written) else "measured"] += share.patients
        whole = count.total()
        return ", ".join(f"{100 * number / whole:.0f} % {way}" for way, number in count.most_common())

    def opacus(self, mode: str) -> Callable[[], None]:
        """Opacus as its manual says, the image its unit."""
        from opacus import GradSampleModule
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        patients = self.patients("64 x 1")
        trained, ghost = _train(patients.network, "all"), mode == "ghost"
        wrap: Any = GradSampleModuleFastGradientClipping if ghost else GradSampleModule
        more = {"max_grad_norm": 1.0} if ghost else {"force_functorch": mode == "functorch"}
        network = wrap(patients.network, loss_reduction="mean", **more)
        make: Any = DPOptimizerFastGradientClipping if ghost else DPOptimizer
        optimizer = make(
            torch.optim.SGD(trained, lr=LR), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=IMAGES
        )
        loss: Any = _Loss(patients.task.loss)
        if ghost:
            loss = DPLossFastGradientClipping(network, optimizer, loss, loss_reduction="mean")

        def step() -> None:
            inputs, targets = patients.batch(torch.arange(IMAGES), torch.Generator())
            optimizer.zero_grad()
            loss(network(inputs), targets).backward()
            optimizer.step()

        return step


class _Loss:
    """A per-image loss as Opacus wants a criterion."""

    reduction = "mean"

    def __init__(self, per_image: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._per_image = per_image

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self._per_image(outputs, targets)
        return losses.mean() if self.reduction == "mean" else losses


def _train(network: nn.Module, part: str) -> list[nn.Parameter]:
    names = part_names(network, part)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def rows_of(bench: Bench) -> list[Row]:
    """The first is what the others are divided by."""
    rows = [Row("non-private SGD", bench.plain()), Row("non-private SGD, FiLM and head", bench.plain("film"))]
    small = sum(parameter.numel() for parameter in bench.network.parameters()) < 10**6
    modes = ("hooks", "functorch", "ghost") if small else ("hooks", "ghost")
    rows += [Row(f"Opacus, images: {mode}", bench.opacus(mode)) for mode in modes]
    rows += [Row(f"ours, {layout}", bench.ours(layout), bench.way(layout)) for layout in LAYOUTS]
    rows.append(Row("ours, 16 x 4, chunks of 16", bench.ours("16 x 4", chunk=16)))
    if small:
        rows.append(Row("ours, 16 x 4, one by one", bench.ours("16 x 4", chunk=1), "a backward pass a row"))
    rows += [Row(f"ours, 16 x 4, {part}", bench.ours("16 x 4", part)) for part in ("film", "head")]
    return rows


def measure(row: Row, device: str) -> None:
    """Seconds of one step, the second of two."""
    for _ in range(2):
        started = time.perf_counter()
        row.step()
        if device == "cuda":
            torch.cuda.synchronize()
    row.seconds.append(time.perf_counter() - started)


def peak_mb(step: Callable[[], None], device: str) -> float:
    """Memory of one step above what stood before it: the model is in both."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not TELLS_PEAKS:
        return float("nan")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = begin_peak()
    step()
    return (peak() - before) / 2**20


def machine(device: str) -> str:
    """Where this runs."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@app.command()
def main(
    repeats: Annotated[int, typer.Option(min=1, help="Measured steps of each row.")] = 5,
    only: Annotated[str, typer.Option(help="Networks whose name has this in it.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    chunk: Annotated[int, typer.Option(min=1, help="Images at once, as hardware.chunk_images in site.yaml.")] = IMAGES,
) -> None:
    """Images per second and memory of a private gradient."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus' hook on the first layer
    typer.echo(f"{machine(device)}; {IMAGES} images a step, medians of {repeats}; 16 x 4: 16 patients of 4 images.")
    typer.echo(
        "Ratio: time, by that of non-private SGD. MB: peak of a step over the model. Weights' gradients per patient"
    )
    typer.echo("are written out, or only their norms measured, whichever is less work.\n")
    typer.echo("| network | | images/s | ratio | MB | weights |\n|---|---|---|---|---|---|")
    for name, (model, side, kind) in NETWORKS.items():
        if only.lower() not in name.lower():
            continue
        rows = rows_of(Bench(network_of(model, side, kind), side, kind, device, chunk))
        for _ in range(repeats):
            for row in rows:
                measure(row, device)
        for row in rows:
            row.peak_mb = peak_mb(row.step, device)
            seconds, plain = median(row.seconds), median(rows[0].seconds)
            figures = f"{IMAGES / seconds:.0f} | {seconds / plain:.2f} | {row.peak_mb:.0f} | {row.way}"
            typer.echo(f"| {name} | {row.name} | {figures} |")


if __name__ == "__main__":
    run(app)
