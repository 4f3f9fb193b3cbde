"""The third phase of the warm start, where a plan trains a mapping: the encoder that says what a task looks like.

It learns by supervised contrastive learning that support sets of one task belong together and those of others do not.
A task is a few labels of one public data set; a support set is shown by its class prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.contrastive import supervised_contrastive
from common.mapping import ENCODER, TaskEncoder
from common.models import Network, build_model
from common.params import Params, detach
from common.plan import StudyPlan
from server.pretrain import Steps
from server.public_episodes import draw_labels, has_tasks, patients_of, sets_with_tasks
from server.public_sets import PublicSet

_LR, _STEPS = 3e-3, 300  # Adam's
_TASKS, _SUPPORTS = 100, 12  # tasks to draw, the same one perhaps twice; support sets of each
_TASKS_A_STEP, _SUPPORTS_A_STEP = 16, 4
_VIEWS, _CHUNK = 4, 200  # random views of each image; images in one forward pass
_HELD_OUT, _ASKED = 0.25, 25  # share of the patients, and support sets of each data set, for `_retrieved`


@dataclass(frozen=True)
class _Shown:
    """A public set as a trained body sees it."""

    public: PublicSet
    features: Tensor  # float (views, n, F)

    def seen(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """(m, F): each of these rows in one of its views."""
        return self.features[torch.randint(len(self.features), (len(rows),), generator=rng), rows]


def needs_encoder(plan: StudyPlan) -> bool:
    """Whether the study, or what it is compared with, trains a mapping."""
    return "mapping" in {
        plan.model.trainable,
        *(other.model(plan.model).trainable for other in plan.evaluation.compare),
    }


def train_encoder(
    body: Params, sets: Sequence[PublicSet], plan: StudyPlan, *, seed: int, each_step: Steps = iter
) -> tuple[Params, float]:
    """The encoder's parameters, and how often a support set of held-out patients is nearest to another of its data set
    (1 / number of sets is chance).

    Raises UsageError if no set has enough labels and patients.
    """
    rng = torch.Generator().manual_seed(seed)
    network = build_model(plan.model, plan.task, ways=2, seed=seed)
    network.load_state_dict(body, strict=False)
    parts = [_parted(public, rng) for public in sets]
    learning = [_shown(network, public, rng) for public in sets_with_tasks([most for most, _ in parts], plan)]
    judging = [_shown(network, rest, rng) for _, rest in parts if has_tasks(rest)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = TaskEncoder(learning[0].features.shape[2])
    optimizer = torch.optim.Adam(encoder.parameters(), lr=_LR)
    pool = _tasks(learning, plan, rng)
    for _ in each_step(range(_STEPS)):
        vectors, tasks = _batch(encoder, pool, rng)
        optimizer.zero_grad()
        supervised_contrastive(vectors, tasks).backward()
        optimizer.step()
    tensors = {ENCODER + name: value for name, value in detach(dict(encoder.named_parameters())).items()}
    return tensors, _retrieved(encoder, judging, plan, rng)


def _parted(public: PublicSet, rng: torch.Generator) -> tuple[PublicSet, PublicSet]:
    """Most patients, and the rest."""
    patients = public.patients.unique()
    held_out = patients[torch.rand(len(patients), generator=rng) < _HELD_OUT]
    rest = torch.isin(public.patients, held_out)
    return public.rows((~rest).nonzero().flatten()), public.rows(rest.nonzero().flatten())


@torch.no_grad()
def _shown(network: Network, public: PublicSet, rng: torch.Generator) -> _Shown:
    def features_of_views() -> Tensor:
        rows = torch.arange(len(public)).split(_CHUNK)
        return torch.cat([network.body(public.views(chunk, rng)) for chunk in rows])

    return _Shown(public, torch.stack([features_of_views() for _ in range(_VIEWS)]))


def _tasks(sets: Sequence[_Shown], plan: StudyPlan, rng: torch.Generator) -> list[Tensor]:
    """Random tasks, each as the prototypes (n, ways, F) of random support sets."""
    pool: dict[tuple[int, ...], list[Tensor]] = {}
    for _ in range(_TASKS):
        which = int(torch.randint(len(sets), (), generator=rng))
        labels = draw_labels(sets[which].public, rng)
        supports = pool.setdefault((which, *labels.tolist()), [])
        supports += [_prototypes(sets[which], labels, plan, rng) for _ in range(_SUPPORTS)]
    return [torch.stack(supports) for supports in pool.values()]


def _batch(encoder: TaskEncoder, pool: Sequence[Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Task vectors (n, TASK_NUMBERS) of some tasks' support sets, and the task (n,) of each."""
    chosen = torch.randperm(len(pool), generator=rng)[:_TASKS_A_STEP].tolist()
    vectors = []
    for task in chosen:
        some = torch.randperm(len(pool[task]), generator=rng)[:_SUPPORTS_A_STEP]
        vectors.append(encoder(pool[task][some]))
    return torch.cat(vectors), torch.tensor(chosen).repeat_interleave(_SUPPORTS_A_STEP)


@torch.no_grad()
def _retrieved(encoder: TaskEncoder, sets: Sequence[_Shown], plan: StudyPlan, rng: torch.Generator) -> float:
    """The share of support sets whose nearest neighbour is of the same data set; nan if fewer than two can be asked."""
    if len(sets) < 2:
        return float("nan")
    vectors = torch.stack(
        [encoder(_prototypes(one, draw_labels(one.public, rng), plan, rng)) for one in sets for _ in range(_ASKED)]
    )
    of_set = torch.arange(len(sets)).repeat_interleave(_ASKED)
    nearest = (vectors @ vectors.T).fill_diagonal_(float("-inf")).argmax(dim=1)
    return float((of_set[nearest] == of_set).float().mean())


def _prototypes(shown: _Shown, labels: Tensor, plan: StudyPlan, rng: torch.Generator) -> Tensor:
    """(ways, F) of a random support set of these labels, each image in a random view."""
    shots = plan.evaluation.shots[int(torch.randint(len(plan.evaluation.shots), (), generator=rng))]
    rows = [group[:shots] for group in patients_of(shown.public, labels, rng)]
    return torch.stack([shown.seen(group, rng).mean(dim=0) for group in rows])
