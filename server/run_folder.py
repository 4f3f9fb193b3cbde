"""One run on disk.

    lock                    held by the one process that may write here
    plan.json               the study plan, canonical
    initial.safetensors     the whole body (and a shared head) from which the run starts; names the study
    history.jsonl           one line a round
    round-0000.safetensors  shared parameters and outer optimiser after each round; 0 is the start

A round's checkpoint is its commit: the newest one says where the run stands.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import load_checkpoint, save_checkpoint, shapes
from common.errors import CheckpointError, Problem, RunError, UsageError
from common.files import write_atomically
from common.params import Params, digest, select, to_arrays
from common.plan import StudyPlan, plan_from_json
from server.history import RoundRecord, append_record, checkpoint_path, last_round, read_history, resume_history
from server.outer_optimizer import initial_state

_LOCK, _PLAN, _INITIAL = "lock", "plan.json", "initial.safetensors"
_PLAN_DIGEST, _INITIAL_DIGEST, _ROUND = "plan", "initial", "round"  # metadata keys


@dataclass(frozen=True)
class RunState:
    """Where a run stands after its last committed round."""

    shared: Params
    outer: Params  # the outer optimiser's state
    records: tuple[RoundRecord, ...]  # of rounds 0 to `round`; empty before the start is committed

    @property
    def round(self) -> int:
        """The last committed round; -1 before the start."""
        return len(self.records) - 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process. Raises RunError if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another process is running in this run folder"
            raise RunError(str(Problem(str(folder), what, "wait for it, stop it, or take another folder"))) from None
        yield  # the lock goes with the open file, also after a kill


def open_run(folder: Path, plan: StudyPlan, *, initial: Params, shared: tuple[str, ...], resume: bool) -> RunState:
    """Begin a run in `folder`, or with `resume` go on from its newest checkpoint.

    `initial` is the whole starting point and `shared` the names in it that travel. What was not committed is removed:
    the caller holds the lock.
    Raises UsageError if the folder holds another study, or this one and `resume` is false; CheckpointError.
    """
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while writing
        leftover.unlink()
    _claim(folder, plan, initial)
    start = select(initial, shared)
    done = last_round(folder)
    if done is None:
        return RunState(start, initial_state(start, plan.outer), resume_history(folder, last_round=None))
    if not resume:
        what = f"this run folder holds this study's run, at round {done} of {plan.rounds}"
        raise UsageError(Problem(str(folder), what, "go on with --resume, or take another folder"))
    tensors = _load_round(folder, done, shapes(start | initial_state(start, plan.outer)), _origin(plan, initial))
    outer = {name: value for name, value in tensors.items() if name not in start}
    return RunState(select(tensors, shared), outer, resume_history(folder, last_round=done))


def commit(folder: Path, record: RoundRecord, tensors: Params, origin: dict[str, str]) -> None:
    """Write a round: first its line, then its checkpoint; it happened if and only if both are there.

    Raises CheckpointError; the round before it is then still the last.
    """
    append_record(folder, record)
    save_checkpoint(checkpoint_path(folder, record.round), tensors, {**origin, _ROUND: str(record.round)})


def origin_of(plan: StudyPlan, initial_digest: str) -> dict[str, str]:
    """The metadata that binds a checkpoint to its study."""
    return {_PLAN_DIGEST: plan.digest, _INITIAL_DIGEST: initial_digest}


def run_plan(folder: Path) -> StudyPlan:
    """The plan of the run in `folder`. Raises UsageError if there is none."""
    try:
        return plan_from_json((folder / _PLAN).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(Problem(str(folder), f"holds no run ({type(error).__name__})", "check the path")) from None


def run_history(folder: Path) -> tuple[RoundRecord, ...]:
    """The records of every committed round, the start first; empty before it. Safe beside a running run."""
    done = last_round(folder)
    return () if done is None else read_history(folder, last_round=done)


def final_parameters(folder: Path, *, round: int | None = None) -> Params:
    """The whole body (and a shared head) after the last committed round, or after `round`.

    Raises CheckpointError if the run or the round is not there.
    """
    initial = load_checkpoint(folder / _INITIAL).tensors
    done = last_round(folder) if round is None else round
    if done is None:
        raise CheckpointError(str(Problem(str(folder), "no round is committed here", "run the study first")))
    tensors = load_checkpoint(checkpoint_path(folder, done)).tensors
    return initial | {name: value for name, value in tensors.items() if name in initial}


def starting_parameters(folder: Path) -> Params:
    """The whole body (and a shared head) from which the run in `folder` started."""
    return load_checkpoint(folder / _INITIAL).tensors


def _claim(folder: Path, plan: StudyPlan, initial: Params) -> None:
    """Mark `folder` as this study's, or find it so. Raises UsageError if it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    path, origin = folder / _INITIAL, _origin(plan, initial)
    if path.exists():
        found = load_checkpoint(path).metadata
        differing = [
            word
            for word, key in (("plan", _PLAN_DIGEST), ("starting point", _INITIAL_DIGEST))
            if found.get(key) != origin[key]
        ]
        if differing:
            what = f"this run folder holds another study: its {' and '.join(differing)} differs"
            raise UsageError(Problem(str(folder), what, "take another folder, or the plan that is in it"))
        return
    write_atomically(folder / _PLAN, plan.to_json().encode())
    save_checkpoint(path, initial, origin)


def _load_round(folder: Path, round: int, template: dict[str, tuple[int, ...]], origin: dict[str, str]) -> Params:
    path = checkpoint_path(folder, round)
    try:
        tensors, metadata = load_checkpoint(path, template)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; without it, --resume goes on from round {round - 1}") from None
    if {key: metadata.get(key) for key in (*origin, _ROUND)} != {**origin, _ROUND: str(round)}:
        remedy = f"remove it: --resume then goes on from round {round - 1}"
        raise CheckpointError(str(Problem(str(path), "is not of this study and round", remedy)))
    return tensors


def _origin(plan: StudyPlan, initial: Params) -> dict[str, str]:
    return origin_of(plan, digest(to_arrays(initial)))
