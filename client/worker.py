"""The data side of a site. It trusts nothing that it is told: it runs its own copy of an approved plan, and for
each round it verifies, charges, queries, stores and replies, in that order.

Whatever goes wrong leaves the site as a code and a data-free reason; the rest goes to the site's own log.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from client import approval
from client.data.kept import ImageStore
from client.data.load import load_site
from client.grant import Grant
from client.journal import SiteJournal
from client.ledger import Ledger
from client.limits import require_open, require_within
from client.membership import membership_of
from client.reply_time import ROLL_CALL_S, ReplyTimes
from client.selftest import require_self_test
from client.site import load_site_config
from client.study import Load, Outcome, Study, open_study
from common.accounting import queries_per_round
from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import BadInstruction, InternalFailure, PrivacyRequired, Refusal, UntrustedDocument, UsageError
from common.keys import STUDY, SignedDocument
from common.params import Arrays, to_arrays, to_tensors
from common.plan import StudyPlan, plan_from_json
from common.records import PrepareInstruction, SiteReply, TrainInstruction, software_version
from common.timing import timed

LOG = "site.log"


class Worker:
    """One site's data, ledger and device; warm between rounds.

    `state` holds what the site must keep: ledger, approvals, releases, log. `simulated` allows plans without privacy
    and takes what it is sent for approved; `load` may then share images between workers.

    Raises SelfTestFailed where private queries are not what they are charged as.
    """

    def __init__(self, folder: Path, *, state: Path, simulated: bool = False, load: Load | None = None) -> None:
        require_self_test(None if simulated else state)
        self._folder, self._state, self._simulated = folder, state, simulated
        self._config = load_site_config(folder)
        self._studies: dict[str, Study] = {}
        self._times = ReplyTimes(held=not simulated)
        self._spent_at: tuple[tuple[int, str], float] = ((0, ""), 0.0)  # ledger head -> epsilon
        self._log = _site_log(state)
        store = None if simulated else ImageStore(state, self._log)
        self._load = load or functools.partial(load_site, store=store)
        self._journal = SiteJournal(None) if simulated else SiteJournal.of(state)

    @property
    def site(self) -> str:
        return self._config.name

    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        """Check the plan against approval and data, and get ready for its rounds."""
        return self._answer(_sha256(instruction.plan_json), lambda: self._prepare(instruction))

    def train(self, instruction: TrainInstruction) -> SiteReply:
        """The site's release for one round: charged and computed once, sent as often as it is asked for."""
        return self._answer(instruction.plan_digest, lambda: self._train(instruction))

    def _prepare(self, instruction: PrepareInstruction) -> SiteReply:
        sent = self._sent_plan(instruction)
        if sent.privacy is None and not (self._simulated or self._config.phantom):
            raise PrivacyRequired(f"plan {sent.digest[:12]}")
        require_within(self._config, sent)
        plan = sent if self._simulated else approval.require(self._state, sent.digest)
        study = self._opened(plan, instruction.initial)
        _require_seen(study.ledger, instruction)
        if not self._simulated:  # a worker that starts again goes on by itself
            save_checkpoint(self._start_file(plan.digest), to_tensors(instruction.initial), {})
        rows, head = study.ledger.head() if study.ledger else (0, "")
        return SiteReply(
            site=self.site,
            code="ok",
            version=software_version(),
            plan_digest=plan.digest,
            ledger_rows=rows,
            ledger_head=head,
            masking_key=study.masking.document() if study.masking else "",
        )

    def _sent_plan(self, instruction: PrepareInstruction) -> StudyPlan:
        """The plan that was sent; at a real site signed by the lab that it joined, and kept for a person to approve."""
        if not self._simulated:
            document = SignedDocument(STUDY, instruction.plan_json, instruction.signer, instruction.signature)
            try:
                plan = approval.signed_plan(document, lab_key=membership_of(self._folder).lab_key)
            except UntrustedDocument as error:
                raise BadInstruction(f"the plan is not as the lab signed it: {error}") from None
            except UsageError as error:
                raise BadInstruction(str(error)) from None
            if approval.submit(self._state, plan, document):
                self._journal.asked(plan, document)
            return plan
        try:
            return _plan_in(instruction.plan_json)
        except ValueError as error:
            raise BadInstruction(f"the plan cannot be read: {error}") from None

    def _train(self, instruction: TrainInstruction) -> SiteReply:
        study = self._verified(instruction)
        masks = study.masks(instruction.roster, instruction.round)
        stored = study.releases.load(instruction.round)
        if stored is not None:
            return masks.masked(stored) if masks else stored
        story = self._journal.write_up(study.plan.digest, study.ledger, study.releases)  # or refuse, before the charge
        started = time.monotonic()
        with self._times.held(study.plan.digest, limit_s=study.plan.round_timeout_s):
            grant = study.charge(instruction.round, journal=story)
            self._write_up(study)
            outcome = study.query(instruction.round, instruction.shared, grant)
            span_s = self._times.span(study.plan.digest, since=started)
            reply = self._reply(study, instruction.round, outcome, grant, seconds=span_s)
            reply = dataclasses.replace(reply, masked_for=masks.roster_digest if masks else "")
            study.releases.store(reply, outcome.kept)
            self._write_up(study)
        return masks.masked(reply) if masks else reply

    def _verified(self, instruction: TrainInstruction) -> Study:
        """The prepared and approved study that fits the instruction."""
        plan = None if self._simulated else approval.require(self._state, instruction.plan_digest)
        require_open(self._config.limits)
        study = self._studies.get(instruction.plan_digest) or (self._reopened(plan) if plan else None)
        if study is None or study.initial_digest != instruction.initial_digest:
            raise BadInstruction("this study was not prepared, or from other parameters")
        if not 1 <= instruction.round <= study.plan.rounds:
            raise BadInstruction(f"round {instruction.round} of {study.plan.rounds}")
        study.require_fit(instruction.shared)
        _require_seen(study.ledger, instruction)
        return study

    def _reopened(self, plan: StudyPlan) -> Study | None:
        """A study that this site prepared before its worker started again."""
        if not self._start_file(plan.digest).exists():
            return None
        return self._opened(plan, to_arrays(load_checkpoint(self._start_file(plan.digest)).tensors))

    def _opened(self, plan: StudyPlan, initial: Arrays) -> Study:
        with self._times.held("", limit_s=ROLL_CALL_S):  # loading takes as long as there are images
            self._studies[plan.digest] = open_study(
                self._folder,
                self._state,
                self._config,
                plan,
                initial,
                load=self._load,
                durable=not self._simulated,
            )
        return self._studies[plan.digest]

    def _start_file(self, plan_digest: str) -> Path:
        return self._state / "releases" / plan_digest / "start.safetensors"

    def status(self) -> Mapping[str, Any]:
        """What stands at the site: studies and budget, no word of its data."""
        (rows, _), spent = self._spent(Ledger.found(self._state))
        return {
            "site": self.site,
            "version": software_version(),
            "prepared": sorted(self._studies),
            "approved": sorted(approval.approved(self._state)),
            "pending": sorted(approval.pending(self._state)),
            "epsilon_spent": spent,
            "epsilon_budget": self._config.budget.epsilon,
            "rounds_charged": rows,
        }

    @timed("accounting")
    def _spent(self, ledger: Ledger | None) -> tuple[tuple[int, str], float]:
        """(the ledger's head, epsilon of all its charges): seconds of work, done once for each row."""
        if ledger is None:
            return (0, ""), 0.0
        known, chain = self._spent_at, ledger.chain()
        if known[0] != chain.head:
            known = self._spent_at = chain.head, ledger.terms.spent(charge.event for charge in chain.charges)
        return known

    def _reply(self, study: Study, round: int, outcome: Outcome, grant: Grant, *, seconds: float) -> SiteReply:
        (rows, head), spent = self._spent(study.ledger)
        return SiteReply(
            site=self.site,
            code="ok",
            version=software_version(),
            plan_digest=study.plan.digest,
            round=round,
            update=outcome.update,
            accuracy=outcome.accuracy,
            queries=queries_per_round(study.plan),
            epsilon=spent,
            ledger_rows=rows,
            ledger_head=head,
            seconds=seconds,
        )

    def _write_up(self, study: Study) -> None:
        """In the journal, for the record; what the patients paid for is not lost to it."""
        try:
            self._journal.write_up(study.plan.digest, study.ledger, study.releases)
        except Exception:
            self._log.exception("the journal lacks what was charged or released; no further round is charged")

    def _answer(self, study: str, compute: Callable[[], SiteReply]) -> SiteReply:
        """No exception text leaves the site; a refusal is told in its journal."""
        try:
            return compute()
        except Refusal as refusal:
            self._log.warning("refused: %s", refusal)
            answer = refusal
        except Exception:
            self._log.exception("failed")
            answer = InternalFailure()
        self._tell(answer, study if approval.known(self._state, study) else "")
        return SiteReply(site=self.site, code=answer.code, reason=answer.public_reason, version=software_version())

    def _tell(self, refusal: Refusal, study: str) -> None:
        try:
            self._journal.refused(refusal, study=study)
        except Exception:
            self._log.exception("the journal lacks this refusal")


@lru_cache(maxsize=4)  # the sites of a simulation are sent the very same text
def _plan_in(text: str) -> StudyPlan:
    return plan_from_json(text)


@lru_cache(maxsize=4)
def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


@timed("accounting")
def _require_seen(ledger: Ledger | None, instruction: PrepareInstruction | TrainInstruction) -> None:
    """Raise LedgerRolledBack, before anything is charged, if the lab saw rows that this ledger does not hold."""
    if ledger is not None and instruction.ledger_head:
        ledger.require_holds(instruction.ledger_rows, instruction.ledger_head, witness="the lab")


def _site_log(state: Path) -> logging.Logger:
    """The site's own log file; created when there is something to say."""
    state.mkdir(parents=True, exist_ok=True)
    log = logging.Logger(f"consilium.site.{state}")
    handler = logging.FileHandler(state / LOG, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
