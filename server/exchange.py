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
from common.wire import encode, with_fields

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 1.0  # between two looks for replies


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
        replies = list(grid.pull_messages(set(waiting)))
        waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        yield from replies
        left = deadline - time.monotonic()
        if left <= 0:
            return
        pause_s = _SHORTEST_PAUSE_S if replies else min(1.5 * pause_s, _LONGEST_PAUSE_S)
        if waiting and stop.wait(min(pause_s, left)):
            raise RunError("the run was stopped")
