"""`consilium-site audit`: attacks on this installation's own private queries, and a report signed with the site's key.

No image of the site is read and its ledger is not opened: the patients of an audit are drawn. What is the site's own is
what computes: the installed code, the machine's source of randomness, and the plan at the site's declared size.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client import approval
from client.audit_episodes import episode_checks
from client.membership import SITE_KEY
from client.one_run import OneRun, departures, one_run_audits
from client.selftest import Check, run_self_test
from client.site import SiteConfig, load_site_config
from common.accounting import PrivacyCost, plan_cost, queries_per_round
from common.errors import Problem, SiteUnfit, UntrustedDocument, UsageError
from common.files import write_atomically
from common.keys import AUDIT, SignedDocument, load_signing_key, read_signed, sign
from common.plan import StudyPlan, load_plan
from common.records import software_version

REPORT, PAGE = "audit.json", "audit.html"
SHARE_OF_CHECKS = 0.25  # of the whole audit's time, about; so the progress bar can say what is left

Tick = Callable[[float, str], object]  # (share that is done, what was found last or is under way)


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """Everything that the report says: nothing in it depends on a patient."""

    site: str
    time: float  # seconds since 1970
    seconds: float
    version: str
    study: str
    plan_digest: str
    patients: int  # declared
    phantom: bool
    delta: float
    epsilon: float  # of the whole study, by the accounting
    noise_multiplier: float
    checks: tuple[Check, ...]
    runs: tuple[OneRun, ...]
    departures: tuple[str, ...]  # of the attacked study from the planned one

    @property
    def verdict(self) -> str:
        """The worst of all."""
        found = {part.verdict for part in self.parts}
        return next((verdict for verdict in ("FAIL", "INCONCLUSIVE") if verdict in found), "PASS")

    @property
    def parts(self) -> tuple[Check | OneRun, ...]:
        """All that was attacked."""
        return (*self.checks, *self.runs)

    def to_json(self) -> dict[str, Any]:
        """Plain data; a number that is none is null."""
        values = dataclasses.asdict(self) | {"verdict": self.verdict}
        for part in (*values["checks"], *values["runs"]):
            part.update({name: None for name, value in part.items() if value != value})
        return values


def plan_to_audit(folder: Path, *, study: str | None = None, plan: Path | None = None) -> StudyPlan:
    """The plan in a file, or the approved one of that name or digest; left out, the one approved last.

    Raises UsageError if there is none, SiteUnfit if it is not for this site.
    """
    config = load_site_config(folder)
    chosen = load_plan(plan) if plan else _approved(folder, config, study)
    if config.name not in chosen.training_sites:
        raise SiteUnfit(f"the plan {chosen.study!r} has no training site {config.name!r}")
    if chosen.privacy is None:
        raise UsageError(Problem(chosen.study, "has no privacy: it promises nothing to audit", "audit another plan"))
    if queries_per_round(chosen) == 0:
        what = f"asks no private query ({chosen.algorithm.name}): nothing leaves that could be attacked"
        raise UsageError(Problem(chosen.study, what, "audit another plan"))
    return chosen


def run_audit(folder: Path, plan: StudyPlan, tick: Tick = lambda share, what: None) -> AuditReport:
    """All attacks, about a minute. Raises PlanError if the plan's privacy cannot be met."""
    config, started = load_site_config(folder), time.monotonic()
    cost = plan_cost(plan, config.name)
    if cost is None:
        raise ValueError("a plan without privacy")
    checks = tuple(_checks(tick))
    runs = tuple(_runs(plan, cost, tick))
    return AuditReport(
        site=config.name,
        time=time.time(),
        seconds=time.monotonic() - started,
        version=software_version(),
        study=plan.study,
        plan_digest=plan.digest,
        patients=cost.patients,
        phantom=config.phantom,
        delta=cost.delta,
        epsilon=cost.epsilon,
        noise_multiplier=cost.noise_multiplier,
        checks=checks,
        runs=runs,
        departures=departures(plan, runs),
    )


def write_audit(folder: Path, report: AuditReport, out: Path) -> SignedDocument:
    """The signed report and its page in the folder `out`. Raises UsageError without the site's key."""
    from client.audit_report import page

    key = load_signing_key(folder / load_site_config(folder).state / SITE_KEY)
    signed = sign(AUDIT, json.dumps(report.to_json(), indent=1, allow_nan=False), key)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / REPORT, signed.to_json().encode())
    write_atomically(out / PAGE, page(report, signed).encode())
    return signed


def verified_audit(path: Path) -> tuple[dict[str, Any], str]:
    """What a signed report says, and who signed it (public key, hex). Raises UsageError or UntrustedDocument."""
    document = read_signed(path)
    try:
        body: dict[str, Any] = json.loads(document.verified(AUDIT))
    except ValueError:
        raise UntrustedDocument(f"{path}: what was signed is no audit") from None
    return body, document.signer


def _checks(tick: Tick) -> Iterator[Check]:
    """The self-test anew, not the one of this process's start."""
    parts = (run_self_test(), episode_checks())
    tick(0.0, "attacking single queries")
    for number, part in enumerate(parts, start=1):
        for check in part:
            yield check
            tick((number - 0.5) / len(parts) * SHARE_OF_CHECKS, check.query)
    tick(SHARE_OF_CHECKS, "running the study on drawn patients")


def _runs(plan: StudyPlan, cost: PrivacyCost, tick: Tick) -> Iterator[OneRun]:
    finished = 0

    def share(done: float) -> None:
        tick(SHARE_OF_CHECKS + (1 - SHARE_OF_CHECKS) * (finished + done) / 2, "running the study on drawn patients")

    for run in one_run_audits(plan, cost, share):
        finished += 1
        yield run


def _approved(folder: Path, config: SiteConfig, study: str | None) -> StudyPlan:
    approvals = sorted(approval.approved(folder / config.state).values(), key=lambda approval: approval.time)
    plans = [approval.plan for approval in approvals]
    found = [plan for plan in plans if study is None or plan.study == study or plan.digest.startswith(study)]
    if not found:
        what = "no study is approved here" if study is None else f"no approved study {study!r}"
        raise UsageError(Problem(str(folder), what, "give a plan: `--plan study.yaml`"))
    return found[-1]
