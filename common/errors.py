"""Everything Consilium raises on purpose.

ConsiliumError                 exit code 1
├── UsageError                 exit code 2: a file or an argument that the user can mend
│   ├── PlanError              the study plan
│   ├── DataError              site.yaml, manifest, images, npz
│   └── UntrustedDocument      a signed file is not what it says, or not from whom
├── Refusal                    a site says no; its code and data-free reason reach the lab
│   ├── NotApproved            the plan is not one that this site approved
│   ├── PrivacyRequired        a plan without privacy, at a real site
│   ├── OutsideLimits          the plan, or the hour, is outside the hospital's own limits
│   ├── SiteUnfit              the site's data does not fit the plan
│   ├── WorkerUnavailable      the site's worker does not answer its node
│   ├── BudgetExceeded         the ledger's budget would be overspent
│   ├── RoundSpent             the round was charged, and its release was lost
│   ├── LedgerDamaged          the ledger is missing, torn or was changed
│   │   └── LedgerRolledBack   it lacks rows that were seen in it: an older copy was put back
│   ├── JournalDamaged         the journal was changed, or cannot be written
│   ├── UnchargedQuery         more private queries than were charged
│   ├── BadInstruction         the instruction contradicts the plan
│   └── InternalFailure        anything else; the reason stays at the site
├── SelfTestFailed             private queries here are not what is charged: the worker does not start
├── CheckpointError            a checkpoint is missing, broken or of another network
└── RunError                   a run cannot go on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what, and what to do next."""

    where: str  # "study.yaml:12", "manifest.csv:7", "site alder"
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" -- {self.remedy}" if self.remedy else "")


class ConsiliumError(Exception):
    """Base of the tree; `exit_code` is what a command line returns."""

    exit_code = 1


class UsageError(ConsiliumError):
    """The user can mend it; carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, problems: str | Problem | Sequence[Problem]) -> None:
        if isinstance(problems, str):
            problems = [Problem("", problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems = tuple(problems)
        super().__init__("\n".join(str(p).removeprefix(": ") for p in self.problems))


class PlanError(UsageError):
    """The study plan is not valid or cannot be met."""


class DataError(UsageError):
    """A site's files are not what the plan or the manifest says."""


class UntrustedDocument(UsageError):
    """A signed document is not what it says, or is not from whom it should be."""


class Refusal(ConsiliumError):
    """A site declines. Only `code` and `public_reason` ever leave the site.

    `detail` stays in the site's own log: it may name files or counts.
    """

    code = "refused"
    public_reason = "the site refused"

    def __init__(self, detail: str = "") -> None:
        self.detail = detail
        super().__init__(f"{self.public_reason}: {detail}" if detail else self.public_reason)


class NotApproved(Refusal):
    code = "not-approved"
    public_reason = "this plan is not approved at the site"


class PrivacyRequired(Refusal):
    code = "privacy-required"
    public_reason = "a plan without privacy runs in simulation only"


class OutsideLimits(Refusal):
    """Its reason speaks of the plan and the hospital's limits, never of its data: so all of it reaches the lab."""

    code = "outside-limits"
    public_reason = "the plan is outside the hospital's limits"

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.public_reason = reason

    def __str__(self) -> str:
        return self.public_reason


class WorkerUnavailable(Refusal):
    code = "worker-unavailable"
    public_reason = "the site's worker does not answer its node"


class SiteUnfit(Refusal):
    code = "site-unfit"
    public_reason = "the site's data does not fit the plan"


class BudgetExceeded(Refusal):
    code = "budget-exceeded"
    public_reason = "the site's privacy budget does not cover this round"


class RoundSpent(Refusal):
    code = "round-spent"
    public_reason = "the round was charged before and its release was lost; it is not computed twice"


class LedgerDamaged(Refusal):
    code = "ledger-damaged"
    public_reason = "the site's privacy ledger is missing or damaged"


class LedgerRolledBack(LedgerDamaged):
    code = "ledger-rolled-back"
    public_reason = "the site's privacy ledger lacks rows that were seen in it: an older copy was put back"


class JournalDamaged(Refusal):
    code = "journal-damaged"
    public_reason = "the site's journal is damaged"


class UnchargedQuery(Refusal):
    code = "uncharged-query"
    public_reason = "more private queries were asked than were charged"


class BadInstruction(Refusal):
    code = "bad-instruction"
    public_reason = "the instruction does not match the approved plan"


class InternalFailure(Refusal):
    """Whatever else went wrong at a site: the reason stays there."""

    code = "internal-failure"
    public_reason = "the site failed; its own log says why"


class SelfTestFailed(ConsiliumError):
    """A private query of this installation is not what the ledger charges: the site takes part in nothing."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the privacy self-test failed: this site takes part in nothing\n{what}\nInstall it anew.")


class CheckpointError(ConsiliumError):
    """A checkpoint is missing, broken or belongs to another network."""


class RunError(ConsiliumError):
    """A run cannot start or go on."""
