"""Where a run starts: the whole body, the head where the plan shares it, and what else the algorithm lets travel."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from common import starting_point
from common.checkpoint import load_checkpoint
from common.errors import CheckpointError, Problem, UsageError
from common.mapping import ENCODER
from common.models import BODY, HEAD
from common.params import Params, select
from common.plan import StudyPlan


def initial_parameters(plan: StudyPlan, plan_folder: Path) -> Params:
    """The plan's warm start (a file relative to `plan_folder`), or random values by the plan's seed.

    Raises CheckpointError if the warm start is missing, broken or of another network.
    """
    initial = starting_point.starting(plan, _network(plan))
    if plan.model.warm_start is None:
        return initial
    path = plan_folder / plan.model.warm_start
    found = load_checkpoint(path).tensors
    parts = (BODY, ENCODER, HEAD) if plan.model.name == "autoencoder" else (BODY, ENCODER)
    body = {name: value for name, value in initial.items() if name.startswith(parts)}
    for name, value in body.items():
        if name not in found or found[name].shape != value.shape:
            has = f"{name} in shape {tuple(found[name].shape)}" if name in found else f"no {name!r}"
            what = f"is of another network: it has {has}, not {tuple(value.shape)}"
            raise CheckpointError(str(Problem(str(path), what, "use the plan that it was made with")))
    if unknown := sorted(name for name in found if name.startswith(BODY) and name not in body):
        what = f"is of another network: it has {unknown[0]!r}"
        raise CheckpointError(str(Problem(str(path), what, "use the plan that it was made with")))
    return initial | select(found, body)


def travelling(plan: StudyPlan, params: Params) -> Params:
    """Of a whole network's parameters those that start a run: all but a head that belongs to the sites.

    Raises UsageError if they are not of the plan's network.
    """
    template = starting_point.starting(plan, _network(plan))
    wrong = [name for name, value in template.items() if name not in params or params[name].shape != value.shape]
    if wrong:
        what = f"lack {wrong[0]!r} or have it in another shape"
        raise UsageError(Problem("the starting parameters", what, f"use a {plan.model.name} of the plan's width"))
    return select(params, template)


def round_names(plan: StudyPlan) -> tuple[str, ...]:
    """The names that travel in every round."""
    return tuple(starting_point.travelling(plan, _network(plan)))


def _network(plan: StudyPlan) -> nn.Module:
    return starting_point.network_of(plan, plan.training_sites[0])  # a site's own head does not travel
