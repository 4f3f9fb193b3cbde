"""Many sites: what is held at once does not grow with their number, and a round costs no more a site for it."""

from __future__ import annotations

import gc
import threading
import weakref
from itertools import count

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client.worker
import server.simulation
from common.params import digest
from common.plan import StudyPlan
from common.records import SiteReply, TrainInstruction
from common.wire import decode, encode
from deploy.benchmarks.scale import ENGINES, Row, consilium, make_sites, plan_of, rounds_of, table, too_long
from server.exchange import collect, send
from server.history import read_history
from server.local_grid import LocalGrid
from server.simulation import SharedSites, SimulatedSite, drive
from tests.fake_federation import FakeSites, fake_federation


def test_few_replies_are_alive_at_once_however_many_sites_there_are():
    """A reply is made only when there is room, and whoever took one has let go of it before the next."""
    made: list[weakref.ref[Message]] = []
    most, app, reply_of = 0, ClientApp(), encode(SiteReply("a", "ok"))

    def alive() -> int:
        return sum(reference() is not None for reference in made)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        nonlocal most
        reply = Message(reply_of, reply_to=message)
        made.append(weakref.ref(reply))
        most = max(most, alive())
        return reply

    sites, jobs = 200, 2
    grid = LocalGrid(app, nodes=sites, jobs=jobs)
    instruction = encode(TrainInstruction("p", "i", 1, {}))
    sent = send(grid, [Message(instruction, node, "train", ttl=60.0) for node in grid.get_node_ids()])
    seen = sum(
        decode(reply.content, SiteReply).ok for reply in collect(grid, sent, timeout_s=60, stop=threading.Event())
    )
    gc.collect()
    assert seen == sites
    assert jobs <= most <= 2 * (jobs + 8) + jobs
    assert alive() <= 1


def test_another_grid_is_asked_for_few_replies_at_once():
    class Remote:
        """A grid where everything is answered already."""

        def __init__(self) -> None:
            self.asked: list[int] = []

        def pull_messages(self, message_ids) -> list[Message]:
            self.asked.append(len(list(message_ids)))
            return []

    grid = Remote()
    assert list(collect(grid, map(str, range(150)), timeout_s=0.0, stop=threading.Event())) == []  # type: ignore[arg-type]
    assert grid.asked == [64, 64, 22]


def test_a_plan_is_read_once_for_all_sites_and_a_round_reads_none(tmp_path, monkeypatch):
    """With a plan that names every site, reading it at each would be quadratic."""
    names, read = make_sites(tmp_path / "sites", 12), count()
    plan_from_json = client.worker.plan_from_json
    client.worker._plan_in.cache_clear()
    monkeypatch.setattr(client.worker, "plan_from_json", lambda text: (next(read), plan_from_json(text))[1])
    monkeypatch.setattr(server.simulation, "_WARM", 3)  # the others are opened again in the round
    ends = consilium(tmp_path / "sites", names, 2)
    assert len(ends) == 3
    assert next(read) == 1
    history = read_history(tmp_path / "run", last_round=2)
    assert [site.status for record in history for site in record.sites] == ["ok"] * 36


def test_few_sites_are_warm_and_the_rest_is_opened_again(tmp_path, monkeypatch):
    """The same release comes from a site that was closed in between: the instruction decides, not who is warm."""
    monkeypatch.setattr(server.simulation, "_WARM", 1)
    plan = plan_of(make_sites(tmp_path / "sites", 2), rounds=1, private=True)
    instruction = server.simulation.PrepareInstruction(plan.to_json(), "", "", _initial(plan, tmp_path))
    sites = [
        SimulatedSite(name=name, data=tmp_path / "sites" / name, run=tmp_path / "run") for name in plan.training_sites
    ]
    replies = [site.prepare(instruction) for site in sites]
    assert [reply.ok for reply in replies] == [True, True]
    warm = [state for state in server.simulation._workers if state.is_relative_to(tmp_path)]
    assert warm == [sites[1].state]
    train = TrainInstruction(plan.digest, digest(instruction.initial), 1, instruction.initial)
    first = sites[0].train(train)
    sites[1].train(train)
    again = sites[0].train(train)
    assert first.ok
    assert first.ledger_rows == again.ledger_rows == 1  # charged once
    assert all(np.array_equal(first.update[name], again.update[name]) for name in first.update)


def test_a_site_may_cool_down_whenever_another_thread_trains(tmp_path, monkeypatch):
    """Its worker is asked for and taken in one step: between two, another site's may push it out."""

    class Pushed(dict):
        def __contains__(self, state):
            there = super().__contains__(state)
            self.clear()
            return there

    monkeypatch.setattr(server.simulation, "_workers", Pushed())
    plan = plan_of(make_sites(tmp_path / "sites", 1), rounds=1, private=True)
    instruction = server.simulation.PrepareInstruction(plan.to_json(), "", "", _initial(plan, tmp_path))
    name = plan.training_sites[0]
    site = SimulatedSite(name=name, data=tmp_path / "sites" / name, run=tmp_path / "run")
    assert site.prepare(instruction).ok
    assert site.train(TrainInstruction(plan.digest, digest(instruction.initial), 1, instruction.initial)).ok


def _initial(plan: StudyPlan, folder):
    from common.params import to_arrays
    from server.start import initial_parameters, travelling

    return to_arrays(travelling(plan, initial_parameters(plan, folder)))


def test_images_are_read_once_and_those_used_last_are_kept(tmp_path, monkeypatch):
    names = make_sites(tmp_path, 3)
    plan, read = plan_of(names, rounds=1, private=False), count()
    load = server.simulation.load_site
    monkeypatch.setattr(server.simulation, "load_site", lambda *args, **named: (next(read), load(*args, **named))[1])
    shared = SharedSites(most_bytes=2 * 8 * (28 * 28 + 1024))
    first = shared(tmp_path / names[0], plan, site=names[0])
    assert shared(tmp_path / names[0], plan, site=names[0]) is first
    assert next(read) == 1
    other = plan.model_copy(update={"rounds": 2})
    assert shared(tmp_path / names[0], other, site=names[0]) is first  # whatever federation asks
    for name in names[1:]:
        shared(tmp_path / name, plan, site=name)
    assert shared(tmp_path / names[2], plan, site=names[2]).site == names[2]
    before = next(read)
    assert shared(tmp_path / names[0], plan, site=names[0]) is not first  # the third took its place
    assert next(read) == before + 2
    (tmp_path / names[0] / "site.yaml").touch()
    assert shared(tmp_path / names[0], plan, site=names[0]).site == names[0]
    assert next(read) == before + 4  # a file that changed is read anew


def test_a_copy_of_a_plan_forgets_what_was_computed_from_the_old_one():
    plan = plan_of(["a", "b"], rounds=1, private=False)
    assert plan.training_sites == ("a", "b")
    changed = plan.model_copy(update={"sites": {"a": plan.sites["a"]}, "quorum": 1})
    assert changed.training_sites == ("a",)
    assert changed.digest != plan.digest
    assert (
        changed.digest
        == StudyPlan.model_validate(
            plan.model_dump() | {"sites": {"a": plan.sites["a"].model_dump()}, "quorum": 1, "privacy": "none"}
        ).digest
    )


def test_only_the_trainable_part_travels(make_plan, tmp_path):
    """FiLM alone: bytes of a round's instruction and reply beside those of the whole network."""
    sizes = {}
    for trainable in ("film", "all"):
        plan = make_plan(rounds=1, model={"name": "conv4", "width": 32, "trainable": trainable})
        sites, seen = FakeSites(tmp_path / trainable / "fakes", plan.training_sites), []
        app = sites.app()

        def weighed(message: Message, context: Context, app=app, seen=seen) -> Message:
            reply = app(message, context)
            if message.metadata.message_type == "train.round":
                seen.extend(len(m.content.array_records["arrays"]["arrays"].data) for m in (message, reply))
            return reply

        drive(fake_federation(plan, tmp_path / trainable), weighed, engine="local")  # type: ignore[arg-type]
        sizes[trainable] = set(seen)
    film, whole = max(sizes["film"]), min(sizes["all"])
    assert film < 4 * 2 * 4 * 32 + 2_500  # four blocks, scale and shift, float32; and names
    assert whole > 4 * 3 * 9 * 32 * 32


def test_the_table_of_the_benchmark():
    rows = [Row("plain loop", 10, [2.0, 1.0, 3.0], 9.0, 300.0), Row("Consilium", 10, [2.2], 9.0, 310.4)]
    lines = list(table(rows, ["pfl-research is not installed."]))
    assert lines[4:6] == [
        "| 10 | plain loop | 2 | 200.00 | 1.00 | 300 |",
        "| 10 | Consilium | 2.2 | 220.00 | 1.10 | 310 |",
    ]
    assert lines[-1] == "pfl-research is not installed."
    assert too_long(rows[1], sites=1000, limit_s=60)
    assert not too_long(rows[1], sites=50, limit_s=60)
    assert rounds_of(10) > rounds_of(10_000) >= 2


@pytest.mark.parametrize("engine", ["plain loop", "Consilium"])
def test_the_engines_of_the_benchmark_do_the_same_work(engine, tmp_path):
    names = make_sites(tmp_path / "sites", 3)
    assert len(ENGINES[engine](tmp_path / "sites", names, 2)) == 3


def test_the_names_of_nodes_are_asked_for_once_and_not_for_each_reply(tmp_path, monkeypatch):
    """Listing all nodes again for each answer would be quadratic, as it was."""
    names, listed = make_sites(tmp_path / "sites", 12), count()
    nodes = LocalGrid.get_nodes
    monkeypatch.setattr(LocalGrid, "get_nodes", lambda grid: (next(listed), nodes(grid))[1])
    consilium(tmp_path / "sites", names, 1)
    assert next(listed) == 1
