"""How much the training hospitals' images could add to a study's start, and what its privacy leaves of that.

    python -m deploy.benchmarks.headroom deploy/studies/hospitals.yaml --sites sites/hospitals

A row for the start itself, and one for each part of the network that a plan may train. That part is trained on the
images of all training hospitals in one place, without privacy, each hospital with a head of its own: a federation would
hardly learn more of them in as many steps. The result is measured as the study measures a start, on new patients of the
hospitals that took part and on hospitals that never did. Beside it stand the numbers that would be trained, and the
length of one private query's signal (the sum of the clipped gradients) by that of its noise: of one query, and of all
queries of the study at all hospitals together if they all said the same, which is the most they can.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from client.adapt import few_shot_trials, whole_start
from client.data.dataset import SiteData
from client.data.load import load_site
from client.grant import Grant
from client.private_data import Mechanism, Patients, PrivateDataset
from client.study import mechanism_of
from common.accounting import plan_cost
from common.command_line import run
from common.errors import Problem, UsageError
from common.metrics import lead_metric
from common.models import HEAD, Network, build_model, parameters, part_names
from common.params import Params, select
from common.plan import StudyPlan, load_plan
from common.tasks import task_of
from server.pretrain import Steps
from server.simulation import site_folders
from server.start import initial_parameters

PARTS = {"film": 1e-2, "all": 1e-3}  # trainable part -> Adam's rate
HEAD_RATE, HEAD_STEPS = 1e-2, 50  # before the body moves, the heads learn what they can of the start
BATCH = 32  # images of each hospital in a step
_NEXT_TO_NOTHING = 1e-9  # of noise, where the signal is asked for

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Row:
    """One part of the network."""

    part: str
    numbers: int = 0
    new_patients: float = math.nan  # the plan's lead metric at its lead number of shots
    unseen: float = math.nan
    query: float = math.nan  # signal by noise
    study: float = math.nan

    @property
    def cells(self) -> list[str]:
        figures = [self.new_patients, self.unseen, self.query, self.study]
        return [self.part, f"{self.numbers:,}", *("" if math.isnan(value) else f"{value:.3f}" for value in figures)]


class Pooled:
    """All training hospitals' images in one place, one body, a head for each hospital."""

    def __init__(self, start: Params, sites: dict[str, SiteData], plan: StudyPlan) -> None:
        self._plan = plan
        self._training = {name: sites[name].of_split("train") for name in plan.training_sites}
        self._tasks = {name: task_of(plan, name) for name in self._training}
        self._networks = {
            name: build_model(plan.model, plan.task, ways=data.ways) for name, data in self._training.items()
        }
        for name, network in self._networks.items():
            network.body = self.network.body
            network.load_state_dict(whole_start(start, self._training[name], plan))
        self._rng = torch.Generator().manual_seed(plan.seed)

    @property
    def network(self) -> Network:
        """That of one hospital; the body is everybody's."""
        return next(iter(self._networks.values()))

    @property
    def body(self) -> Params:
        """The body as it stands."""
        return {name: value for name, value in parameters(self.network).items() if not name.startswith(HEAD)}

    def learn(self, part: str, *, steps: int, each_step: Steps = iter) -> None:
        """Adam on the hospitals' mean loss, its rate falling to zero along a cosine."""
        heads = [parameter for network in self._networks.values() for parameter in network.head.parameters()]
        moving = list(select(dict(self.network.named_parameters()), _body(self.network, part)).values())
        groups = [{"params": heads, "lr": HEAD_RATE}, {"params": moving, "lr": PARTS.get(part, HEAD_RATE)}]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in each_step(range(steps)):
            optimizer.zero_grad()
            for name in self._training:
                self._loss(name).backward()
            optimizer.step()
            schedule.step()

    def signal(self, part: str) -> float:
        """Signal by noise of a gradient query where the network stands; the mean over the hospitals."""
        return mean(self._signal_of(name, part) for name in self._training)

    def _loss(self, name: str) -> Tensor:
        data, task = self._training[name], self._tasks[name]
        rows = torch.randperm(len(data), generator=self._rng)[:BATCH]
        inputs, targets = task.views(data.inputs(rows), data.targets_at(rows), self._rng)
        return task.loss(self._networks[name](inputs), targets).mean()

    def _signal_of(self, name: str, part: str) -> float:
        network, cost = self._networks[name], plan_cost(self._plan, name)
        asked = mechanism_of(self._plan, cost)
        if not isinstance(asked, Mechanism):  # there is no noise
            return math.nan
        alone = dataclasses.replace(asked, noise_multiplier=_NEXT_TO_NOTHING, batch=1.0)
        params = select(parameters(network), part_names(network, part))
        patients = Patients(self._training[name], network, self._tasks[name])
        gradient = PrivateDataset(patients, alone, Grant(1)).gradient(params)
        body = torch.cat([gradient[key].flatten() for key in _body(network, part)])
        return float(body.norm()) / (asked.noise_multiplier * asked.clip * math.sqrt(len(body)))


def measure(start: Params, sites: dict[str, SiteData], plan: StudyPlan) -> tuple[float, float]:
    """Mean over hospitals of the lead metric: on new patients of those that trained, and at those that did not."""

    def of(names: Sequence[str], split: str | None) -> float:
        data = [sites[name] if split is None else sites[name].of_split(split) for name in names if name in sites]
        return mean(_value(start, one, plan) for one in data) if data else math.nan

    return of(plan.training_sites, "test"), of(plan.held_out_sites, None)


def rows_of(start: Params, sites: dict[str, SiteData], plan: StudyPlan, *, steps: int, console: Console) -> list[Row]:
    """The table."""
    network = build_model(plan.model, plan.task, ways=2)
    rows = [Row("the start", 0, *measure(start, sites, plan))]
    for part in PARTS:
        pooled = Pooled(start, sites, plan)
        pooled.learn("head", steps=HEAD_STEPS)
        query = pooled.signal(part)
        pooled.learn(part, steps=steps, each_step=partial(track, description=f"Training {part}", console=console))
        numbers = sum(value.numel() for value in select(parameters(network), _body(network, part)).values())
        rows.append(Row(part, numbers, *measure(start | pooled.body, sites, plan), query, query * _together(plan)))
    return rows


@app.command()
def main(
    study: Annotated[Path, typer.Argument(help="The study plan (YAML); a classification.")],
    sites: Annotated[Path, typer.Option(help="Folder of the sites' folders.")],
    steps: Annotated[int, typer.Option(min=1, help="Of the training in one place.")] = 200,
) -> None:
    """What the training hospitals' images could add to the start of STUDY, and the signal that its privacy leaves."""
    plan, folders = load_plan(study), site_folders(sites)
    if plan.task.kind != "classification" or plan.model.trainable == "mapping":
        raise UsageError(Problem(str(study), "is no classification of a plain network", "give one"))
    data = {name: load_site(folders[name], plan, site=name) for name in plan.sites if name in folders}
    rows = rows_of(initial_parameters(plan, study.parent), data, plan, steps=steps, console=Console(stderr=True))
    metric, shots = lead_metric(plan.task.kind).replace("_", " "), plan.evaluation.lead_shots
    table = Table("trained", "numbers", "new patients", "unseen hospitals", "signal : noise", "of all queries")
    table.caption = f"{metric}, {shots} shots; {steps} steps without privacy"
    for row in rows:
        table.add_row(*row.cells)
    Console().print(table)


def _value(start: Params, data: SiteData, plan: StudyPlan) -> float:
    trials = few_shot_trials(start, data, plan, arm="start", kind="held-out site", seed=plan.seed)
    metric, shots = lead_metric(plan.task.kind), plan.evaluation.lead_shots
    return mean(trial.metrics[metric] for trial in trials if trial.shots == shots)


def _together(plan: StudyPlan) -> float:
    """Signals add up like their number at best, noises like its root."""
    costs = [plan_cost(plan, name) for name in plan.training_sites]
    return math.sqrt(sum(cost.queries for cost in costs if cost is not None))


def _body(network: nn.Module, part: str) -> list[str]:
    return [name for name in part_names(network, part) if not name.startswith(HEAD)]


if __name__ == "__main__":
    run(app)
