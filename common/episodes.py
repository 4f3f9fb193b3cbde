"""Episodes: small tasks with a support set to adapt to and a query set to be judged on, and their meta-gradients."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import pad

from common.learner import Learner, gradient_at
from common.params import Params

Result = TypeVar("Result")
_AT_ONCE = 8  # episodes side by side: the bound of their memory


class Batch(NamedTuple):
    """Inputs as a network takes them, what is right, and how much each row counts (float; 0 is padding)."""

    inputs: Tensor  # float (n, C, H, W)
    targets: Tensor  # (n, ...)
    weights: Tensor  # float (n,), not all 0


class Episode(NamedTuple):
    """Patients of the two sides are different ones."""

    support: Batch
    query: Batch


MetaLoss = Callable[[Learner, Params, Episode], Tensor]  # -> scalar, differentiable in the parameters


def evenly(inputs: Tensor, targets: Tensor) -> Batch:
    """A batch whose rows count alike."""
    return Batch(inputs, targets, torch.ones(len(inputs), device=inputs.device))


def meta_gradients(
    learner: Learner,
    params: Params,
    fixed: Params,
    episodes: Sequence[Episode],
    meta_loss: MetaLoss,
    *,
    together: int = 1,
) -> Iterator[Params]:
    """The gradient of `meta_loss` in `params`, `fixed` held still, for each episode in turn.

    `together` episodes at once by vmap, which pays on a GPU, or each by itself, which is as fast on a CPU and in a
    seventh of the memory (`side_by_side`); the numbers are the same.
    """

    def gradient(twin: Learner, episode: Episode) -> Params:
        return gradient_at(params, lambda moving: meta_loss(twin, fixed | moving, episode))

    if together == 1:
        yield from side_by_side(learner, episodes, gradient)
        return
    for start in range(0, len(episodes), together):
        chunk = episodes[start : start + together]
        stacked = vmap(lambda episode: gradient(learner, episode))(_stack(chunk))
        for number in range(len(chunk)):
            yield {name: value[number] for name, value in stacked.items()}


def side_by_side(
    learner: Learner, episodes: Sequence[Episode], work: Callable[[Learner, Episode], Result]
) -> Iterator[Result]:
    """What `work` makes of each episode, in their order. On a CPU as many at once as torch may use threads, up to a
    bound of memory: a small batch leaves a second thread inside an operation little to do."""
    before, on_cpu = torch.get_num_threads(), all(episode.support.inputs.device.type == "cpu" for episode in episodes)
    at_once = min(before, len(episodes), _AT_ONCE) if on_cpu else 1
    if at_once <= 1:
        for episode in episodes:
            yield work(learner, episode)
        return
    free = deque(learner.twin() for _ in range(at_once))
    running: deque[Future[Result]] = deque()

    def on_a_twin(episode: Episode) -> Result:
        twin = free.popleft()
        try:
            return work(twin, episode)
        finally:
            free.append(twin)

    torch.set_num_threads(before // at_once)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            for episode in episodes:
                if len(running) == at_once:
                    yield running.popleft().result()
                running.append(pool.submit(on_a_twin, episode))
            while running:
                yield running.popleft().result()
    finally:
        torch.set_num_threads(before)


def _stack(episodes: Sequence[Episode]) -> Episode:
    """Episodes of different sizes as one, padded with rows that count nothing."""
    supports, queries = zip(*episodes, strict=True)
    return Episode(_stack_batches(supports), _stack_batches(queries))


def _stack_batches(batches: Sequence[Batch]) -> Batch:
    size = max(len(batch.weights) for batch in batches)
    columns = ([_padded(value, size) for value in column] for column in zip(*batches, strict=True))
    return Batch(*map(torch.stack, columns))


def _padded(value: Tensor, size: int) -> Tensor:
    return pad(value, [0, 0] * (value.dim() - 1) + [0, size - len(value)])
