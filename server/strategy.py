"""The federation's rounds as a Flower Strategy with its own loop.

    call the roll: which node is which site, who is ready?
    each round: ask every ready site -> judge each reply as it comes -> weighted mean -> outer step -> commit

Below quorum a round is recorded and the parameters stay; after three in a row the run ends. In a secure sum a single
site that drops out does the same: it then sits out the next round, which has new masks. Nothing is printed: an Observer
is told.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from common.checkpoint import shapes
from common.errors import RunError
from common.keys import SignedDocument
from common.params import Arrays, Params, digest, norm, select, to_arrays, to_tensors
from common.plan import StudyPlan
from common.records import TRAIN, PrepareInstruction, SiteReply, TrainInstruction
from common.secure_sum import fixed_point, roster_digest, roster_of
from common.timing import timed
from server.aggregation import MaskedMean, RunningMean, Template, reason_to_reject, site_weights, weight_of
from server.exchange import address, collect, send
from server.history import RoundRecord, SiteOutcome
from server.ledgers import LedgerCopies
from server.observer import Observer
from server.outer_optimizer import outer_step
from server.replies import Ledger, judge, ledger_objection
from server.roll_call import RollCall, online
from server.run_folder import RunState, commit, locked, open_run, origin_of
from server.start import round_names, travelling

MOST_BELOW_QUORUM = 3  # rounds in a row, then the run ends


@dataclass(frozen=True)
class RunSettings:
    """What a run needs to know."""

    plan: StudyPlan
    folder: Path
    initial: Params  # a whole network of the plan; a site's own head in it is left aside
    resume: bool = False
    nodes: int | None = None  # how many to wait for before the start; None: one for each training site
    wait_s: float = 0.0  # how long to wait for sites that are not ready before the start
    signed: SignedDocument | None = None  # the plan as the lab signed it; a simulation has none
    ledgers: Path | None = None  # where the lab keeps what it saw of ledgers in all studies; a simulation has none
    stop: threading.Event = field(default_factory=threading.Event)  # set from another thread, it ends the run


class ConsiliumStrategy(Strategy):
    """All training sites in every round; quorum, time limit and resume are the plan's and the run folder's."""

    def __init__(self, settings: RunSettings, observer: Observer) -> None:
        plan = settings.plan
        self._settings, self._plan, self._observer = settings, plan, observer
        self._initial = travelling(plan, settings.initial)
        self._initial_digest = digest(to_arrays(self._initial))
        self._origin = origin_of(plan, self._initial_digest)
        self._template = shapes(select(self._initial, round_names(plan)))
        self._weights = site_weights(plan, plan.training_sites)
        self._ready: dict[int, str] = {}  # node id -> site, of the round that runs
        self._asked: dict[str, int] = {}  # message id -> node id, of the round that runs
        self._outcomes: dict[str, SiteOutcome] = {}  # by site, of the round that runs
        self._absent: tuple[SiteOutcome, ...] = ()  # who was not ready when the round began
        self._encoding = fixed_point(plan)
        self._roster = ""  # whose masks the round that runs carries
        self._dropped: set[str] = set()  # out of the last round's secure sum
        self._ledgers: dict[str, Ledger] = {}  # as each site last showed it in this study
        self._copies = LedgerCopies(settings.ledgers, study=plan.study)
        self._roll = RollCall(plan, _instruction(settings, self._initial), self._copies)
        self._shared: Params = {}  # where the round that runs started
        self._outer: Params = {}  # the outer optimiser's state

    def start(self, grid: Grid, *_: Any, **__: Any) -> Result:
        """Run every round that is not committed yet. The plan and the run folder say what Flower's arguments would.

        Raises RunError if too few sites take part, UsageError or CheckpointError for the run folder.
        """
        settings = self._settings
        with locked(settings.folder):
            names = tuple(self._template)
            run = open_run(settings.folder, self._plan, initial=self._initial, shared=names, resume=settings.resume)
            self._observer.run_started(study=self._plan.study, done=max(run.round, 0), rounds=self._plan.rounds)
            return Result(arrays=self._run(grid, run))

    def _run(self, grid: Grid, run: RunState) -> ArrayRecord:
        arrays = _to_record(run.shared)
        if run.round == self._plan.rounds:
            return arrays
        self._outer = run.outer
        for site, ledger in _ledgers_in(run.records).items():
            self._take_ledger(site, ledger)
        began = time.monotonic()
        self._call_roll(grid)
        if run.round < 0:
            self._commit(_record(0, began, self._roll.outcomes, update_norm=0.0), arrays)
        below_quorum = 0
        for number in range(max(run.round, 0) + 1, self._plan.rounds + 1):
            arrays, record = self._round(grid, number, arrays)
            below_quorum = 0 if record.status == "committed" else below_quorum + 1
            if below_quorum == MOST_BELOW_QUORUM:
                raise _too_few(f"{below_quorum} rounds in a row, up to round {number},", self._plan, record.sites)
        return arrays

    def _call_roll(self, grid: Grid) -> None:
        nodes = len(self._plan.training_sites) if self._settings.nodes is None else self._settings.nodes
        self._roll.gather(grid, nodes=nodes, wait_s=self._settings.wait_s, stop=self._settings.stop)
        self._observer.sites_prepared(self._roll.outcomes)
        if len(self._roll.ready) < self._plan.quorum:
            raise _too_few("the start", self._plan, self._roll.outcomes)

    @timed("round")
    def _round(self, grid: Grid, number: int, arrays: ArrayRecord) -> tuple[ArrayRecord, RoundRecord]:
        """One round, committed: the shared parameters after it, and its record."""
        began = time.monotonic()
        self._roll.listen(grid)  # who came after the start joins here
        self._roll.ask(grid, again=self._settings.wait_s > 0)
        messages = self.configure_train(number, arrays, ConfigRecord(), grid)
        self._observer.round_started(number, tuple(self._ready.values()))
        self._asked = send(grid, messages)
        replies = collect(grid, self._asked, timeout_s=self._plan.round_timeout_s, stop=self._settings.stop)
        after, metrics = self.aggregate_train(number, replies)
        sites = (*(self._outcomes[site] for site in self._ready.values()), *self._absent)
        update_norm = None if after is None else cast(float, metrics["update_norm"])
        record = _record(number, began, sites, update_norm=update_norm)
        arrays = arrays if after is None else after
        self._commit(record, arrays)
        return arrays, record

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The round's instruction for every ready site; nothing is sampled."""
        self._ready, self._absent = self._roll.ready, self._roll.absent
        self._leave_out_who_dropped_out()
        connected = online(grid, self._ready)
        if self._encoding:
            self._roster = roster_of(
                {site: self._roll.masking_keys[site] for site in (self._ready[n] for n in connected)}
            )
        instruction = TrainInstruction(
            plan_digest=self._plan.digest,
            initial_digest=self._initial_digest,
            round=server_round,
            shared=_to_arrays(arrays),
            roster=self._roster,
        )
        self._shared = to_tensors(instruction.shared)
        ledgers = {node: self._copies.newest(self._ready[node]) for node in connected}
        return address(instruction, TRAIN, ledgers, timeout_s=self._plan.round_timeout_s)

    @timed("aggregate")
    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord]:
        """Judge each reply as it comes, then move the shared parameters; None below quorum, and they stay."""
        mean = MaskedMean(self._template, self._encoding) if self._encoding else RunningMean(self._template)
        began, masked_for = time.monotonic(), roster_digest(self._roster)
        self._outcomes = {}
        for message in replies:
            site = self._ready[self._asked[message.metadata.reply_to_message_id]]
            check = partial(
                _objection, site, server_round, self._plan, self._template, masked_for, self._ledger_objection
            )
            outcome, reply = judge(message, site=site, seconds=time.monotonic() - began, objection=check)
            if reply is not None:
                mean.add(reply.update, weight=weight_of(self._plan, reply, self._weights[site]))
                self._take_ledger(site, (reply.ledger_rows, reply.ledger_head))
            self._settle(server_round, outcome)
        self._settle_silent(server_round, waited_s=time.monotonic() - began)
        if not self._enough():
            return None, MetricRecord()
        return self._step(mean.mean())

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Nothing is asked: what a site measures is charged, and comes with its update."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def summary(self) -> None:
        """Nothing is logged: the observer is told."""

    def _ledger_objection(self, reply: SiteReply) -> str | None:
        """In a study a ledger only grows; between studies that run at once replies may come in any order."""
        shown = reply.ledger_rows, reply.ledger_head
        return ledger_objection(reply, self._ledgers.get(reply.site)) or self._copies.objection(reply.site, shown)

    def _take_ledger(self, site: str, ledger: Ledger) -> None:
        self._ledgers[site] = ledger
        self._copies.take(site, ledger)

    def _enough(self) -> bool:
        """Whether the quorum was accepted; of a secure sum everyone whose masks are in it, for it is noise without."""
        accepted = {site for site, outcome in self._outcomes.items() if outcome.status == "ok"}
        asked = set(json.loads(self._roster)) if self._roster else set()
        self._dropped = asked - accepted
        return len(accepted) >= self._plan.quorum and not self._dropped

    def _leave_out_who_dropped_out(self) -> None:
        """For one round, if there are enough others: a site that is ready but fails would stop every secure sum."""
        staying = {node: site for node, site in self._ready.items() if site not in self._dropped}
        if self._dropped and len(staying) >= self._plan.quorum:
            left_out = [site for site in self._ready.values() if site in self._dropped]
            reason = "it dropped out of the round before"
            self._absent += tuple(
                SiteOutcome(site=site, status="absent", code="absent", reason=reason) for site in left_out
            )
            self._ready = staying

    def _settle(self, number: int, outcome: SiteOutcome) -> None:
        self._outcomes[outcome.site] = outcome
        self._observer.site_answered(number, outcome)

    def _settle_silent(self, number: int, *, waited_s: float) -> None:
        asked = set(self._asked.values())
        for node, site in self._ready.items():
            if site in self._outcomes:
                continue
            status: Literal["late", "absent"] = "late" if node in asked else "absent"
            reason = "no answer in time" if status == "late" else "its node is not connected"
            self._settle(number, SiteOutcome(site=site, status=status, code=status, reason=reason, seconds=waited_s))

    def _step(self, update: Params) -> tuple[ArrayRecord, MetricRecord]:
        shared, self._outer = outer_step(self._shared, self._outer, update, self._plan.outer)
        return _to_record(shared), MetricRecord({"update_norm": norm(update)})

    @timed("store")
    def _commit(self, record: RoundRecord, arrays: ArrayRecord) -> None:
        shared = to_tensors(_to_arrays(arrays))
        commit(self._settings.folder, record, shared | self._outer, self._origin)
        self._observer.round_committed(record)


def _instruction(settings: RunSettings, initial: Params) -> PrepareInstruction:
    plan, signed = settings.plan, settings.signed
    return PrepareInstruction(
        plan_json=plan.to_json() if signed is None else signed.body,
        signer="" if signed is None else signed.signer,
        signature="" if signed is None else signed.signature,
        initial=to_arrays(initial),
    )


def _objection(
    site: str,
    number: int,
    plan: StudyPlan,
    template: Template,
    masked_for: str,
    of_ledger: Callable[[SiteReply], str | None],
    reply: SiteReply,
) -> str | None:
    reason = reason_to_reject(
        reply,
        site=site,
        plan_digest=plan.digest,
        round=number,
        template=template,
        scored=plan.outer.weights == "score",
        masked_for=masked_for,
    )
    return reason or of_ledger(reply)


def _record(number: int, began: float, sites: tuple[SiteOutcome, ...], *, update_norm: float | None) -> RoundRecord:
    return RoundRecord(
        round=number,
        status="below_quorum" if update_norm is None else "committed",
        seconds=time.monotonic() - began,
        update_norm=update_norm or 0.0,
        sites=sites,
    )


def _ledgers_in(records: Iterable[RoundRecord]) -> dict[str, Ledger]:
    """Each site's ledger as its last accepted reply showed it."""
    accepted = [outcome for record in records if record.round for outcome in record.sites if outcome.status == "ok"]
    return {outcome.site: (outcome.ledger_rows, outcome.ledger_head) for outcome in accepted}


def _to_record(params: Params) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in to_arrays(params).items()})


def _to_arrays(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


def _too_few(when: str, plan: StudyPlan, sites: Iterable[SiteOutcome]) -> RunError:
    lines = [f"  {o.site}: {o.status}, {o.reason}" for o in sites if o.status != "ok"]
    return RunError("\n".join([f"{when} did not reach the quorum of {plan.quorum} sites:", *lines]))
