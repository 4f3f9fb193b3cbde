"""A federation whose sites compute nothing private: each pulls the shared parameters towards its own constant.

Site i moves half of the way to the constant i + 1, so the mean of n sites is known in closed form. Each keeps a ledger
(a file with one line for each charge) and its releases, as a real site does.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.clientapp import ClientApp

from client.app import build_client_app
from common.errors import NotApproved
from common.plan import StudyPlan, plan_from_json
from common.records import Arrays, PrepareInstruction, SiteReply, TrainInstruction
from server.history import RoundRecord, SiteOutcome
from server.simulation import Federation, drive
from server.start import initial_parameters

PULL = 0.5


@dataclass(frozen=True)
class FakeSites:
    """`faults`: what goes wrong, by site or (site, round)."""

    folder: Path
    names: tuple[str, ...]
    faults: dict[str | tuple[str, int], str] = field(default_factory=dict)
    pause_s: float = 0.0

    def __call__(self, context: Context) -> FakeSite:
        index = int(context.node_config["partition-id"])
        return FakeSite(self, self.names[index], target=index + 1.0)

    def app(self) -> ClientApp:
        return build_client_app(self)


@dataclass(frozen=True)
class FakeSite:
    federation: FakeSites
    name: str
    target: float

    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        plan = plan_from_json(instruction.plan_json)
        match self.federation.faults.get(self.name):
            case "raises":
                raise ValueError("patient 4711")
            case "refuses":
                return SiteReply(site=self.name, code=NotApproved.code, reason=NotApproved.public_reason)
            case "stranger":
                return SiteReply(site="yew", code="ok", plan_digest=plan.digest)
            case "twin":
                return SiteReply(site=self.federation.names[0], code="ok", plan_digest=plan.digest)
            case "other-plan":
                return SiteReply(site=self.name, code="ok", plan_digest="0" * 64)
        return SiteReply(site=self.name, code="ok", plan_digest=plan.digest)

    def train(self, instruction: TrainInstruction) -> SiteReply:
        time.sleep(self.federation.pause_s)
        rows = self._charge(instruction.round)
        head = hashlib.sha256(f"{self.name}{rows}".encode()).hexdigest()
        update = {name: PULL * (self.target - value) for name, value in instruction.shared.items()}
        reply = SiteReply(
            site=self.name,
            code="ok",
            plan_digest=instruction.plan_digest,
            round=instruction.round,
            update=update,
            epsilon=0.1 * rows,
            queries=2,
            ledger_rows=rows,
            ledger_head=head,
            seconds=0.125,
        )
        fault = self.federation.faults.get((self.name, instruction.round))
        return reply if fault is None else _spoil(reply, fault)

    def _charge(self, round: int) -> int:
        """The number of rows after charging `round` once, however often it is asked for."""
        ledger = self.federation.folder / f"{self.name}.ledger"
        ledger.parent.mkdir(parents=True, exist_ok=True)
        rows = ledger.read_text().split() if ledger.exists() else []
        if str(round) not in rows:
            with ledger.open("a") as file:
                file.write(f"{round}\n")
            rows.append(str(round))
        return rows.index(str(round)) + 1


def _spoil(reply: SiteReply, fault: str) -> SiteReply:
    first = next(iter(reply.update))
    if fault == "refuses":
        return SiteReply(site=reply.site, code="budget-exceeded", reason="the budget\x1b[31m is spent")
    if fault == "raises":
        raise ValueError("patient 4711")
    if fault == "sleeps":
        time.sleep(3.0)
    if fault == "nan":
        return replace(reply, update=_with(reply.update, first, np.full_like(reply.update[first], np.nan)))
    if fault == "shape":
        return replace(reply, update=_with(reply.update, first, np.zeros(3, dtype=np.float32)))
    if fault == "names":
        return replace(reply, update={"other": np.zeros(3, dtype=np.float32)})
    if fault == "float64":
        return replace(reply, update=_with(reply.update, first, reply.update[first].astype(np.float64)))
    if fault == "round":
        return replace(reply, round=reply.round + 1)
    if fault == "rolled-back":
        return replace(reply, ledger_rows=reply.ledger_rows - 1)
    if fault == "epsilon":
        return replace(reply, epsilon=float("nan"))
    return reply


def _with(update: Arrays, name: str, value: np.ndarray) -> Arrays:
    return {**update, name: value}


def fake_federation(plan: StudyPlan, folder: Path, sites: tuple[str, ...] = ("alder", "birch", "cedar")) -> Federation:
    """A federation of `plan` for `drive`; the sites' folders are not used."""
    return Federation(plan, folder, dict.fromkeys(sites, folder), initial_parameters(plan, folder))


def expected(start: Arrays, rounds: int, *, sites: int) -> Arrays:
    """The shared parameters after `rounds` rounds of all sites with outer sgd of rate 1."""
    mean = sum(range(1, sites + 1)) / sites
    return {name: mean + (value - mean) * (1 - PULL) ** rounds for name, value in start.items()}


@dataclass
class Recorder:
    """An Observer that keeps what it is told."""

    told: list[str] = field(default_factory=list)
    records: list[RoundRecord] = field(default_factory=list)
    prepared: tuple[SiteOutcome, ...] = ()

    def run_started(self, *, study: str, done: int, rounds: int) -> None:
        self.told.append(f"run {study} {done}/{rounds}")

    def sites_prepared(self, outcomes: tuple[SiteOutcome, ...]) -> None:
        self.prepared = outcomes
        self.told.append("prepared")

    def round_started(self, round: int, sites: tuple[str, ...]) -> None:
        self.told.append(f"round {round} asks {','.join(sites)}")

    def site_answered(self, round: int, outcome: SiteOutcome) -> None:
        self.told.append(f"round {round} {outcome.site} {outcome.status}")

    def round_committed(self, record: RoundRecord) -> None:
        self.records.append(record)
        self.told.append(f"round {record.round} {record.status}")


def run_to_the_end(plan_json: str, folder: Path, pause_s: float) -> None:
    """Start or resume a fake federation; the target of processes that tests kill."""
    plan = plan_from_json(plan_json)
    sites = FakeSites(folder / "fakes", plan.training_sites, pause_s=pause_s)
    drive(fake_federation(plan, folder), sites.app(), engine="local", resume=True, jobs=3)
