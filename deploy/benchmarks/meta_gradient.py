"""Meta-gradients a second and their memory, beside peers and beside plain forward and backward passes.

    python -m deploy.benchmarks.meta_gradient

5-way 5-shot, 15 query images a class, 28 x 28, Conv-4 of 32 filters, 5 inner steps. What Consilium's algorithms call is
measured as it is; peers (torchopt, higher) get a row if they are installed. All take the same gradient, and that is
checked. Every row runs once in each round, so that all see the same machine; then once more in a process of its own for
its memory.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from multiprocessing import get_context
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from common.algorithms import fomaml, reptile
from common.algorithms.interface import ClassSums, LocalUpdateFunction
from common.algorithms.maml import query_loss_after
from common.algorithms.protonet import prototype_loss
from common.command_line import run
from common.episodes import Batch, Episode, MetaLoss, evenly, meta_gradients, side_by_side
from common.learner import Learner, gradient_at
from common.models import HEAD, build_model, parameters
from common.params import Params, add, norm, scale, select, subtract
from common.plan import AlgorithmSpec, ModelSpec, TaskSpec
from common.tasks import TASKS
from deploy.benchmarks.machine import TELLS_PEAKS, begin_peak, peak, processor

WAYS, SHOTS, QUERY, SIDE = 5, 5, 15, 28
SPEC = AlgorithmSpec(name="maml", inner_steps=5, inner_lr=0.1)
_AGREE = 1e-2  # relative; float32, five steps
_TOGETHER = 64  # episodes in one vmap
_MB = 2**20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Work:
    """Where all implementations start, and the tasks."""

    learner: Learner
    theta: Params
    episodes: list[Episode]

    @property
    def network(self) -> nn.Module:
        return self.learner.network

    @property
    def head(self) -> list[str]:
        return [name for name in self.theta if name.startswith(HEAD)]


Implementation = Callable[[Work], Params]  # -> the mean over tasks of their gradient, or of what Reptile moves by


@cache
def work_of(tasks: int, device: str) -> Work:
    """Random images: what is in them costs no time."""
    task = TaskSpec.model_validate(
        {"kind": "classification", "image_size": SIDE, "label_sets": {"five": list("abcde")}},
    )
    network = build_model(ModelSpec(name="conv4", width=32, trainable="all"), task, ways=WAYS).to(device)
    rng = torch.Generator().manual_seed(0)

    def batch(of_a_class: int) -> Batch:
        inputs = torch.randn(WAYS * of_a_class, 1, SIDE, SIDE, generator=rng)
        return evenly(inputs.to(device), torch.arange(len(inputs), device=device) % WAYS)

    episodes = [Episode(batch(SHOTS), batch(QUERY)) for _ in range(tasks)]
    return Work(Learner(network, TASKS["classification"]), parameters(network), episodes)


# ---- Consilium ----------------------------------------------------------------------------------------------------


@dataclass
class EpisodeQueries:
    """What a site answers without clipping and noise: of the support set for the inner steps, then of the query set."""

    learner: Learner
    public: Params
    episode: Episode
    asked: int = 0

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        batch = self.episode.support if self.asked < SPEC.inner_steps else self.episode.query
        self.asked += 1
        return gradient_at(params, lambda phi: self.learner.loss(self.learner.outputs(phi, batch.inputs), batch))

    def episode_gradient(self, params: Params, meta_loss: MetaLoss, fixed: Params | None = None) -> Params:
        raise NotImplementedError("measured by `meta_gradients`")

    def class_sums(self, params: Params) -> ClassSums:
        raise NotImplementedError("not measured")


def by_meta_gradients(work: Work, *, loss_of: Callable[[Work], MetaLoss], together: int = 1) -> Params:
    """As an episode query takes them."""
    found = meta_gradients(work.learner, work.theta, {}, work.episodes, loss_of(work), together=together)
    return mean(found)


def by_local_updates(work: Work, *, local_update: LocalUpdateFunction, factor: float = 1.0) -> Params:
    """One site a task, as many side by side as torch may use threads."""

    def of_site(learner: Learner, episode: Episode) -> Params:
        return local_update(work.theta, {}, EpisodeQueries(learner, work.theta, episode), SPEC).update

    return scale(mean(side_by_side(work.learner, work.episodes, of_site)), factor)


def maml_loss(work: Work) -> MetaLoss:
    """The inner loop moves everything."""
    return query_loss_after(SPEC, list(work.theta))


def anil_loss(work: Work) -> MetaLoss:
    """The inner loop moves the head."""
    return query_loss_after(SPEC, work.head)


def mean(gradients: Iterable[Params]) -> Params:
    """One after the other: none is kept."""
    total, count = {}, 0
    for gradient in gradients:
        total, count = add(total, gradient) if total else gradient, count + 1
    return scale(total, 1 / count)


# ---- peers --------------------------------------------------------------------------------------------------------


def loss_on(network: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """As a peer's user writes it."""
    return cross_entropy(network(batch.inputs), batch.targets)


Taken = Literal["exact", "first order", "move"]


def torch_func(work: Work, *, taken: Taken = "exact", moving: Sequence[str] = ()) -> Params:
    """The loop over tasks as torch's own documentation of `torch.func` writes it; `moving`: all, if none is named."""

    def loss(params: Params, batch: Batch) -> Tensor:
        return cross_entropy(functional_call(work.network, params, (batch.inputs,)), batch.targets)

    def after(theta: Params, episode: Episode) -> Params:
        phi = {name: theta[name] for name in moving or theta}
        for _ in range(SPEC.inner_steps):
            found = grad(lambda own: loss(theta | own, episode.support))(phi)
            phi = {name: value - SPEC.inner_lr * found[name] for name, value in phi.items()}
        return theta | phi

    def of_task(episode: Episode) -> Params:
        if taken == "exact":
            return grad(lambda theta: loss(after(theta, episode), episode.query))(work.theta)
        phi = after(work.theta, episode)
        return grad(loss)(phi, episode.query) if taken == "first order" else subtract(phi, work.theta)

    return mean(map(of_task, work.episodes))


def torch_func_prototypes(work: Work) -> Params:
    """The same for ProtoNet: there is no inner loop."""

    def loss(theta: Params, episode: Episode) -> Tensor:
        body = {name.removeprefix("body."): value for name, value in theta.items() if name.startswith("body.")}
        support, query = (functional_call(work.learner.network.body, body, (batch.inputs,)) for batch in episode)
        means = torch.stack([support[episode.support.targets == label].mean(dim=0) for label in range(WAYS)])
        return cross_entropy(-8.0 * torch.cdist(query, means).square(), episode.query.targets)

    return mean(grad(loss)(work.theta, episode) for episode in work.episodes)


def copy_and_sgd(work: Work, *, asks_query: bool) -> Params:
    """A deep copy of the network for each task, and torch's own optimizer on it."""

    def of_task(episode: Episode) -> Params:
        network = copy.deepcopy(work.network)
        optimizer = torch.optim.SGD(network.parameters(), lr=SPEC.inner_lr)
        for _ in range(SPEC.inner_steps):
            optimizer.zero_grad()
            loss_on(network, episode.support).backward()
            optimizer.step()
        if not asks_query:
            return subtract(parameters(network), work.theta)
        optimizer.zero_grad()
        loss_on(network, episode.query).backward()
        return gradients_of(network)

    return mean(map(of_task, work.episodes))


def torchopt(work: Work, *, part: str = "") -> Params:
    """`MetaSGD`, as torchopt's MAML example uses it; `part` is the module that the inner loop moves."""
    import torchopt

    network, moved = work.network, work.network.get_submodule(part)
    network.zero_grad()
    inner: Any = torchopt.MetaSGD(moved, lr=SPEC.inner_lr)
    start, start_of_inner = (torchopt.extract_state_dict(it, by="reference") for it in (moved, inner))
    for episode in work.episodes:
        network_of = _once_through_the_body(work, episode) if part else (network, network)
        for _ in range(SPEC.inner_steps):
            inner.step(loss_on(network_of[0], episode.support))
        loss_on(network_of[1], episode.query).backward()
        torchopt.recover_state_dict(moved, start)
        torchopt.recover_state_dict(inner, start_of_inner)
    return scale(gradients_of(network), 1 / len(work.episodes))


def higher(work: Work, *, part: str = "", first_order: bool = False) -> Params:
    """`innerloop_ctx`, without the copy of the weights that would cut the graph."""
    import higher as library

    network, moved = work.network, work.network.get_submodule(part)
    network.zero_grad()
    optimizer = torch.optim.SGD(moved.parameters(), lr=SPEC.inner_lr)
    first: list[Params] = []  # gradients at phi, which do not reach the network
    for episode in work.episodes:
        context = library.innerloop_ctx(
            moved, optimizer, copy_initial_weights=first_order, track_higher_grads=not first_order
        )
        with context as (patched, inner):
            network_of = _once_through_the_body(work, episode, patched) if part else (patched, patched)
            for _ in range(SPEC.inner_steps):
                inner.step(loss_on(network_of[0], episode.support))
            loss = loss_on(network_of[1], episode.query)
            if first_order:
                first.append(dict(zip(work.theta, torch.autograd.grad(loss, list(patched.parameters())), strict=True)))
            else:
                loss.backward()
    return mean(first) if first_order else scale(gradients_of(network), 1 / len(work.episodes))


Forward = Callable[[Tensor], Tensor]


def _once_through_the_body(work: Work, episode: Episode, head: Forward | None = None) -> tuple[Forward, Forward]:
    """ANIL's body does not move in the inner loop: heads on features of the support and of the query set."""
    apply = head or work.learner.network.head
    support, query = (work.learner.network.body(batch.inputs) for batch in episode)
    return lambda inputs: apply(support), lambda inputs: apply(query)


def gradients_of(network: nn.Module) -> Params:
    """What `backward` left."""
    return {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}


# ---- the limit ----------------------------------------------------------------------------------------------------


def plain_passes(work: Work, *, support: int, query: int) -> Params:
    """So many plain forward and backward passes over each task's support and query images, and nothing else."""
    network = work.network
    for episode in work.episodes:
        for batch, times in ((episode.support, support), (episode.query, query)):
            for _ in range(times):
                network.zero_grad()
                loss_on(network, batch).backward()
    return {}


def plain_passes_side_by_side(work: Work, *, support: int, query: int) -> Params:
    """The same, scheduled as Consilium schedules tasks: what of the gain is the schedule's."""

    def of_task(learner: Learner, episode: Episode) -> None:
        for batch, times in ((episode.support, support), (episode.query, query)):
            for _ in range(times):
                torch.autograd.grad(loss_on(learner.network, batch), list(learner.network.parameters()))

    list(side_by_side(work.learner, work.episodes, of_task))
    return {}


# ---- the table ----------------------------------------------------------------------------------------------------

OURS, BATCHED, LIMIT, SIDE_BY_SIDE = "Consilium", "Consilium, vmap", "limit", "limit, side by side"
_STEPS = SPEC.inner_steps
_FUNC, _COPY = "torch.func loop", "copy + torch.optim.SGD"
ROWS: dict[str, dict[str, Implementation]] = {
    "MAML": {
        OURS: partial(by_meta_gradients, loss_of=maml_loss),
        BATCHED: partial(by_meta_gradients, loss_of=maml_loss, together=_TOGETHER),
        _FUNC: torch_func,
        "torchopt": torchopt,
        "higher": higher,
        LIMIT: partial(plain_passes, support=_STEPS, query=1),
    },
    "first-order MAML": {
        OURS: partial(by_local_updates, local_update=fomaml.local_update, factor=-1 / SPEC.inner_lr),
        _FUNC: partial(torch_func, taken="first order"),
        _COPY: partial(copy_and_sgd, asks_query=True),
        "higher": partial(higher, first_order=True),
        LIMIT: partial(plain_passes, support=_STEPS, query=1),
        SIDE_BY_SIDE: partial(plain_passes_side_by_side, support=_STEPS, query=1),
    },
    "Reptile": {
        OURS: partial(by_local_updates, local_update=reptile.local_update),
        _FUNC: partial(torch_func, taken="move"),
        _COPY: partial(copy_and_sgd, asks_query=False),
        LIMIT: partial(plain_passes, support=_STEPS, query=0),
        SIDE_BY_SIDE: partial(plain_passes_side_by_side, support=_STEPS, query=0),
    },
    "ANIL": {
        OURS: partial(by_meta_gradients, loss_of=anil_loss),
        BATCHED: partial(by_meta_gradients, loss_of=anil_loss, together=_TOGETHER),
        _FUNC: lambda work: torch_func(work, moving=work.head),
        "torchopt": partial(torchopt, part="head"),
        "higher": partial(higher, part="head"),
        LIMIT: partial(plain_passes, support=1, query=1),
    },
    "ProtoNet": {
        OURS: partial(by_meta_gradients, loss_of=lambda work: prototype_loss),
        BATCHED: partial(by_meta_gradients, loss_of=lambda work: prototype_loss, together=_TOGETHER),
        _FUNC: torch_func_prototypes,
        LIMIT: partial(plain_passes, support=1, query=1),
    },
}

PEERS = ("torchopt", "higher")


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds of each round, bytes."""

    algorithm: str
    name: str
    tasks: int
    seconds: list[float]
    memory: int | None


def rows_of(peers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(algorithm, implementation) of those that can run here."""
    missing = set(PEERS) - set(peers)
    for algorithm, implementations in ROWS.items():
        yield from ((algorithm, name) for name in implementations if name not in missing)


def check(rows: Iterable[tuple[str, str]], work: Work) -> None:
    """Raises SystemExit if an implementation's gradient is not Consilium's: its time would be that of other work."""
    found = {(algorithm, name): ROWS[algorithm][name](work) for algorithm, name in rows}
    for (algorithm, name), gradient in found.items():
        ours = found[algorithm, OURS]
        away = norm(subtract(gradient, select(ours, gradient))) / norm(ours)
        if away > _AGREE:
            raise SystemExit(f"{algorithm}, {name}: the gradient is {away:.1g} of its length away from Consilium's")


def seconds_of(implementation: Implementation, work: Work) -> float:
    """Of one meta-iteration."""
    _synchronise(work)
    start = time.perf_counter()
    implementation(work)
    _synchronise(work)
    return time.perf_counter() - start


def _synchronise(work: Work) -> None:
    if work.episodes[0].query.inputs.is_cuda:
        torch.cuda.synchronize()


def peak_of(algorithm: str, name: str, tasks: int, device: str, threads: int) -> int | None:
    """Bytes that a meta-iteration needs over what one of two tasks left behind: the peak resident set of this
    process (Linux), or the device's peak; None where neither is told. For a process of its own."""
    torch.set_num_threads(threads)
    work = work_of(tasks, device)
    ROWS[algorithm][name](Work(work.learner, work.theta, work.episodes[:2]))
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        ROWS[algorithm][name](work)
        return torch.cuda.max_memory_allocated() - base
    if not TELLS_PEAKS:
        return None
    ctypes.CDLL(None).malloc_trim(0)
    base = begin_peak()
    ROWS[algorithm][name](work)
    return peak() - base


def measured(
    rows: list[tuple[str, str]], tasks: int, rounds: int, device: str, peaks: dict[tuple[str, str], int | None]
) -> list[Row]:
    """All rows, interleaved."""
    work = work_of(tasks, device)
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for algorithm, name in rows:
            seconds[algorithm, name].append(seconds_of(ROWS[algorithm][name], work))
    return [Row(*row, tasks, seconds[row], peaks.get(row)) for row in rows]


def peaks_of(rows: list[tuple[str, str]], tasks: int, device: str) -> dict[tuple[str, str], int | None]:
    """Each in a process of its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["common.algorithms", "common.models"])  # torch is imported once
    arguments = [(*row, tasks, device, torch.get_num_threads()) for row in rows]
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return dict(zip(rows, pool.map(peak_of, *zip(*arguments, strict=True)), strict=True))


def table(rows: list[Row]) -> Iterator[str]:
    """Markdown; times are medians over rounds."""
    limits = {(row.algorithm, row.tasks): median(row.seconds) for row in rows if row.name == LIMIT}
    yield "| algorithm | tasks | implementation | meta-iterations/s | share of the limit's time | peak MB over base |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        took = median(row.seconds)
        share = took / limits[row.algorithm, row.tasks]
        memory = "" if row.memory is None else f"{row.memory / _MB:.0f}"
        yield f"| {row.algorithm} | {row.tasks} | {row.name} | {1 / took:.2f} | {share:.2f} | {memory} |"


@app.command()
def main(
    tasks: Annotated[list[int], typer.Option(min=1, help="Tasks in a meta-iteration; may be given again.")] = [4, 16],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="How often each row runs; medians are shown.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Meta-gradients a second and their memory, beside peers and beside plain passes."""
    peers = [name for name in PEERS if _imports(name)]
    where = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    typer.echo(f"{where}, torch {torch.__version__}, {device}, median of {rounds}")
    typer.echo(_COLUMNS)
    rows, fewest = list(rows_of(peers)), min(tasks)
    check(rows, work_of(2, device))  # warms up, too
    peaks = peaks_of(rows, fewest, device)
    shown = [row for n in tasks for row in measured(rows, n, rounds, device, peaks if n == fewest else {})]
    for line in table(shown):
        typer.echo(line)


_COLUMNS = """
A meta-iteration is the mean gradient over the tasks (Reptile: what it moves by). The limit is a loop of as many plain
forward and backward passes over the same images: 5 x 25 and 1 x 75 a task for MAML of both orders, 5 x 25 for Reptile,
25 and 75 once for ANIL and ProtoNet; a share below 1 is faster. Memory is the peak resident set of a process of its own
over what a meta-iteration of two tasks left behind; for the fewest tasks, since only vmap's grows with them.
"""


def _imports(name: str) -> bool:
    try:
        import_module(name)
    except ImportError as error:
        typer.echo(f"no row of {name}: {error}")
        return False
    return True


if __name__ == "__main__":
    run(app)
