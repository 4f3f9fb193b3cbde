"""Orders in every shape for the hospitals' app; what comes back is written to the run config's file `loot`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from common.records import PREPARE, TRAIN, PrepareInstruction, SiteReply, TrainInstruction
from common.wire import decode, encode

app = ServerApp()


def orders() -> Iterator[tuple[str, RecordDict]]:
    weights = {"w": np.zeros(3, dtype=np.float32)}
    yield PREPARE, encode(PrepareInstruction("{}", signer="", signature="", initial=weights))
    yield PREPARE, RecordDict()
    yield TRAIN, encode(TrainInstruction("0" * 64, initial_digest="", round=1, shared=weights))
    yield TRAIN, RecordDict({"fields": ConfigRecord({"path": "../state/ledger.sqlite"})})
    yield "train.steal", RecordDict()
    yield "evaluate", RecordDict()


@app.main()
def main(grid: Grid, context: Context) -> None:
    messages = [Message(content, node, kind) for node in grid.get_node_ids() for kind, content in orders()]
    said = [told(reply) for reply in grid.send_and_receive(messages, timeout=100)]
    Path(str(context.run_config["loot"])).write_text(json.dumps({"asked": len(messages), "said": said}))


def told(reply: Message) -> str:
    if reply.has_error():
        return f"error: {reply.error.reason}"
    answer = decode(reply.content, SiteReply)
    return f"{answer.code}: {len(answer.update)} arrays, {answer.ledger_rows} rows"
