"""Flower's Grid in one process: no server, no Ray, milliseconds a round.

Each message is a call of the ClientApp in a thread of its own, at most `jobs` at once, one at a time for each node. A
call that is still busy when its message expires is left to itself: its result is dropped and its place is free again.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN_ID = 1


class LocalGrid(Grid):
    """`nodes` virtual nodes that all run `client_app`; node i has partition-id i and keeps its Context."""

    def __init__(self, client_app: ClientApp, *, nodes: int, jobs: int = 1) -> None:
        self._app, self._jobs = client_app, jobs
        self._contexts = {node: _context(node, nodes) for node in range(1, nodes + 1)}  # 0 is no node id
        self._busy = {node: threading.Lock() for node in self._contexts}
        self._replies: dict[str, Message] = {}  # by the id of the message that is answered
        # Message() takes its sender from here
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, SUPERLINK_NODE_ID, 1
        self._run = Run.create_empty(run_id=_RUN_ID)

    @property
    def run(self) -> Run:
        """The one run of this grid."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Take another run's description."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's deprecated way to make a Message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Every node; they are always online."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Begin to serve the messages; their ids, in order."""
        places = threading.Semaphore(self._jobs)  # new in each batch: one that is left to itself takes no place away
        batch = list(messages)
        for message in batch:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            threading.Thread(target=self._serve, args=(message, places), daemon=True).start()
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; each is given once."""
        found = (self._replies.pop(message_id, None) for message_id in list(message_ids))
        return [reply for reply in found if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until all is answered or `timeout` seconds are over."""
        waiting, replies = set(self.push_messages(messages)), []
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting and time.monotonic() < deadline:
            replies += self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            time.sleep(0.002)
        return replies

    def _serve(self, message: Message, places: threading.Semaphore) -> None:
        busy = self._busy[message.metadata.dst_node_id]
        if not busy.acquire(timeout=_left_s(message)):
            return
        try:
            if places.acquire(timeout=_left_s(message)):
                reply = self._call(message)
                places.release()
                if _left_s(message) > 0:
                    self._replies[message.metadata.message_id] = reply
        finally:
            busy.release()

    def _call(self, message: Message) -> Message:
        try:
            reply = self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception:  # its text may hold patient data: it stays here
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        return reply


def _context(node: int, nodes: int) -> Context:
    config: UserConfig = {PARTITION_ID_KEY: node - 1, NUM_PARTITIONS_KEY: nodes}
    return Context(run_id=_RUN_ID, node_id=node, node_config=config, state=RecordDict(), run_config={})


def _left_s(message: Message) -> float:
    """Seconds until the message expires, at least 0."""
    return max(0.0, message.metadata.created_at + message.metadata.ttl - time.time())
