"""A study at one site, opened and warm: the plan, the network, the patients, the ledger and the releases."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from client.data.dataset import SiteData
from client.data.load import load_site
from client.grant import Grant
from client.ledger import Ledger
from client.private_data import Mechanism, Patients, PrivateDataset, Unprotected
from client.release_store import ReleaseStore
from client.secure_sum import Masking, Masks, open_masking
from client.site import SiteConfig
from common.accounting import Event, PrivacyCost, plan_cost, queries_per_round
from common.algorithms import ALGORITHMS
from common.errors import BadInstruction, DataError, SiteUnfit
from common.models import build_model, head_names, parameters
from common.params import Arrays, Params, add, digest, select, to_arrays, to_tensors, zeros_like
from common.plan import StudyPlan
from common.starting_point import starting, travelling
from common.tasks import task_of
from common.timing import timed


class Load(Protocol):
    """`client.data.load.load_site`, or what gives several studies the same images."""

    def __call__(self, folder: Path, plan: StudyPlan, *, site: str, split: str | None) -> SiteData: ...


@dataclass(frozen=True)
class Outcome:
    """What the private queries of one round yield: all of it is charged, and `kept` stays."""

    update: Arrays
    accuracy: float  # nan if the plan asks for none
    kept: Params


@dataclass(frozen=True)
class Study:
    """What a worker keeps between the rounds of a study."""

    site: str
    plan: StudyPlan
    initial_digest: str
    patients: Patients
    shared: Params  # names and shapes that travel
    head: Params  # a zero head; empty if the plan shares it
    mechanism: Mechanism | Unprotected
    event: Event | None  # what one round is charged; None if nothing is asked or there is no privacy
    ledger: Ledger | None
    releases: ReleaseStore
    masking: Masking | None  # None unless the plan's updates are masked

    def require_fit(self, shared: Arrays) -> None:
        """Raise BadInstruction unless `shared` has the names and shapes that travel, all finite."""
        _require_fit(shared, self.shared)

    def masks(self, roster: str, round: int) -> Masks | None:
        """What masks the round's release. Raises BadInstruction for a roster that does not fit."""
        if self.masking is None and roster:
            raise BadInstruction("a roster, and the plan has no secure sum")
        return None if self.masking is None else self.masking.masks(roster, round)

    @timed("accounting")
    def charge(self, round: int, *, journal: str = "") -> Grant:
        """Spend the budget of one round, after the `journal`'s last line; without privacy, leave to ask as many queries
        as the plan has."""
        if self.ledger is None or self.event is None:
            return Grant(queries_per_round(self.plan))
        return self.ledger.charge(study=self.plan.digest, round=round, event=self.event, journal=journal)

    def query(self, round: int, shared: Arrays, grant: Grant) -> Outcome:
        """The algorithm over private queries, and the monitor's own query where the plan asks for it."""
        algorithm = ALGORITHMS[self.plan.algorithm.name]
        private = PrivateDataset(self.patients, self.mechanism_in(round), grant)
        start = to_tensors(shared)
        kept = (self.releases.kept_before(round) if algorithm.keeps else None) or self.head
        local = algorithm.local_update(start, kept, private, self.plan.algorithm)
        accuracy = math.nan
        if grant.left:
            accuracy = private.score(self._of_network(add(start, local.update) | local.kept))
        return Outcome(update=to_arrays(local.update), accuracy=accuracy, kept=local.kept)

    def _of_network(self, params: Params) -> Params:
        """Those that the network itself has."""
        return {name: value for name, value in params.items() if name in self.patients.public}

    def mechanism_in(self, round: int) -> Mechanism | Unprotected:
        """What a round's queries are asked with."""
        if isinstance(self.mechanism, Mechanism):
            return self.mechanism
        seed = hashlib.sha256(f"{self.plan.digest}/{self.site}/{round}".encode()).digest()
        return dataclasses.replace(self.mechanism, seed=int.from_bytes(seed[:4], "big"))


@timed("load")
def open_study(
    folder: Path,
    state: Path,
    config: SiteConfig,
    plan: StudyPlan,
    initial: Arrays,
    *,
    load: Load = load_site,
    durable: bool = True,
) -> Study:
    """Load the site's data for `plan` and check that everything fits together. What is not `durable`, as in a
    simulation, survives a kill and no power cut.

    Raises SiteUnfit for data that does not fit the plan, BadInstruction for parameters that do not fit its network,
    LedgerDamaged.
    """
    try:
        data = load(folder, plan, site=config.name, split="train")
    except DataError as error:
        raise SiteUnfit(str(error)) from None
    network, cost = build_model(plan.model, plan.task, ways=data.ways), plan_cost(plan, config.name)
    template, head = parameters(network), head_names(network, plan.model)
    _require_fit(initial, starting(plan, network))
    network.load_state_dict(template | {name: value for name, value in to_tensors(initial).items() if name in template})
    return Study(
        site=config.name,
        plan=plan,
        initial_digest=digest(initial),
        patients=Patients(
            data,
            network,
            task_of(plan, config.name),
            device=_device(config.device),
            chunk_images=config.hardware.chunk_images,
            bf16=config.hardware.bf16,
        ),
        shared=travelling(plan, network),
        head=zeros_like(select(template, head)),
        mechanism=mechanism_of(plan, cost),
        event=_event(plan, cost),
        ledger=_ledger(state, config, plan, durable=durable),
        releases=ReleaseStore(state / "releases" / plan.digest, durable=durable),
        masking=open_masking(state, config, plan),
    )


def _device(wanted: str) -> str:
    """cpu or cuda; 'auto' takes the GPU where there is one. Raises SiteUnfit if a GPU is asked for and absent."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SiteUnfit("site.yaml asks for device cuda, and torch finds no GPU: set device: cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def mechanism_of(plan: StudyPlan, cost: PrivacyCost | None) -> Mechanism | Unprotected:
    """The constants of the plan's queries, where it costs so much."""
    if plan.privacy is None or cost is None:
        return Unprotected(
            sample_rate=plan.sampling.sample_rate,
            max_images=plan.sampling.max_images_per_patient,
            episodes=plan.algorithm.episodes,
            modalities=len(plan.task.modalities),
            views=plan.sampling.views,
            seed=0,
        )
    return Mechanism(
        sample_rate=cost.sample_rate,
        noise_multiplier=cost.noise_multiplier,
        clip=plan.privacy.clip,
        batch=cost.expected_batch,
        max_images=plan.sampling.max_images_per_patient,
        head_scale=plan.privacy.head_scale,
        feature_clip=plan.privacy.feature_clip,
        episodes=plan.algorithm.episodes,
        modalities=len(plan.task.modalities),
        views=plan.sampling.views,
        discrete=plan.privacy.noise == "discrete",
    )


def _event(plan: StudyPlan, cost: PrivacyCost | None) -> Event | None:
    queries = queries_per_round(plan)
    if cost is None or queries == 0:
        return None
    return Event(cost.sample_rate, cost.noise_multiplier, queries)


def _ledger(state: Path, config: SiteConfig, plan: StudyPlan, *, durable: bool) -> Ledger | None:
    """The hospital's ledger under the hospital's own budget; none is needed without privacy."""
    if plan.privacy is None:
        return None
    return Ledger.open(state, config.budget.terms(), durable=durable)


def _require_fit(arrays: Arrays, template: Params) -> None:
    if arrays.keys() != template.keys():
        raise BadInstruction(f"parameter names differ: {sorted(arrays.keys() ^ template.keys())[:5]}")
    for name, value in arrays.items():
        if value.shape != tuple(template[name].shape) or not np.isfinite(value).all():
            raise BadInstruction(f"parameter {name} has the shape {value.shape} or is not finite")
