"""Which node is which site, and who is ready: asked before the first round, and of whoever comes later."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import partial

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import RunError
from common.plan import StudyPlan
from common.records import PREPARE, PrepareInstruction, SiteReply
from server.exchange import address, pause, send
from server.history import SiteOutcome
from server.ledgers import LedgerCopies
from server.replies import Ledger, claimed_site, judge, ledger_objection

_AT_LEAST_S = 120.0  # to load images, and to start Ray
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 1.0  # between two looks
_LOOK_FOR_NODES_S = 0.2
_ASK_AGAIN_S, _ASK_LATER_S = 15.0, 120.0  # a site that was not ready: at first, and when people take their time


class RollCall:
    """Sends the plan and the starting parameters to nodes, and keeps what they answered.

    A node that is no training site, a second one of a site that is ready, or one that claims to be another site than
    the lab enrolled it as, is not used.
    """

    def __init__(self, plan: StudyPlan, instruction: PrepareInstruction, ledgers: LedgerCopies) -> None:
        self._plan, self._instruction, self._ledgers = plan, instruction, ledgers
        self._enrolled_as: dict[int, str] = {}  # by node that was asked; empty on a grid that knows no names
        self._shown: dict[int, Ledger] = {}  # node -> what it was last told of its site's ledger
        self._ready: dict[int, str] = {}
        self._taken: set[str] = set()  # the sites that are ready
        self._place = {site: place for place, site in enumerate(plan.training_sites)}
        self.masking_keys: dict[str, str] = {}  # by site, as it signed it; empty without a secure sum
        self._unused: dict[int, SiteOutcome] = {}  # the last word of every other node
        self._asked: dict[str, tuple[int, float]] = {}  # message id -> node, when; not answered yet
        self._last_asked: dict[int, float] = {}  # by node
        self._timeout_s = max(plan.round_timeout_s, _AT_LEAST_S)
        self._began = time.monotonic()

    @property
    def ready(self) -> dict[int, str]:
        """node id -> site, in the plan's order."""
        return dict(sorted(self._ready.items(), key=lambda item: self._place[item[1]]))

    @property
    def outcomes(self) -> tuple[SiteOutcome, ...]:
        """Of every training site and of every other node."""
        return (*(SiteOutcome(site=site, status="ok", code="ok") for site in self.ready.values()), *self._others())

    @property
    def absent(self) -> tuple[SiteOutcome, ...]:
        """Those that are not ready, as a round records them."""
        return tuple(replace(outcome, status="absent", seconds=0.0) for outcome in self._others())

    def gather(self, grid: Grid, *, nodes: int, wait_s: float, stop: threading.Event) -> None:
        """Ask until all training sites are ready, or everyone of `nodes` nodes answered and `wait_s` is over.

        Raises RunError when `stop` is set.
        """
        began, looked, pause_s = time.monotonic(), -math.inf, _SHORTEST_PAUSE_S
        while True:
            waited, before = time.monotonic() - began, (len(self._ready), len(self._asked))
            if waited - looked >= _LOOK_FOR_NODES_S:
                looked = waited
                self.ask(grid, again=waited < wait_s)
            self.listen(grid)
            if len(self._ready) == len(self._place):
                return
            everyone = len(self._ready) + len(self._unused) >= nodes or waited > self._timeout_s
            if waited > wait_s and everyone and not self._asked:
                return
            pause_s = _SHORTEST_PAUSE_S if before != (len(self._ready), len(self._asked)) else 1.5 * pause_s
            if pause(grid, min(pause_s, _LONGEST_PAUSE_S), stop):
                raise RunError("the run was stopped")

    def ask(self, grid: Grid, *, again: bool) -> None:
        """Send the plan to nodes that were never asked; with `again` also to those that were not ready a while ago.

        One that was silent for too long may be asked again.
        """
        now = time.monotonic()
        late = [message_id for message_id, (_, asked_at) in self._asked.items() if now - asked_at > self._timeout_s]
        for message_id in late:
            node, _ = self._asked.pop(message_id)
            self._unused[node] = _silent(node, waited_s=self._timeout_s)
        pause_s = min(max(_ASK_AGAIN_S, (now - self._began) / 4), _ASK_LATER_S)
        busy = {node for node, _ in self._asked.values()} | self._ready.keys()
        just_asked = {n for n, asked_at in self._last_asked.items() if not again or now - asked_at < pause_s}
        nodes = sorted(set(grid.get_node_ids()) - busy - just_asked)
        if not nodes:
            return
        names = _enrolled_names(grid)
        self._enrolled_as |= {node: names.get(node, "") for node in nodes}
        self._shown |= {node: self._ledgers.newest(names[node]) if node in names else (0, "") for node in nodes}
        told = {node: self._shown[node] for node in nodes}
        sent = send(grid, address(self._instruction, PREPARE, told, timeout_s=self._timeout_s))
        self._last_asked |= dict.fromkeys(nodes, now)
        for node in nodes:
            self._unused.setdefault(node, _silent(node, waited_s=self._timeout_s))
        self._asked |= {message_id: (node, now) for message_id, node in sent.items()}

    def listen(self, grid: Grid) -> None:
        """Take the answers that have come."""
        if not self._asked:
            return
        for message in list(grid.pull_messages(self._asked.keys())):
            node, asked_at = self._asked.pop(message.metadata.reply_to_message_id)
            self._take(message, node, seconds=time.monotonic() - asked_at)

    def _take(self, message: Message, node: int, *, seconds: float) -> None:
        site, enrolled_as = claimed_site(message), self._enrolled_as[node]
        known = enrolled_as or site
        outcome, reply = judge(
            message,
            site=known if known in self._place else _node_name(node, known),
            seconds=seconds,
            objection=partial(
                _objection,
                plan=self._plan,
                sites=self._place,
                taken=self._taken,
                ledgers=self._ledgers,
                shown=self._shown[node],
                enrolled_as=enrolled_as,
            ),
        )
        self._unused.pop(node, None)
        if reply is None:
            self._unused[node] = outcome
        else:
            self._ready[node] = site
            self._taken.add(site)
            self._ledgers.take(site, (reply.ledger_rows, reply.ledger_head))
            self.masking_keys[site] = reply.masking_key

    def _others(self) -> tuple[SiteOutcome, ...]:
        """The outcomes of unused nodes and of sites that no node answered for; no training site comes twice."""
        taken = set(self._ready.values())
        outcomes = []
        for node, outcome in self._unused.items():
            known = outcome.site in taken
            taken.add(outcome.site)
            outcomes.append(replace(outcome, site=_node_name(node, outcome.site)) if known else outcome)
        missing = [site for site in self._plan.training_sites if site not in taken]
        return (*outcomes, *(_missing(site) for site in missing))


def online(grid: Grid, nodes: Iterable[int]) -> list[int]:
    """Those of `nodes` that are connected now, in their order."""
    connected = set(grid.get_node_ids())
    return [node for node in nodes if node in connected]


def _enrolled_names(grid: Grid) -> dict[int, str]:
    """The names under which the lab let nodes in; a grid on one machine knows none."""
    listed = getattr(grid, "get_nodes", None)
    return {node.node_id: node.name for node in listed()} if listed is not None else {}


def _objection(
    reply: SiteReply,
    *,
    plan: StudyPlan,
    sites: Container[str],
    taken: Container[str],
    ledgers: LedgerCopies,
    shown: Ledger,
    enrolled_as: str,
) -> str | None:
    if enrolled_as and reply.site != enrolled_as:
        return f"it claims to be {reply.site!r}, and is enrolled as {enrolled_as!r}"
    if reply.site not in sites:
        return "it is no training site of this plan"
    if reply.site in taken:
        return "another node answered as this site before"
    if reply.plan_digest != plan.digest:
        return "the reply belongs to another plan"
    if not reply.ledger_head:  # a site without privacy has none
        return None
    return ledger_objection(reply, shown) or ledgers.objection(reply.site, (reply.ledger_rows, reply.ledger_head))


def _silent(node: int, *, waited_s: float) -> SiteOutcome:
    reason = "no answer in time"
    return SiteOutcome(site=_node_name(node, ""), status="late", code="late", reason=reason, seconds=waited_s)


def _missing(site: str) -> SiteOutcome:
    return SiteOutcome(site=site, status="absent", code="absent", reason="no node answered for this site")


def _node_name(node: int, claimed: str) -> str:
    return f"node {node} ({claimed})" if claimed else f"node {node}"
