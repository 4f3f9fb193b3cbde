"""Where a run starts: the whole body, and the head where the plan shares it."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from common.checkpoint import load_checkpoint, shapes
from common.errors import Problem, UsageError
from common.models import HEAD, build_model, head_names, parameters, shared_names
from common.params import Params, select
from common.plan import StudyPlan


def initial_parameters(plan: StudyPlan, plan_folder: Path) -> Params:
    """The plan's warm start (a file relative to `plan_folder`), or random values by the plan's seed.

    Raises CheckpointError if the warm start is missing, broken or of another network.
    """
    initial = travelling(plan, parameters(_network(plan)))
    if plan.model.warm_start is None:
        return initial
    body = {name: value for name, value in initial.items() if not name.startswith(HEAD)}
    return initial | load_checkpoint(plan_folder / plan.model.warm_start, shapes(body)).tensors


def travelling(plan: StudyPlan, params: Params) -> Params:
    """Of a whole network's parameters those that start a run: all but a head that belongs to the sites.

    Raises UsageError if they are not of the plan's network.
    """
    network = _network(plan)
    stays = head_names(network, plan.model)
    template = {name: value for name, value in parameters(network).items() if name not in stays}
    wrong = [name for name, value in template.items() if name not in params or params[name].shape != value.shape]
    if wrong:
        what = f"lack {wrong[0]!r} or have it in another shape"
        raise UsageError(Problem("the starting parameters", what, f"use a {plan.model.name} of the plan's width"))
    return select(params, template)


def round_names(plan: StudyPlan) -> tuple[str, ...]:
    """The names that travel in every round: the trainable shared part."""
    return shared_names(_network(plan), plan.model)


def _network(plan: StudyPlan) -> nn.Module:
    ways = len(plan.labels_of(plan.training_sites[0]))  # of a shared head; a site's own head does not travel
    return build_model(plan.model, plan.task, ways=ways, seed=plan.seed)
