"""kill -9 of a running federation at random moments, again and again, and going on each time."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest

from common.params import to_arrays
from server.run_folder import final_parameters, run_history, starting_parameters
from tests.fake_federation import expected, run_to_the_end

ROUNDS = 40
KILLED_UNTIL = 30  # round; after it the run may come to its end


@pytest.mark.slow
@pytest.mark.timeout(300)  # seconds each start, where another test began the process's fork server
def test_a_run_survives_kills_at_any_moment(make_plan, tmp_path: Path):
    plan = make_plan(rounds=ROUNDS)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.fake_federation"])
    seen = kills = 0
    while True:
        process = processes.Process(target=run_to_the_end, args=(plan.to_json(), tmp_path, 0.005))
        (tmp_path / ".round-9999.safetensors.1.tmp").touch()  # as a kill during a write leaves it
        process.start()
        done = _rounds(tmp_path)
        if done < KILLED_UNTIL:
            deadline = time.monotonic() + 30
            while process.is_alive() and _rounds(tmp_path) == done and time.monotonic() < deadline:
                time.sleep(0.001)  # so that each start gets somewhere
            time.sleep(random.uniform(0, 0.06))
            process.kill()
            kills += 1
        process.join(60)
        history = run_history(tmp_path)
        assert [record.round for record in history] == list(range(_rounds(tmp_path)))
        assert len(history) >= seen
        seen = len(history)
        if process.exitcode == 0:
            break
    assert kills >= 3
    assert seen == ROUNDS + 1
    start, final = to_arrays(starting_parameters(tmp_path)), to_arrays(final_parameters(tmp_path))
    moved = {name: value for name, value in start.items() if not (value == final[name]).all()}
    for name, value in expected(moved, ROUNDS, sites=3).items():
        assert final[name] == pytest.approx(value, abs=1e-4)
    for site in plan.training_sites:  # each round was charged once, and none was charged without being asked for
        assert (tmp_path / "fakes" / f"{site}.ledger").read_text().split() == [str(i) for i in range(1, ROUNDS + 1)]
    rows = [outcome.ledger_rows for record in history for outcome in record.sites if outcome.site == "alder"]
    assert rows == sorted(rows)
    assert not list(tmp_path.glob(".*.tmp")), "a temporary file was left"


def _rounds(folder: Path) -> int:
    return len(list(folder.glob("round-*.safetensors")))
