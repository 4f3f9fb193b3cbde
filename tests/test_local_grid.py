"""Flower's Grid in one process: what Flower's own strategies and ours need of it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from server.local_grid import LocalGrid


class Site:
    """A ClientApp that answers with its partition, after what the test does to it."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.hold = threading.Event()
        self.hold.set()
        self.held_node = 0

    def app(self) -> ClientApp:
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            with self.lock:
                self.calls.append(context.node_id)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            if self.held_node in (0, context.node_id):
                self.hold.wait(10)
            time.sleep(0.01)
            with self.lock:
                self.at_once -= 1
            seen = int(context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"]) + 1
            context.state["seen"] = ConfigRecord({"n": seen})
            answer = ConfigRecord({**context.node_config, "seen": seen})
            return Message(RecordDict({"answer": answer}), reply_to=message)

        @app.train("breaks")
        def breaks(message: Message, context: Context) -> Message:
            raise ValueError("patient 4711")

        return app


def messages(grid: LocalGrid, kind: str = "train", ttl: float = 5.0) -> list[Message]:
    return [Message(RecordDict(), node, kind, ttl=ttl) for node in grid.get_node_ids()]


def test_every_node_answers_for_itself_and_keeps_its_state():
    grid = LocalGrid(Site().app(), nodes=3)
    for seen in (1, 2):
        sent = messages(grid)
        ids = grid.push_messages(sent)
        replies = collect(grid, ids)
        assert {reply.metadata.reply_to_message_id for reply in replies} == set(ids)
        answers = sorted(tuple(dict(reply.content["answer"]).items()) for reply in replies)
        assert [dict(a) for a in answers] == [{"partition-id": i, "num-partitions": 3, "seen": seen} for i in range(3)]


def collect(grid: LocalGrid, ids: list[str], seconds: float = 5.0) -> list[Message]:
    replies: list[Message] = []
    deadline = time.monotonic() + seconds
    while len(replies) < len(ids) and time.monotonic() < deadline:
        replies += grid.pull_messages(ids)
        time.sleep(0.005)
    return replies


def test_metadata():
    grid = LocalGrid(Site().app(), nodes=2)
    [sent, _] = messages(grid)
    [message_id] = grid.push_messages([sent])
    [reply] = collect(grid, [message_id])
    assert sent.metadata.message_id == message_id != ""
    assert reply.metadata.reply_to_message_id == message_id
    assert reply.metadata.message_id not in ("", message_id)
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (1, sent.metadata.src_node_id)
    assert reply.metadata.run_id == sent.metadata.run_id == grid.run.run_id
    assert grid.pull_messages([message_id]) == []  # given once


def test_a_message_needs_an_identity_and_the_grid_gives_it(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    with pytest.raises(RuntimeError, match=r"TaskIdentity\..* is not set"):
        Message(RecordDict(), 1, "train")
    grid = LocalGrid(Site().app(), nodes=1)
    assert Message(RecordDict(), 1, "train").metadata.run_id == grid.run.run_id
    assert grid.create_message(RecordDict(), "train", 1, "g").metadata.group_id == "g"


def test_an_exception_becomes_an_error_without_its_text():
    grid = LocalGrid(Site().app(), nodes=1)
    [reply] = collect(grid, grid.push_messages(messages(grid, "train.breaks")))
    assert reply.has_error()
    assert (reply.error.code, reply.error.reason) == (2, None)
    assert "4711" not in repr(reply)


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_than_jobs_at_once(jobs):
    site = Site()
    grid = LocalGrid(site.app(), nodes=5, jobs=jobs)
    assert len(collect(grid, grid.push_messages(messages(grid)))) == 5
    assert site.most_at_once == jobs


def test_a_hung_node_takes_neither_place_nor_time_from_the_next_round():
    site = Site()
    site.hold.clear()
    site.held_node = 1
    grid = LocalGrid(site.app(), nodes=2, jobs=2)
    first = grid.push_messages(messages(grid, ttl=0.2))
    assert len(collect(grid, first, seconds=0.4)) == 1
    grid._jobs = 1
    second = grid.push_messages(messages(grid, ttl=0.2))
    assert [r.metadata.src_node_id for r in collect(grid, second, seconds=0.4)] == [2]
    site.hold.set()
    time.sleep(0.1)
    assert grid.pull_messages([*first, *second]) == []  # what came too late is dropped
    assert site.calls.count(1) == 1  # the second message expired and was never begun
    third = grid.push_messages(messages(grid))
    assert len(collect(grid, third)) == 2


def test_flowers_own_strategy_runs_on_it():
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        value = message.content.array_records["arrays"]["w"].numpy() + int(context.node_config["partition-id"])
        content = RecordDict({"arrays": ArrayRecord({"w": Array(value)}), "m": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3)
    start = ArrayRecord({"w": Array(np.zeros(2, dtype=np.float32))})
    result = strategy.start(LocalGrid(app, nodes=3), start, num_rounds=2, timeout=10)
    assert result.arrays["w"].numpy() == pytest.approx([2.0, 2.0])  # the mean of 0, 1, 2, twice
