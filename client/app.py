"""The thin Flower ClientApp: Message -> worker -> Message.

It holds no data and imports no torch. An exception here would travel to the server word for word, so none does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.errors import BadInstruction, InternalFailure
from common.records import (
    PREPARE,
    TRAIN,
    MalformedRecord,
    PrepareInstruction,
    SiteReply,
    TrainInstruction,
    decode,
    encode,
)


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
        reply = SiteReply(site="", code=BadInstruction.code, reason=BadInstruction.public_reason)
    except Exception:
        reply = SiteReply(site="", code=InternalFailure.code, reason=InternalFailure.public_reason)
    return Message(encode(reply), reply_to=message)


_workers: dict[Path, SiteWorker] = {}  # warm ones of this process, by site folder


def _worker_of_node(context: Context) -> SiteWorker:
    """The worker of the site folder that this node was started with (`--node-config 'site-folder="..."'`)."""
    from client.site import load_site_config
    from client.worker import Worker  # torch, and the site's data: only where a message asks for them

    folder = Path(str(context.node_config["site-folder"])).resolve()
    if folder not in _workers:
        _workers[folder] = Worker(folder, state=folder / load_site_config(folder).state)
    return _workers[folder]


app = build_client_app(_worker_of_node)
