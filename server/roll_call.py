"""Before the first round: which node is which site, and which sites are ready."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from functools import partial

from flwr.serverapp import Grid

from common.errors import RunError
from common.params import Params, to_arrays
from common.plan import StudyPlan
from common.records import PREPARE, PrepareInstruction, SiteReply
from server.exchange import address, collect, send
from server.history import SiteOutcome
from server.replies import Ledger, claimed_site, judge, ledger_objection

_AT_LEAST_S = 120.0  # to load images, and to start Ray
_BETWEEN_LOOKS_S = 0.05


@dataclass(frozen=True)
class Roll:
    """Who takes part."""

    ready: dict[int, str]  # node id -> site, in the plan's order
    unused: tuple[SiteOutcome, ...]  # every other training site, and nodes that are no site of the plan

    @property
    def outcomes(self) -> tuple[SiteOutcome, ...]:
        return (*(SiteOutcome(site=site, status="ok", code="ok") for site in self.ready.values()), *self.unused)

    @property
    def absent(self) -> tuple[SiteOutcome, ...]:
        """The unused sites as every round records them."""
        return tuple(replace(outcome, status="absent", seconds=0.0) for outcome in self.unused)


def call_roll(
    grid: Grid, plan: StudyPlan, initial: Params, ledgers: dict[str, Ledger], *, nodes: int, stop: threading.Event
) -> Roll:
    """Send the plan and the starting parameters to every node, and see who answers as what.

    Waits for `nodes` nodes first. `ledgers` is how each site last showed its ledger. A node that is no training site,
    or a second one of the same site, is not used. Raises RunError when `stop` is set.
    """
    timeout_s = max(plan.round_timeout_s, _AT_LEAST_S)
    found = _await_nodes(grid, nodes, timeout_s=timeout_s, stop=stop)
    instruction = PrepareInstruction(plan_json=plan.to_json(), initial=to_arrays(initial))
    began = time.monotonic()
    sent = send(grid, address(instruction, PREPARE, found, timeout_s=timeout_s))
    ready: dict[int, str] = {}
    unused = {node: _silent(node, waited_s=timeout_s) for node in found}
    for message in collect(grid, sent, timeout_s=timeout_s, stop=stop):
        node = sent[message.metadata.reply_to_message_id]
        site = claimed_site(message)
        outcome, reply = judge(
            message,
            site=site if site in plan.training_sites else _node_name(node, site),
            seconds=time.monotonic() - began,
            objection=partial(_objection, plan=plan, taken=tuple(ready.values()), ledger=ledgers.get(site)),
        )
        if reply is None:
            unused[node] = outcome
        else:
            ready[node] = site
            del unused[node]
    in_plan_order = dict(sorted(ready.items(), key=lambda item: plan.training_sites.index(item[1])))
    return Roll(in_plan_order, _unused(plan, ready, unused))


def _await_nodes(grid: Grid, nodes: int, *, timeout_s: float, stop: threading.Event) -> list[int]:
    """The nodes that are there: when there are enough, or the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = sorted(grid.get_node_ids())
        if len(found) >= nodes or time.monotonic() > deadline:
            return found
        if stop.wait(_BETWEEN_LOOKS_S):
            raise RunError("the run was stopped")


def _objection(reply: SiteReply, *, plan: StudyPlan, taken: tuple[str, ...], ledger: Ledger | None) -> str | None:
    if reply.site not in plan.training_sites:
        return "it is no training site of this plan"
    if reply.site in taken:
        return "another node answered as this site before"
    if reply.plan_digest != plan.digest:
        return "the reply belongs to another plan"
    return ledger_objection(reply, ledger) if reply.ledger_head else None  # a site may show its ledger only later


def _unused(plan: StudyPlan, ready: dict[int, str], unused: dict[int, SiteOutcome]) -> tuple[SiteOutcome, ...]:
    """The outcomes of unused nodes and of sites that no node answered for; no training site comes twice."""
    taken = set(ready.values())
    outcomes = []
    for node, outcome in unused.items():
        known = outcome.site in taken
        taken.add(outcome.site)
        outcomes.append(replace(outcome, site=_node_name(node, outcome.site)) if known else outcome)
    missing = [site for site in plan.training_sites if site not in taken]
    return (*outcomes, *(_missing(site) for site in missing))


def _silent(node: int, *, waited_s: float) -> SiteOutcome:
    reason = "no answer in time"
    return SiteOutcome(site=_node_name(node, ""), status="late", code="late", reason=reason, seconds=waited_s)


def _missing(site: str) -> SiteOutcome:
    return SiteOutcome(site=site, status="absent", code="absent", reason="no node answered for this site")


def _node_name(node: int, claimed: str) -> str:
    return f"node {node} ({claimed})" if claimed else f"node {node}"
