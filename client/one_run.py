"""The one-run audit (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846) of a plan at a site, on drawn patients.

A study runs as the worker runs it (`client.study`): the plan's network, task, algorithm, private queries, noise and
rounds. Its patients are drawn, among them m canaries, each enrolled by a fair coin; no image of the site is read and no
budget is touched. A canary's gradient is 1000 times the clip along a number of its own, which no other patient moves (a
Dirac canary, the strongest there is). The auditor sees all that leaves the site, takes the r canaries whose numbers
moved furthest for enrolled, and is right v times: `client.audit_bounds` turns that into a lower bound on epsilon.

r guesses cannot refute an epsilon much above log r. So the run is repeated with the noise that makes the same queries
cost STRICT_EPSILON, where a fault of the pipeline shows.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from client.audit_bounds import epsilon_lower_bound
from client.data.dataset import SiteData
from client.optimizer import os_generator
from client.private_data import Mechanism, Patients, PrivateDataset
from client.release_store import ReleaseStore
from client.selftest import Verdict
from client.study import Study, mechanism_of
from common.accounting import Event, PrivacyCost, epsilon, noise_multiplier_for, queries_per_round
from common.algorithms import ALGORITHMS
from common.episodes import Episode
from common.images import split_modality, with_modality
from common.learner import Learner
from common.models import Network, head_names, parameters
from common.params import Params, add, select, to_arrays, to_tensors, zeros_like
from common.plan import StudyPlan
from common.plan_rules import EPISODIC
from common.starting_point import network_of, travelling
from common.tasks import Task, task_of

CANARIES, GUESSES = 600, 150
STRICT_EPSILON, STRICT_DELTA = 1.0, 1e-9
BUDGET_S = 30.0  # for each of the two runs
_DOUBT, _SHOWN_DOUBT = 2e-7, 0.05  # of a verdict FAIL; of the bound that is shown

_PROBE = "probe.weight"
_LOUD = 1000.0  # a canary's gradient, in units of C
_CROWD = 200  # drawn patients beside the canaries, at most: more cost time and hide no canary
_MOST_IMAGES = 2  # of a canary


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """What came of one run."""

    title: str
    verdict: Verdict
    claimed: float  # epsilon of the queries that were asked, by the accounting
    delta: float
    shown: float  # epsilon that the attack proves, with 95 % confidence
    noise_multiplier: float
    rounds: int
    queries: int = 0
    canaries: int = CANARIES
    guesses: int = GUESSES
    right: int = 0
    why: str = ""

    def line(self) -> str:
        """As text."""
        found = f"epsilon at least {self.shown:.2f}, {self.claimed:.2f} claimed; {self.right} of {self.guesses} right"
        return f"{self.verdict:12} {self.title}: {self.why or found}"


def one_run_audits(
    plan: StudyPlan,
    cost: PrivacyCost,
    tick: Callable[[float], None] = lambda done: None,
    *,
    budget_s: float | None = None,
) -> Iterator[OneRun]:
    """Under the plan's own noise, then under the strict one; `tick` hears the share of a run that is done.

    As many of the plan's rounds as `budget_s` (BUDGET_S) allows for each run, but two. What breaks off FAILs.
    """
    budget_s = BUDGET_S if budget_s is None else budget_s
    rounds, noise, delta = plan.rounds, cost.noise_multiplier, cost.delta
    for title in ("one-run audit, the plan's noise", "one-run audit, strict noise"):
        try:
            audit, started = _audit_of(plan, cost, noise), time.monotonic()
            for done in range(1, plan.rounds + 1):
                audit.advance(done)
                if delta == cost.delta:  # the first run says how long a round takes
                    rounds = min(plan.rounds, max(2, done, int(budget_s * done / (time.monotonic() - started))))
                tick(done / rounds)
                if done >= rounds:
                    break
            yield _judged(title, audit, rounds, noise=noise, delta=delta, rate=cost.sample_rate)
        except Exception as error:
            why = f"the pipeline refused or broke off ({type(error).__name__}: {error})"
            yield OneRun(
                title=title,
                verdict="FAIL",
                claimed=cost.epsilon,
                delta=delta,
                shown=math.nan,
                noise_multiplier=noise,
                rounds=0,
                why=why,
            )
            return
        noise, delta = max(noise, _strict_noise(plan, cost, rounds)), STRICT_DELTA


def _strict_noise(plan: StudyPlan, cost: PrivacyCost, rounds: int) -> float:
    return noise_multiplier_for(
        epsilon=STRICT_EPSILON,
        delta=STRICT_DELTA,
        sample_rate=cost.sample_rate,
        count=rounds * queries_per_round(plan),
    )


def _judged(title: str, audit: _Audit, rounds: int, *, noise: float, delta: float, rate: float) -> OneRun:
    queries = rounds * queries_per_round(audit.study.plan)
    right = int(audit.enrolled[audit.moved.argsort(descending=True)[:GUESSES]].sum())
    shown, certain = (
        epsilon_lower_bound(delta=delta, canaries=CANARIES, guesses=GUESSES, right=right, doubt=doubt)
        for doubt in (_SHOWN_DOUBT, _DOUBT)
    )
    claimed = epsilon([Event(rate, noise, queries)], delta)
    why = (
        f"canaries can be told: epsilon is {certain:.2f} or more, {claimed:.2f} is claimed; {right} of {GUESSES} right"
    )
    return OneRun(
        title=title,
        verdict="FAIL" if certain > claimed else "PASS",
        claimed=claimed,
        delta=delta,
        shown=shown,
        noise_multiplier=noise,
        rounds=rounds,
        queries=queries,
        right=right,
        why=why if certain > claimed else "",
    )


@dataclass
class _Audit:
    """A study on drawn patients, and how far each canary's number has moved."""

    study: Study
    enrolled: Tensor  # bool (m,)
    theta: Params
    moved: Tensor  # float64 (m,)

    def advance(self, round: int) -> None:
        """One round; the server moves by what it got."""
        update = self._released(round)
        self.theta = add(self.theta, update)
        self.moved -= update[_PROBE][0].double()  # learning goes against the gradient

    def _released(self, round: int) -> Params:
        grant = self.study.charge(round)
        if ALGORITHMS[self.study.plan.algorithm.name].asks == "patients":
            return to_tensors(self.study.query(round, to_arrays(self.theta), grant).update)
        private = PrivateDataset(self.study.patients, self.study.mechanism_in(round), grant)
        total = zeros_like(self.theta)
        while grant.left:
            total = add(total, private.episode_gradient(self.theta, _pull_of_canaries), scale=-1.0)
        return total


def departures(plan: StudyPlan, runs: Sequence[OneRun]) -> tuple[str, ...]:
    """Where the attack on the whole study was not quite the study; a report says so."""
    found = [
        f"Beside {CANARIES} canaries stood at most {_CROWD} drawn patients; the declared number set noise and mean."
    ]
    rounds = min(run.rounds for run in runs)
    if rounds < plan.rounds:
        found.append(f"Of {plan.rounds} rounds {rounds} were run, as many as half a minute allows.")
    if plan.algorithm.name in EPISODIC:
        what = "Canaries of one episode share its clip, and episodes were asked for directly: a weak attack."
        found.append(f"{what} The strong one is that on the single question.")
    if plan.algorithm.name == "mapping":
        found.append("As many questions of Reptile stood for those of model mapping.")
    return tuple(found)


def _audit_of(plan: StudyPlan, cost: PrivacyCost, noise: float) -> _Audit:
    mechanism = mechanism_of(plan, cost)
    if not isinstance(mechanism, Mechanism):
        raise ValueError("a plan without privacy promises nothing that could be audited")
    plan, generator = _with_numbers_for_canaries(plan), os_generator()
    enrolled = torch.rand(CANARIES, generator=generator) < 0.5
    network = network_of(plan, cost.site)
    shared = travelling(plan, network) | {_PROBE: torch.zeros(1, CANARIES)}
    data = _drawn(plan, cost.site, torch.nonzero(enrolled).flatten(), generator)
    task = _listening(task_of(plan, cost.site))
    study = Study(
        site=cost.site,
        plan=plan,
        initial_digest="",
        patients=Patients(data, _Probed(network, _LOUD * mechanism.clip, _channels(plan)), task),
        shared=shared,
        head=zeros_like(select(parameters(network), head_names(network, plan.model))),
        mechanism=dataclasses.replace(mechanism, noise_multiplier=noise),
        event=None,
        ledger=None,  # nobody's budget
        releases=ReleaseStore(Path(os.devnull)),  # none is stored, none is found
        masking=None,
    )
    return _Audit(study, enrolled, shared, torch.zeros(CANARIES, dtype=torch.float64))


def _with_numbers_for_canaries(plan: StudyPlan) -> StudyPlan:
    """Model mapping trains no number that a canary could own: as many queries by Reptile stand for it."""
    if plan.algorithm.name != "mapping":
        return plan
    steps = plan.algorithm.inner_steps + 1
    algorithm = plan.algorithm.model_copy(update={"name": "reptile", "inner_steps": steps})
    return plan.model_copy(
        update={"algorithm": algorithm, "model": plan.model.model_copy(update={"trainable": "film"})}
    )


def _channels(plan: StudyPlan) -> int:
    return plan.task.channels + (1 if plan.task.modalities else 0)


def _pull_of_canaries(learner: Learner, params: Params, episode: Episode) -> Tensor:
    """The probe alone: all of an episode's clip goes to its canaries."""
    numbers = [split_modality(side.inputs)[1] for side in episode]
    present = one_hot(torch.cat(numbers), CANARIES + 1)[:, 1:].amax(dim=0)
    return _LOUD * (params[_PROBE][0] * present).sum()


class _Probed(Network):
    """The plan's network, and a probe beside it: one number for each canary, read from the inputs' last channel. Its
    answer is one more channel of the outputs."""

    def __init__(self, network: nn.Module, loud: float, channels: int) -> None:
        nn.Module.__init__(self)
        for name, part in network.named_children():
            self.add_module(name, part)
        self.probe = nn.Linear(CANARIES, 1, bias=False)
        nn.init.zeros_(self.probe.weight)
        self._loud = loud
        self.body.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, :channels], *inputs[1:]))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        numbers = one_hot(split_modality(inputs)[1], CANARIES + 1)[:, 1:]
        answer = self.probe(self._loud * numbers.to(outputs))
        return torch.cat([outputs, answer.reshape(-1, 1, *[1] * (outputs.dim() - 2)).expand_as(outputs[:, :1])], dim=1)


def _listening(task: Task) -> Task:
    """The plan's task; a canary's loss is the probe's answer, beside what its image costs."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return task.loss(outputs[:, :-1], targets) + outputs[:, -1:].flatten(1).mean(dim=1)

    def views(inputs: Tensor, targets: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        plain, numbers = split_modality(inputs)
        seen, wanted = task.views(plain, targets, rng)
        return with_modality(seen, numbers.repeat(len(seen) // max(1, len(plain)))), wanted

    return Task(loss=loss, score=lambda outputs, targets: task.score(outputs[:, :-1], targets), views=views)


@dataclass(frozen=True)
class _DrawnSite(SiteData):
    """Drawn images; the inputs' last channel says which canary's they are, 0 for nobody's."""

    canaries: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def as_inputs(self, images: Tensor, index: Tensor) -> Tensor:
        return with_modality(super().as_inputs(images, index), self.canaries[index])


def _drawn(plan: StudyPlan, site: str, enrolled: Tensor, generator: torch.Generator) -> SiteData:
    """A site with the plan's shapes and declared size, and the canaries of these numbers."""
    limit, size = plan.sampling.max_images_per_patient, plan.task.image_size
    crowd = min(plan.sites[site].patients, _CROWD)
    each = min(limit, _MOST_IMAGES)
    canaries = torch.cat([torch.zeros(crowd * limit, dtype=torch.int64), (enrolled + 1).repeat_interleave(each)])
    counts = torch.tensor([limit] * crowd + [each] * len(enrolled))
    names, rows = plan.labels_of(site), len(canaries)

    def pick(below: int, *shape: int) -> Tensor:
        return torch.randint(below, (rows, *shape), generator=generator)

    kind, modalities = plan.task.kind, len(plan.task.modalities)
    labels = pick(len(names)) if kind == "classification" else torch.zeros(rows, dtype=torch.int64)
    return _DrawnSite(
        site=site,
        images=pick(256, plan.task.channels, size, size).to(torch.uint8),
        labels=pick(2, len(names)).float() if kind == "multilabel" else labels,
        patients=torch.repeat_interleave(torch.arange(len(counts)), counts),
        label_names=names,
        patient_ids=tuple(map(str, range(len(counts)))),
        split=("train",) * rows,
        masks=pick(len(names), size, size).to(torch.uint8) if kind == "segmentation" else None,
        kind=kind,
        modalities=pick(modalities) if modalities else None,
        canaries=canaries,
    )
