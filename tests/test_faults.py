"""Everything is killed at random; what was promised still holds."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.release_store import ReleaseStore
from common.accounting import epsilon
from common.plan import load_plan
from deploy.local_federation import LocalFederation, local_federation, wait_for
from tests.test_deployment import SITES, folder, write_study

__all__ = ["folder"]  # a fixture

KILLS, ROUNDS = 12, 4
PROGRAMS = (
    "server.cli serve",
    "flower-superlink",
    "flower-superexec",  # the lab's
    "flwr-serverapp",
    "client.cli start",
    "client.cli worker",
    "client.supernode",
    "client.app_process",
)


def processes(below: Path) -> Iterator[tuple[int, str]]:
    """(pid, command line) of every process of this federation: its environment or arguments name the folder."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            place = line + os.readlink(entry / "cwd")
        except OSError:
            continue
        if str(below) in place and int(entry.name) != os.getpid():
            yield int(entry.name), line


def kill_one(federation: LocalFederation, chance: random.Random) -> str | None:
    """Kill -9 a process of a kind drawn at random; what supervises services then starts them again."""
    for program in chance.sample(PROGRAMS, len(PROGRAMS)):
        victims = [pid for pid, line in processes(federation.folder) if program in line.replace("-m ", "")]
        if victims:
            try:
                os.kill(chance.choice(victims), signal.SIGKILL)
            except ProcessLookupError:
                continue
            return program
    return None


def supervise(federation: LocalFederation) -> None:
    """What systemd does at a lab and at hospitals."""
    for name, process in list(federation.running.items()):
        if process.poll() is not None:
            if name == "lab":
                federation.start_lab()
            else:
                federation.start_site(name)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_at_random_moments_lose_no_round_and_charge_none_twice(folder: Path) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    chance, killed = random.Random(seed), []
    study = write_study(
        folder, "faults", rounds=ROUNDS, quorum=1, round_timeout_s=30, privacy={"epsilon": 8, "clip": 1.0}
    )
    with local_federation(folder, SITES) as federation:
        run = federation.run(study, minutes=5)
        for site in SITES:
            federation.approve(site, study, by_command=False)
        wait_for("the first round", lambda: len(federation.history("faults")) > 1)
        while len(killed) < KILLS:
            if victim := kill_one(federation, chance):
                killed.append(victim)
            time.sleep(chance.uniform(0.2, 3.0))
            supervise(federation)
        deadline = time.monotonic() + 1000
        while len(federation.history("faults")) <= ROUNDS or run.poll() is None:
            assert time.monotonic() < deadline, f"seed {seed}: {killed}\n{federation.logs()}"
            supervise(federation)
            if run.poll() is not None and len(federation.history("faults")) <= ROUNDS:
                run = federation.run(study, minutes=5)  # the same command goes on
            time.sleep(0.5)
        promises_hold(federation, study, f"seed {seed}: {killed}")


def promises_hold(federation: LocalFederation, study: Path, story: str) -> None:
    plan, records = load_plan(study), federation.history("faults")
    assert [record["round"] for record in records] == list(range(ROUNDS + 1)), story
    for record in records[1:]:
        assert sorted({site["site"] for site in record["sites"]} & set(SITES)) == sorted(SITES), story
    for site in SITES:
        state = federation.folder / site / "state"
        ledger, releases = Ledger.existing(state), ReleaseStore(state / "releases" / plan.digest)
        charged = [charge.round for charge in ledger.charges()]
        assert len(charged) == len(set(charged)), story
        assert ledger.spent() == pytest.approx(epsilon([c.event for c in ledger.charges()], ledger.terms.delta))
        outcomes = {r["round"]: o for r in records[1:] for o in r["sites"] if o["site"] == site and o["code"] == "ok"}
        for number, outcome in outcomes.items():  # what the lab took was charged and stored, and is what it took
            release = releases.load(number)
            assert number in charged, story
            assert release is not None, story
            assert (outcome["ledger_rows"], outcome["ledger_head"]) == (release.ledger_rows, release.ledger_head), story
        seen = [outcomes[number]["ledger_rows"] for number in sorted(outcomes)]
        assert seen == sorted(seen), story
    assert json.loads((federation.lab / "runs" / "faults" / "outcome.json").read_text()) == {"error": ""}, story
