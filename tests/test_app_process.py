"""The node's ClientApp process before a real SuperNode's Runtime API: messages that come whole, strange, or never."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.retry.http_retry import RunNotRunningException
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.start_client_internal import _pull_and_store_message

from deploy.local_federation import ROOT, free_ports
from tests.conftest import soon

SECRET = bytes(range(32))
APP = """
import os, sys
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from client.app_process import answer_messages
app = ClientApp()
@app.train()
def train(message, context):
    if message.content["order"]["what"] == "die":
        os._exit(1)
    print(os.getpid(), os.getppid(), flush=True)
    return Message(RecordDict(), reply_to=message)
answer_messages(sys.argv[1], bytes.fromhex(sys.argv[2]), app)
"""


class SuperNode:
    """Flower's own node without a SuperLink: the test hands it messages, and reads the replies that it would send."""

    def __init__(self) -> None:
        stores = ObjectStoreFactory()
        self.factory = NodeStateFactory(objectstore_factory=stores)
        self.state, self.store = self.factory.state(), stores.store()
        self.state.set_node_id(7)
        self.given: dict[int, Message] = {}
        content = build_fab_from_disk(ROOT / "deploy" / "fab")
        self.fab = Fab(hashlib.sha256(content).hexdigest(), content, {})

    def receive(self, run: int, what: str = "", *, kind: str = "train", stopped: bool = False) -> None:
        """A message of the run; `stopped` before its arrays came."""
        message = Message(RecordDict({"order": ConfigRecord({"what": what})}), 7, kind)
        message.metadata.__dict__["_run_id"] = run
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = {id_: item.deflate() for id_, item in get_all_nested_objects(message).items()}
        tree = get_object_tree(message)

        def pull(run_id: int, id_: str) -> bytes:
            if stopped:
                raise RunNotRunningException
            return objects[id_]

        info = Run.create_empty(run)
        info.fab_hash = self.fab.hash_str
        _pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, tree),
            get_run=lambda run_id: info,
            get_fab=lambda hash_, run_id: self.fab,
            pull_object=pull,
            confirm_message_received=lambda run_id, id_: None,
            trusted_entities=None,
        )

    def replies(self) -> dict[int, Message]:
        """By run; Flower gives each out once."""
        self.given |= {reply.metadata.run_id: reply for reply in self.state.get_messages_legacy(is_reply=True)}
        return self.given


@contextmanager
def served(node: SuperNode, port: int) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(create_app(node.factory, SECRET), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert soon(lambda: server.started)
        yield
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[int]:
    """The port on which a SuperNode is expected by the process."""
    (port,) = free_ports(1)
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", APP, f"127.0.0.1:{port}", SECRET.hex()], cwd=ROOT, stdout=said
        )
    yield port
    assert process.poll() is None, "it ended"
    process.terminate()
    process.wait(10)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):  # what Flower wants of whoever makes a message
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_every_message_has_a_warm_process_of_its_own_and_none_waits_for_another(answering: int, tmp_path: Path) -> None:
    node = SuperNode()
    with served(node, answering):
        node.receive(1, stopped=True)  # its arrays never come
        node.receive(2, "die")
        node.receive(3)
        node.receive(4, kind="train.steal")
        node.receive(5)
        assert soon(lambda: {3, 4, 5} <= node.replies().keys(), timeout_s=60)
    assert node.given[4].error.reason == "this hospital's app does not answer such a message"
    assert 1 not in node.given
    processes, parents = zip(*map(str.split, (tmp_path / "said").read_text().splitlines()), strict=True)
    assert len(set(processes)) == 2
    assert len(set(parents)) == 1


def test_a_supernode_that_starts_again_is_found_at_once(answering: int) -> None:
    for run in (1, 2):
        node = SuperNode()
        with served(node, answering):
            node.receive(run)
            assert soon(lambda: run in node.replies(), timeout_s=40)  # noqa: B023
