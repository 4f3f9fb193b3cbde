"""Sending instructions through a Flower Grid, and taking the replies one by one until the time is up.

Works on any Grid: in process, under Ray, or a SuperLink's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from common.errors import RunError
from common.records import Record
from common.timing import timed
from common.wire import encode, with_fields
from server.local_grid import LocalGrid

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 1.0  # between two looks for replies
_AT_ONCE = 64  # messages


def address(
    record: Record, message_type: str, ledgers: Mapping[int, tuple[int, str]], *, timeout_s: float
) -> list[Message]:
    """`record` for each node, with what was seen of its ledger; it expires with the time limit, so that no node works
    for nothing."""
    content = encode(record)
    return [
        Message(with_fields(content, ledger_rows=rows, ledger_head=head), node, message_type, ttl=timeout_s)
        for node, (rows, head) in ledgers.items()
    ]


@timed("network")
def send(grid: Grid, messages: list[Message]) -> dict[str, int]:
    """Push `messages`; message id -> node of those that got through.

    An error reply may come from the SuperLink in place of the node: only the id says whom it is about.
    """
    pushed = set(grid.push_messages(messages)) if messages else set()
    ids = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    return {message_id: node for message_id, node in ids.items() if message_id in pushed}


def collect(grid: Grid, sent: Iterable[str], *, timeout_s: float, stop: threading.Event) -> Iterator[Message]:
    """The replies to the messages `sent`, as they come; ends when all are in or the time is up.

    Raises RunError when `stop` is set.
    """
    waiting, deadline, pause_s = set(sent), time.monotonic() + timeout_s, _SHORTEST_PAUSE_S
    while waiting:
        before = len(waiting)
        for wanted in _looks(grid, waiting):
            replies = list(grid.pull_messages(wanted))
            waiting.difference_update([reply.metadata.reply_to_message_id for reply in replies])
            while replies:
                yield replies.pop(0)
        left = deadline - time.monotonic()
        if left <= 0:
            return
        pause_s = _SHORTEST_PAUSE_S if len(waiting) < before else min(1.5 * pause_s, _LONGEST_PAUSE_S)
        if waiting and pause(grid, min(pause_s, left), stop):
            raise RunError("the run was stopped")


@timed("network")
def pause(grid: Grid, seconds: float, stop: threading.Event) -> bool:
    """Let time pass between two looks for replies: on a grid in this process until there is one. True if `stop` is
    set."""
    if not isinstance(grid, LocalGrid):
        return stop.wait(seconds)
    grid.wait(seconds)
    return stop.is_set()


def _looks(grid: Grid, waiting: set[str]) -> Iterator[Iterable[str]]:
    """What to pull at once: so few that the replies in memory stay few. A grid in this process holds them back."""
    if isinstance(grid, LocalGrid):
        yield waiting
    else:
        ids = list(waiting)
        yield from (ids[first : first + _AT_ONCE] for first in range(0, len(ids), _AT_ONCE))
