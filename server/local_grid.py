"""Flower's Grid in one process: no server, no Ray, milliseconds a round.

Each message is a call of the ClientApp, at most `jobs` at once in as many threads, one at a time for each node. Nodes
wait while a few replies lie here that nobody took: so memory does not grow with their number. A call that is still busy
when its message expires is left to itself: its result is dropped, and the next messages have threads of their own.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Set

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN_ID = 1
_AHEAD = 8  # replies that may lie here beside those that are being made
_BUSY_PAUSE_S = 0.005


class LocalGrid(Grid):
    """`nodes` virtual nodes that all run `client_app`; node i has partition-id i and keeps its Context."""

    def __init__(self, client_app: ClientApp, *, nodes: int, jobs: int = 1) -> None:
        self._app, self._jobs = client_app, jobs
        self._contexts = {node: _context(node, nodes) for node in range(1, nodes + 1)}  # 0 is no node id
        self._busy = {node: threading.Lock() for node in self._contexts}
        self._replies: dict[str, tuple[Message, threading.Semaphore]] = {}  # by the id of what is answered; its room
        self._arrived = threading.Event()
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
        batch, ids = deque(messages), []
        for message in batch:
            ids.append(str(uuid.uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]
        room = threading.Semaphore(
            self._jobs + _AHEAD
        )  # new in each batch: replies that nobody takes have no later one's
        for _ in range(min(self._jobs, len(ids))):
            threading.Thread(target=self._serve, args=(batch, room), daemon=True).start()
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there; each is given once."""
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        self._arrived.clear()
        found = [self._replies.pop(message_id) for message_id in list(self._replies) if message_id in wanted]
        for _, room in found:
            room.release()
        return [reply for reply, _ in found]

    def wait(self, seconds: float) -> None:
        """Until a reply is there, `seconds` at most."""
        self._arrived.wait(seconds)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until all is answered or `timeout` seconds are over."""
        waiting, replies = set(self.push_messages(messages)), []
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while waiting and time.monotonic() < deadline:
            replies += self.pull_messages(waiting)
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            self.wait(0.05)
        return replies

    def _serve(self, batch: deque[Message], room: threading.Semaphore) -> None:
        """One message of the batch after the other, until none is left."""
        while batch:
            try:
                message = batch.popleft()
            except IndexError:  # another thread was faster
                return
            busy = self._busy[message.metadata.dst_node_id]
            if not _left_s(message):
                continue
            if not busy.acquire(blocking=False):  # with a message of an earlier batch: the others first
                batch.append(message)
                time.sleep(_BUSY_PAUSE_S)
                continue
            try:
                if room.acquire(timeout=_left_s(message)):
                    self._answer(message, room)
            finally:
                busy.release()

    def _answer(self, message: Message, room: threading.Semaphore) -> None:
        reply = self._call(message)
        if not _left_s(message):
            room.release()
            return
        self._replies[message.metadata.message_id] = reply, room
        self._arrived.set()

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
