"""The thin Flower ClientApp: Message -> worker -> Message.

It holds no data and imports no torch. An exception here would travel to the server word for word, so none does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.wall import WorkerProxy
from common.errors import BadInstruction, InternalFailure, Refusal, WorkerUnavailable
from common.records import (
    PREPARE,
    TRAIN,
    MalformedRecord,
    PrepareInstruction,
    SiteReply,
    TrainInstruction,
)
from common.wire import decode, encode


class SiteWorker(Protocol):
    """What the app asks of a site's worker; `client.worker.Worker` in process."""

    def prepare(self, instruction: PrepareInstruction) -> SiteReply: ...

    def train(self, instruction: TrainInstruction) -> SiteReply: ...


def build_client_app(worker_for: Callable[[Context], SiteWorker]) -> ClientApp:
    """A ClientApp whose handlers pass each message to `worker_for(context)`."""
    app = ClientApp()

    @app.query(PREPARE.split(".")[1])
    def prepare(message: Message, context: Context) -> Message:
        return _answer(message, lambda: worker_for(context).prepare(decode(message.content, PrepareInstruction)))

    @app.train(TRAIN.split(".")[1])
    def train(message: Message, context: Context) -> Message:
        return _answer(message, lambda: worker_for(context).train(decode(message.content, TrainInstruction)))

    return app


def _answer(message: Message, compute: Callable[[], SiteReply]) -> Message:
    try:
        reply = compute()
    except MalformedRecord:
        reply = _refusal(BadInstruction)
    except WorkerUnavailable:
        reply = _refusal(WorkerUnavailable)
    except Exception:
        reply = _refusal(InternalFailure)
    return Message(encode(reply), reply_to=message)


def _worker_of_node(context: Context) -> SiteWorker:
    """The worker behind the socket that this node was started with (`--node-config 'socket="..."'`)."""
    return WorkerProxy(Path(str(context.node_config["socket"])))


def _refusal(kind: type[Refusal]) -> SiteReply:
    return SiteReply(site="", code=kind.code, reason=kind.public_reason)


app = build_client_app(_worker_of_node)
