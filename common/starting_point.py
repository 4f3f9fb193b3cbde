"""Which parameters start a run, which travel in every round, and which stay at a site.

Beside the network's own an algorithm may have further parameters that travel (Meta-SGD's rates).
"""

from __future__ import annotations

from torch import nn

from common.algorithms import ALGORITHMS
from common.models import build_model, head_names, parameters, shared_names
from common.params import Params, select
from common.plan import StudyPlan


def network_of(plan: StudyPlan, site: str) -> nn.Module:
    """The plan's network with the outputs of `site`'s task, its initial values by the plan's seed."""
    return build_model(plan.model, plan.task, ways=outputs_of(plan, site), seed=plan.seed)


def outputs_of(plan: StudyPlan, site: str) -> int:
    """How many outputs the network has there; for anomalies the two of the self-supervised task."""
    return 2 if plan.task.kind == "anomaly" else len(plan.labels_of(site))


def travelling(plan: StudyPlan, network: nn.Module) -> Params:
    """What travels in every round, at its start."""
    shared = select(parameters(network), shared_names(network, plan.model))
    return shared | ALGORITHMS[plan.algorithm.name].extra(shared, plan.algorithm)


def starting(plan: StudyPlan, network: nn.Module) -> Params:
    """What a run starts from: everything but a head that belongs to the sites."""
    stays = head_names(network, plan.model)
    values = {name: value for name, value in parameters(network).items() if name not in stays}
    return values | travelling(plan, network)
