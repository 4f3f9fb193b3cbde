"""Where a round's time went: spans of all processes, each without what lies deeper, and shares of a whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time

import pytest

from common import timing
from common.timing import PROFILE, profile_to, timed
from deploy.benchmarks.scale import consilium, make_sites
from server.profile import PARTS, TRACE, profile_of, profiled


def span(name: str, begin: float, end: float, thread: int = 1) -> dict:
    """Seconds."""
    return {"name": name, "ph": "X", "ts": begin * 1e6, "dur": (end - begin) * 1e6, "pid": 1, "tid": thread}


ROUND = [
    span("round", 0, 10),
    span("aggregate", 1, 9),
    span("network", 2, 8),  # the lab waits 6 s
    span("serialise", 8, 8.5),
    span("site", 2, 7, thread=2),
    span("load", 2, 3, thread=2),
    span("accounting", 2.5, 3, thread=2),
    span("forward/backward", 3, 6, thread=2),
    span("clip", 4, 5, thread=2),
    span("kernel", 5, 5.5, thread=2),  # no part of the table
]


def test_each_second_of_a_round_counts_once():
    found = profile_of(ROUND, jobs=1)
    assert found.rounds == 1
    expected = {"load": 0.5, "accounting": 0.5, "forward/backward": 1.5, "clip": 1.0, "noise": 0.0, "store": 0.0}
    expected |= {"serialise": 0.5, "network": 1.0, "aggregate": 1.5, "other": 2 + 1 + 0.5}
    assert found.seconds == pytest.approx(expected)
    assert found.whole == pytest.approx(10.0)


def test_two_sites_at_once_take_half_of_the_time_each():
    second = [{**one, "tid": 3} for one in ROUND if one["tid"] == 2]
    found = profile_of([*ROUND, *second], jobs=2)
    assert found.seconds == pytest.approx(profile_of(ROUND, jobs=1).seconds)


def test_what_lies_outside_of_the_rounds_does_not_count():
    outside = [span("site", 20, 30, thread=2), span("load", 21, 29, thread=2), span("evaluation", 40, 50)]
    assert profile_of([*ROUND, *outside], jobs=1) == profile_of(ROUND, jobs=1)


def test_nothing_is_written_where_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with timed("load"):
        pass
    assert PROFILE not in os.environ
    assert timing._spans is None
    assert not any(tmp_path.iterdir())


@timed("clip")
def clipped(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_threads_and_processes_leave_their_spans():
    with profiled(True, jobs=1) as recording:
        threads = [threading.Thread(target=clipped, args=(0.02,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other = multiprocessing.get_context("spawn").Process(target=clipped, args=(0.01,))
        other.start()
        other.join()
        with pytest.raises(ZeroDivisionError), timed("noise"):
            _ = 1 / 0
    assert sorted(one["name"] for one in recording.spans) == ["clip", "clip", "clip", "noise"]
    assert len({one["pid"] for one in recording.spans}) == 2
    assert len({(one["pid"], one["tid"]) for one in recording.spans}) >= 3
    assert all(one["dur"] >= 9_000 for one in recording.spans if one["name"] == "clip")
    profile_to(None)


def test_the_shares_of_a_federation_are_those_of_its_rounds(tmp_path):
    names = make_sites(tmp_path / "sites", 3)
    with profiled(True, jobs=1) as recording:
        ends = consilium(tmp_path / "sites", names, 2, private=True)
    found = recording.write(tmp_path / TRACE)
    assert list(found.seconds) == list(PARTS)
    assert found.rounds == 2
    assert found.whole == pytest.approx(ends[-1] - ends[0], rel=0.2)
    always = {"forward/backward", "clip", "noise", "accounting", "serialise", "store", "aggregate"}
    assert {part for part, seconds in found.seconds.items() if seconds > 0} >= always
    events = json.loads((tmp_path / TRACE).read_text())["traceEvents"]
    assert {"round", "site", "load"} <= {event["name"] for event in events}
    assert all(event.keys() == {"name", "ph", "ts", "dur", "pid", "tid"} for event in events)
