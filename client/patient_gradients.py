"""Gradients patient by patient, at hardly more than the cost of one gradient of the whole batch.

A chunk goes forward and back once, and no parameter gets a gradient on the way: each trained layer's input and the
gradient at its output are kept. From these, layer by layer, follow the patients' gradients, A and B being a row's
columns at a position (for a convolution the gradient's channels, and the patch of the input under it):

    g_p = sum over the patient's rows and positions t of A_t B_t'

`Written` out, in one grouped convolution or matrix product for all patients with the same number of rows; or, where a
large weight meets few positions, only `Measured` (Li 2022, arXiv:2110.05679, for images; Bu 2022, arXiv:2210.00038):

    ||g_p||^2 = sum over t, u of (A_t . A_u) (B_t . B_u)

with the clipped sum from the layer's own backward pass, each row's gradient times its patient's factor. A patient who
is alone in a chunk needs none of this: plain backward passes over as many of his rows at once as memory allows.

Images lie in channels_last where no convolution is trained, which takes an eighth less time on a CPU; where one is,
nothing is gained. Nothing is compiled: hooks would break the graph. Not measured on a GPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product, takewhile
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional

from common.models import FeatureNorm
from common.tasks import PerImage

_BLOCK = 64  # squares summed in float32, in eight lanes or more: a relative error below 4e-7 of the norm
_TRAFFIC = 25  # multiplications in the time that writing, reading and adding up one number takes
_FEW = 1_000  # numbers in a weight: to write them takes less time than the calls of measuring
_MANY_POSITIONS, _SMALL_WEIGHT = 100, 20_000  # from or up to here a grouped convolution is ahead on a CPU

Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear


@dataclass(frozen=True)
class Block:
    """Patients whose rows are worked on side by side: each has as many as the one with the most."""

    patients: int
    each: int
    start: int  # of its rows, which stand together
    filled: tuple[Tensor, Tensor] | None  # where rows are missing: (patients * each,) places to look, 1 or 0 if missing

    def of(self, rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Its share of both; a missing row is another of the same patient, with gradient zero."""
        if self.filled is None:
            where = slice(self.start, self.start + self.patients * self.each)
            return rows[where], gradients[where]
        places, real = (x.to(rows.device) for x in self.filled)
        return rows[places], gradients[places] * _by_row(real, gradients)


@dataclass(frozen=True)
class Grouping:
    """The rows of a chunk, patient by patient, those with about as many rows together."""

    order: Tensor  # int64 (n,): which row comes where
    owner: Tensor  # int64 (n,), in this order: of the patients as the blocks have them
    rows: Tensor  # int64 (patients,): of each patient
    blocks: tuple[Block, ...]

    @property
    def patients(self) -> int:
        return len(self.rows)


def grouping(patients: Tensor) -> Grouping:
    """Of the patient of each row, int64 (n,)."""
    _, owner, rows = torch.unique(patients, return_inverse=True, return_counts=True)
    by_size = torch.argsort(rows, stable=True)
    owner = torch.argsort(by_size)[owner]
    order = torch.argsort(owner, stable=True)
    rows = rows[by_size]
    starts = rows.cumsum(0) - rows
    doublings = rows.double().log2().ceil()
    alike = torch.unique_consecutive(doublings, return_counts=True)[1].tolist()
    blocks = (_block(start, some) for start, some in zip(starts.split(alike), rows.split(alike), strict=True))
    return Grouping(order, owner[order], rows, tuple(blocks))


def _block(starts: Tensor, rows: Tensor) -> Block:
    each, start = int(rows.max()), int(starts[0])
    if bool((rows == each).all()):
        return Block(len(rows), each, start, None)
    count = torch.arange(each)
    real = count < rows.unsqueeze(1)
    places = starts.unsqueeze(1) + torch.where(real, count, torch.zeros_like(count))
    return Block(len(rows), each, start, (places.flatten(), real.flatten().float()))


@dataclass(frozen=True)
class Written:
    """Gradients of some patients in one parameter: float32 (patients, *shape)."""

    values: Tensor

    @property
    def patients(self) -> int:
        return len(self.values)

    def squares(self) -> Tensor:
        """Squared norms, float64 (patients,) on the CPU."""
        flat = self.values.flatten(1)
        whole = flat.shape[1] // _BLOCK * _BLOCK
        blocks = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, _BLOCK)), dim=2) if whole else flat[:, :0]
        return (blocks.double().square().sum(dim=1) + flat[:, whole:].double().square().sum(dim=1)).cpu()

    def sum(self, factors: Tensor) -> Tensor:
        """Over patients, each times its factor, float64 (patients,); where that is 0 whatever the gradient is."""
        total: Tensor = torch.tensordot(factors.to(self.values), self._known(factors), dims=1)
        return total

    def each(self, factors: Tensor) -> Tensor:
        """The addends of `sum`, float64 (patients, *shape)."""
        return _by_row(factors.to(self.values.device), self.values) * self._known(factors).double()

    def _known(self, factors: Tensor) -> Tensor:
        if bool((factors > 0).all()):
            return self.values
        return torch.where(_by_row(factors > 0, self.values), self.values, torch.zeros_like(self.values))


@dataclass(frozen=True)
class Measured:
    """The same for a layer's weight, by norm alone."""

    layer: Layer
    rows: Tensor  # float32 (n, ...): the layer's input
    gradients: Tensor  # float32 (n, ...): the loss's gradient at its output
    owner: Tensor  # int64 (n,): the patient of each row, from 0
    blocks: tuple[Block, ...]

    @property
    def patients(self) -> int:
        return sum(block.patients for block in self.blocks)

    def squares(self) -> Tensor:
        """Squared norms, float64 (patients,) on the CPU.

        The sum will be computed in the rows' precision. Of T terms, each of a product with the factor, that is wrong by
        at most (T + 2) roundings of sum_t ||A_t|| ||B_t|| in whatever order (Higham 2002, section 3.1): so much counts
        as if it were gradient. What the patient does to the rounding of others' terms is nobody's share; where that
        matters, noise is discrete, and every gradient written out.
        """
        return torch.cat([self._squares(block) for block in self.blocks])

    def _squares(self, block: Block) -> Tensor:
        left, right = _products(self.layer, *block.of(self.rows, self.gradients), block.patients)
        squares = (left * right).sum(dim=(1, 2)).clamp(min=0.0)
        lengths = (left.diagonal(dim1=1, dim2=2) * right.diagonal(dim1=1, dim2=2)).sqrt().sum(dim=1)
        rounded = (left.shape[1] + 2) * _rounding(self.rows.dtype) * lengths
        return (squares.sqrt() + rounded).square().cpu()

    def sum(self, factors: Tensor) -> Tensor:
        """As `Written.sum`."""
        of_row = factors[self.owner].to(self.rows)
        rows, gradients = self.rows, self.gradients
        if not bool((factors > 0).all()):
            known = of_row > 0
            rows, gradients = (torch.where(_by_row(known, x), x, torch.zeros_like(x)) for x in (rows, gradients))
        return _weight_gradient(self.layer, rows, gradients * _by_row(of_row, gradients))


Share = Written | Measured
Shares = dict[nn.Parameter, list[Share]]  # of every trained parameter: all patients, in the grouping's order


def patient_gradients(
    forward: Callable[[Tensor], Tensor],
    network: nn.Module,
    loss: PerImage,
    inputs: Tensor,
    targets: Tensor,
    patients: Tensor,
    *,
    at_once: int,
    written: bool = False,
) -> tuple[Grouping, Shares]:
    """The gradient of each patient's mean loss in the network's trained parameters.

    `patients` (n,) is the patient of each row of `inputs` and `targets`. `forward` runs `network`. With `written` no
    gradient is only measured. A patient who is alone and has more than `at_once` rows is worked through in parts.
    """
    groups = grouping(patients)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not groups.patients:
        return groups, {parameter: [] for parameter in trained}
    if groups.patients == 1:
        return groups, _of_one_patient(forward, trained, loss, inputs, targets, at_once)
    inputs, targets = inputs[groups.order], targets[groups.order]
    layout = nullcontext() if any(p.dim() == 4 for p in trained) else _channels_last(network)
    with _frozen(trained), layout, _kept_layers(network, trained, groups, written) as kept:
        losses = loss(forward(inputs), targets)
        kept.hooked_off()
        total = (losses / groups.rows[groups.owner].to(losses)).sum()
        if kept.first:
            torch.autograd.grad(total, kept.first, allow_unused=True)
    return groups, {parameter: kept.shares.get(parameter, []) for parameter in trained}


def _of_one_patient(
    forward: Callable[[Tensor], Tensor],
    trained: list[nn.Parameter],
    loss: PerImage,
    inputs: Tensor,
    targets: Tensor,
    at_once: int,
) -> Shares:
    sums: list[Tensor] | None = None
    for some, right in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        part = loss(forward(some), right).sum() / len(inputs)
        gradients = torch.autograd.grad(part, trained, allow_unused=True, materialize_grads=True)
        sums = list(gradients) if sums is None else [a.add_(b) for a, b in zip(sums, gradients, strict=True)]
    return {p: [Written(g.unsqueeze(0))] for p, g in zip(trained, sums or [], strict=True)}


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Autograd computes gradients of activations only."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _channels_last(network: nn.Module) -> Iterator[None]:
    """Convolutions give images in this format, as their weights are. GroupNorm's backward pass (torch 2.13, CPU) is
    then a segmentation fault if no gradient of its input is asked for: here one always is."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@dataclass
class _Kept:
    """What trained layers saw on the way forward, turned into shares on the way back."""

    groups: Grouping
    trained: set[nn.Parameter]
    written: bool
    shares: Shares = field(default_factory=dict)
    first: list[Tensor] = field(default_factory=list)  # outputs before which nothing is trained
    uses: Counter[nn.Parameter] = field(default_factory=Counter)
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def forward_hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            self.first.append(output.requires_grad_())
        self.uses.update(self._of(module).values())
        output.register_hook(lambda gradient: self._take(module, inputs, gradient))

    def hooked_off(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in module.named_parameters(recurse=False) if p in self.trained}

    def _take(self, module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
        """Float32 even where the network computed in bfloat16: a norm must be that of what is summed."""
        rows, gradient = _wide(inputs[0].detach()), _wide(gradient)
        own = self._of(module)
        if isinstance(module, nn.GroupNorm):
            normal = functional.group_norm(rows, module.num_groups, eps=module.eps)
            self._add_rows(own, {"weight": (gradient * normal).flatten(2).sum(dim=2), "bias": _over_places(gradient)})
        elif isinstance(module, FeatureNorm):
            self._add_rows(own, module.row_gradients(rows, gradient))
        elif _is_layer(module):
            self._add_rows(own, {"bias": _over_places(gradient if _is_image(module) else gradient.movedim(-1, 1))})
            if "weight" in own:
                once = self.uses[own["weight"]] == 1 and not self.written
                self._add(own["weight"], _shares(module, rows, gradient, self.groups, may_measure=once))
        else:
            self._add_rows(own, _by_transform(module, own, inputs, gradient))

    def _add_rows(self, own: dict[str, nn.Parameter], of_rows: dict[str, Tensor]) -> None:
        """Gradients by row (n, *shape)."""
        for name in own.keys() & of_rows.keys():
            summed = of_rows[name].new_zeros(self.groups.patients, *own[name].shape)
            self._add(own[name], [Written(summed.index_add_(0, self.groups.owner.to(summed.device), of_rows[name]))])

    def _add(self, parameter: nn.Parameter, shares: list[Share]) -> None:
        before = self.shares.get(parameter)
        if before is not None:  # used more than once: written all
            shares = [Written(a.values + b.values) for a, b in zip(before, shares, strict=True)]  # type: ignore[union-attr]
        self.shares[parameter] = shares


@contextmanager
def _kept_layers(
    network: nn.Module, trained: Sequence[nn.Parameter], groups: Grouping, written: bool
) -> Iterator[_Kept]:
    kept = _Kept(groups, set(trained), written)
    try:
        for module in network.modules():
            if any(parameter in kept.trained for parameter in module.parameters(recurse=False)):
                kept.hooks.append(module.register_forward_hook(kept.forward_hook))
        yield kept
    finally:
        kept.hooked_off()


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def _is_image(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.ConvTranspose2d]:
    return isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))


def _is_layer(module: nn.Module) -> TypeGuard[Layer]:
    """With a weight whose gradient is a sum over positions of products of columns."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear)


def _over_places(gradient: Tensor) -> Tensor:
    """(n, C, ...) -> (n, C)."""
    return gradient.flatten(2).sum(dim=2) if gradient.dim() > 2 else gradient


def _by_transform(
    module: nn.Module, own: dict[str, nn.Parameter], inputs: tuple[Tensor, ...], gradient: Tensor
) -> dict[str, Tensor]:
    """Of any module that treats its rows alike: each row's gradient (n, *shape)."""
    values = {name: parameter.detach() for name, parameter in own.items()}

    def of_row(at_output: Tensor, *row: Tensor) -> dict[str, Tensor]:
        single = tuple(_wide(x.unsqueeze(0)) for x in row)
        gradients: dict[str, Tensor] = vjp(lambda values: functional_call(module, values, single), values)[1](
            at_output.unsqueeze(0)
        )[0]
        return gradients

    found: dict[str, Tensor] = vmap(of_row)(gradient, *(x.detach() for x in inputs))
    return found


def _shares(layer: Layer, rows: Tensor, gradients: Tensor, groups: Grouping, *, may_measure: bool) -> list[Share]:
    """Block by block whichever is less work: patients with few rows, who come first, are measured, all at once."""
    measured = tuple(
        takewhile(lambda b: may_measure and _measuring_pays(layer, rows, gradients, b.each), groups.blocks)
    )
    written = groups.blocks[len(measured) :]
    shares: list[Share] = [_written(layer, *b.of(rows, gradients), b.patients) for b in written]
    if not measured:
        return shares
    some = slice(0, written[0].start if written else len(rows))
    return [Measured(layer, rows[some], gradients[some], groups.owner[some], measured), *shares]


def _measuring_pays(layer: Layer, rows: Tensor, gradients: Tensor, each: int) -> bool:
    """Of patients with so many rows each."""
    numbers = layer.weight.numel()
    return numbers > _FEW and _measuring(layer, rows, gradients, each)[0] < _TRAFFIC * numbers


def _measuring(layer: Layer, rows: Tensor, gradients: Tensor, each: int) -> tuple[float, bool]:
    """Of a patient with so many rows: the time that it takes, in that of multiplications, and whether B'B is found
    sooner from products of pixels than from patches."""
    left, right = layer.weight.shape[0], layer.weight[0].numel()
    positions = each * _positions(layer, rows, gradients)
    if not _is_image(layer):
        return positions**2 * (left + right), False
    pixels = each * _narrow_and_wide(layer, rows, gradients)[1].shape[2:].numel()
    patched = right * positions * (positions + _TRAFFIC)
    kernel = math.prod(layer.kernel_size)
    by_pixels = pixels**2 * (right // kernel + _TRAFFIC)
    return positions**2 * left + min(patched, by_pixels), by_pixels < patched


def _written(layer: Layer, rows: Tensor, gradients: Tensor, patients: int) -> Written:
    """A block's."""
    positions = len(rows) // patients * _positions(layer, rows, gradients)
    crowd = positions >= _MANY_POSITIONS or layer.weight.numel() <= _SMALL_WEIGHT
    if not isinstance(layer, nn.Linear) and rows.device.type == "cpu" and crowd:
        return Written(_by_grouped_convolution(layer, rows, gradients, patients))
    a, b = _columns(layer, rows, gradients, patients)
    return Written((a @ b.mT).reshape(patients, *layer.weight.shape))


def _positions(layer: Layer, rows: Tensor, gradients: Tensor) -> int:
    """Of one row."""
    if not _is_image(layer):
        return gradients.shape[1:-1].numel()
    return _narrow_and_wide(layer, rows, gradients)[0].shape[2:].numel()


def _products(layer: Layer, rows: Tensor, gradients: Tensor, patients: int) -> tuple[Tensor, Tensor]:
    """A'A and B'B of each patient, float64 (patients, T, T)."""
    rows, gradients = rows.double(), gradients.double()
    if _is_image(layer) and _measuring(layer, rows, gradients, len(rows) // patients)[1]:
        narrow, wide = _narrow_and_wide(layer, rows, gradients)
        return _with_itself(_joined(narrow, patients)), _products_of_patches(layer, narrow, wide, patients)
    a, b = _columns(layer, rows, gradients, patients)
    return _with_itself(a), _with_itself(b)


def _products_of_patches(layer: nn.Conv2d | nn.ConvTranspose2d, narrow: Tensor, wide: Tensor, patients: int) -> Tensor:
    """B'B as products of pixels, summed over the kernel's places: patches overlap, and hold each pixel often."""
    of_rows = (len(wide) // patients, *wide.shape[2:])
    pixels = _with_itself(_joined(wide, patients)).reshape(patients, *of_rows, *of_rows)
    above, beside = map(int, layer.padding)
    pixels = functional.pad(pixels, [beside, beside, above, above, 0, 0, beside, beside, above, above])
    first, *others = (pixels[:, :, y, x, :, y, x] for y, x in _under_each_place(layer, narrow))
    total = first.clone()
    for other in others:
        total += other
    return total.flatten(4).flatten(1, 3)


def _with_itself(columns: Tensor) -> Tensor:
    """(patients, I, T) -> (patients, T, T)."""
    return columns.mT @ columns


def _columns(layer: Layer, rows: Tensor, gradients: Tensor, patients: int) -> tuple[Tensor, Tensor]:
    """A (patients, I, T) and B (patients, J, T): a patient's gradient is A B', I x J being the weight's shape."""
    if isinstance(layer, nn.Linear):
        return tuple(x.reshape(patients, -1, x.shape[-1]).mT for x in (gradients, rows))  # type: ignore[return-value]
    narrow, wide = _narrow_and_wide(layer, rows, gradients)
    above, beside = map(int, layer.padding)
    wide = functional.pad(wide, [beside, beside, above, above])
    n, c, *pixel = wide.stride()
    inside = [step * size for step, size in zip(layer.dilation, pixel, strict=True)]
    apart = [step * size for step, size in zip(layer.stride, pixel, strict=True)]
    each, places = len(wide) // patients, narrow.shape[2:]
    patches = wide.as_strided(
        (patients, wide.shape[1], *layer.kernel_size, each, *places), (each * n, c, *inside, n, *apart)
    )
    return _joined(narrow, patients), patches.flatten(4).flatten(1, 3)


def _under_each_place(layer: nn.Conv2d | nn.ConvTranspose2d, narrow: Tensor) -> Iterator[tuple[slice, ...]]:
    """For each place in the kernel the pixels of the padded image that come to lie under it, down and aside."""
    for place in product(*map(range, layer.kernel_size)):
        starts = [step * number for step, number in zip(layer.dilation, place, strict=True)]
        yield tuple(
            slice(start, start + (count - 1) * step + 1, step)
            for start, count, step in zip(starts, narrow.shape[2:], layer.stride, strict=True)
        )


def _narrow_and_wide(layer: nn.Module, rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The image whose pixels are positions, and the one whose patches belong to them."""
    return (rows, gradients) if isinstance(layer, nn.ConvTranspose2d) else (gradients, rows)


def _rounding(dtype: torch.dtype) -> float:
    """Of one operation, relative."""
    return torch.finfo(dtype).eps / 2


def _joined(images: Tensor, patients: int) -> Tensor:
    """(n, C, H, W) -> (patients, C, rows of each * H * W)."""
    joined: Tensor = images.flatten(2).unflatten(0, (patients, -1)).transpose(1, 2).flatten(2)
    return joined


def _by_grouped_convolution(
    layer: nn.Conv2d | nn.ConvTranspose2d, rows: Tensor, gradients: Tensor, patients: int
) -> Tensor:
    """Each patient is a group of channels of one convolution over his rows."""
    rows, gradients = (x.unflatten(0, (patients, -1)).transpose(0, 1).flatten(1, 2) for x in (rows, gradients))
    shape = (patients * layer.weight.shape[0], *layer.weight.shape[1:])
    found = _convolution(layer, shape, rows, gradients, groups=patients)
    return found.reshape(patients, *layer.weight.shape)


def _weight_gradient(layer: Layer, rows: Tensor, gradients: Tensor) -> Tensor:
    """Summed over rows: what backward computes."""
    if isinstance(layer, nn.Linear):
        return torch.mm(gradients.flatten(0, -2).mT, rows.flatten(0, -2))
    return _convolution(layer, tuple(layer.weight.shape), rows, gradients, groups=1)


def _convolution(
    layer: nn.Conv2d | nn.ConvTranspose2d, shape: tuple[int, ...], rows: Tensor, gradients: Tensor, *, groups: int
) -> Tensor:
    _, found, _ = torch.ops.aten.convolution_backward(
        gradients,
        rows,
        rows.new_empty(1).expand(shape),
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        isinstance(layer, nn.ConvTranspose2d),
        layer.output_padding,
        groups,
        (False, True, False),
    )
    gradient: Tensor = found
    return gradient


def _by_row(values: Tensor, like: Tensor) -> Tensor:
    """(n,) to stand before (n, ...)."""
    return values.to(like.device).reshape(-1, *[1] * (like.dim() - 1))
