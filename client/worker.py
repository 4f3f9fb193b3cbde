"""The data side of a site. It trusts nothing that it is told: it runs its own copy of an approved plan, and for
each round it verifies, charges, queries, stores and replies, in that order.

Whatever goes wrong leaves the site as a code and a data-free reason; the rest goes to the site's own log.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

from client import approval
from client.grant import Grant
from client.site import load_site_config
from client.study import Outcome, Study, open_study
from common.accounting import queries_per_round
from common.errors import BadInstruction, InternalFailure, PrivacyRequired, Refusal, SiteUnfit
from common.plan import plan_from_json
from common.records import PrepareInstruction, SiteReply, TrainInstruction, software_version

LOG = "site.log"
_FASTEST_S = 2.0**-3  # replies say their wall time in powers of two, from here on


class Worker:
    """One site's data, ledger and device; warm between rounds.

    `state` holds what the site must keep: ledger, approvals, releases, log. `simulated` allows plans without privacy
    and approves what it is sent.
    """

    def __init__(self, folder: Path, *, state: Path, simulated: bool = False) -> None:
        self._folder, self._state, self._simulated = folder, state, simulated
        self._config = load_site_config(folder)
        self._studies: dict[str, Study] = {}
        self._log = _site_log(state)

    @property
    def site(self) -> str:
        return self._config.name

    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        """Check the plan against approval and data, and get ready for its rounds."""
        return self._answer(lambda: self._prepare(instruction))

    def train(self, instruction: TrainInstruction) -> SiteReply:
        """The site's release for one round: charged and computed once, sent as often as it is asked for."""
        return self._answer(lambda: self._train(instruction))

    def _prepare(self, instruction: PrepareInstruction) -> SiteReply:
        try:
            sent = plan_from_json(instruction.plan_json)
        except ValueError as error:
            raise BadInstruction(f"the plan cannot be read: {error}") from None
        if self._simulated:
            approval.approve(self._state, sent, by="simulation")
        plan = approval.require(self._state, sent.digest)
        if plan.privacy is None and not self._simulated:
            raise PrivacyRequired(f"plan {plan.digest[:12]}")
        if self.site not in plan.training_sites:
            raise SiteUnfit(f"the plan has no training site {self.site!r}")
        self._studies[plan.digest] = open_study(self._folder, self._state, self._config, plan, instruction.initial)
        return SiteReply(site=self.site, code="ok", version=software_version(), plan_digest=plan.digest)

    def _train(self, instruction: TrainInstruction) -> SiteReply:
        study = self._verified(instruction)
        stored = study.releases.load(instruction.round)
        if stored is not None:
            return stored
        started = time.monotonic()
        grant = study.charge(instruction.round)
        outcome = study.query(instruction.round, instruction.shared, grant)
        reply = self._reply(study, instruction.round, outcome, grant, seconds=time.monotonic() - started)
        study.releases.store(reply, outcome.kept)
        return reply

    def _verified(self, instruction: TrainInstruction) -> Study:
        """The prepared and approved study that fits the instruction."""
        approval.require(self._state, instruction.plan_digest)
        study = self._studies.get(instruction.plan_digest)
        if study is None or study.initial_digest != instruction.initial_digest:
            raise BadInstruction("this study was not prepared, or from other parameters")
        if not 1 <= instruction.round <= study.plan.rounds:
            raise BadInstruction(f"round {instruction.round} of {study.plan.rounds}")
        study.require_fit(instruction.shared)
        return study

    def _reply(self, study: Study, round: int, outcome: Outcome, grant: Grant, *, seconds: float) -> SiteReply:
        rows, head = study.ledger.head() if study.ledger else (0, "")
        return SiteReply(
            site=self.site,
            code="ok",
            version=software_version(),
            plan_digest=study.plan.digest,
            round=round,
            update=outcome.update,
            accuracy=outcome.accuracy,
            queries=queries_per_round(study.plan),
            epsilon=study.ledger.spent() if study.ledger else 0.0,
            ledger_rows=rows,
            ledger_head=head,
            seconds=max(_FASTEST_S, 2.0 ** math.ceil(math.log2(seconds))),
        )

    def _answer(self, compute: Callable[[], SiteReply]) -> SiteReply:
        """No exception text leaves the site."""
        try:
            return compute()
        except Refusal as refusal:
            self._log.warning("refused: %s", refusal)
            answer = refusal
        except Exception:
            self._log.exception("failed")
            answer = InternalFailure()
        return SiteReply(site=self.site, code=answer.code, reason=answer.public_reason, version=software_version())


def _site_log(state: Path) -> logging.Logger:
    """The site's own log file; created when there is something to say."""
    state.mkdir(parents=True, exist_ok=True)
    log = logging.Logger(f"consilium.site.{state}")
    handler = logging.FileHandler(state / LOG, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    return log
