"""What happened in each round, line by line in history.jsonl.

A round's line is on disk before the round's checkpoint, and counts only with it: lines beyond the last checkpoint are
dropped when the run goes on, torn or whole.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import CheckpointError, Problem
from common.files import sync_folder

FILE = "history.jsonl"

SiteStatus = Literal["ok", "refused", "failed", "late", "rejected", "absent"]


@dataclass(frozen=True, kw_only=True)
class SiteOutcome:
    """One site in one round."""

    site: str
    # ok: in the mean; refused: the site said no; failed: it broke; late: no answer in time;
    # rejected: it answered what may not be used; absent: it was not asked
    status: SiteStatus
    code: str  # "ok", a Refusal's code, or the server's own
    reason: str = ""  # data-independent
    seconds: float = 0.0  # the site's coarse bucket, or the lab's wait
    epsilon: float = 0.0  # the ledger's total
    accuracy: float = math.nan  # private; nan if the plan asks for none
    queries: int = 0  # charged for this round
    ledger_rows: int = 0
    ledger_head: str = ""


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round. Round 0 is the start: its sites are what they answered when they were asked to prepare."""

    round: int
    status: Literal["committed", "below_quorum"]  # of a secure sum everyone who was asked is the quorum
    seconds: float  # wall time at the lab
    update_norm: float  # L2 norm of the weighted mean update; 0 below quorum
    sites: tuple[SiteOutcome, ...]


def checkpoint_path(folder: Path, round: int) -> Path:
    """The file that commits `round`."""
    return folder / f"round-{round:04d}.safetensors"


def last_round(folder: Path) -> int | None:
    """The last committed round; None before the start is committed."""
    numbers = [int(path.stem.removeprefix("round-")) for path in folder.glob("round-[0-9]*.safetensors")]
    return max(numbers, default=None)


def append_record(folder: Path, record: RoundRecord) -> None:
    """Append a line to `folder`/history.jsonl; on disk when this returns.

    Raises CheckpointError if it cannot be written; a torn line stays behind, beyond the last checkpoint.
    """
    path = folder / FILE
    try:
        with path.open("ab") as file:
            file.write(_to_line(record))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise CheckpointError(str(Problem(str(path), what, "make room or mend the folder, then resume"))) from error


def read_history(folder: Path, *, last_round: int) -> tuple[RoundRecord, ...]:
    """The records of rounds 0 to `last_round`, the last that has a checkpoint; what follows them is not read.

    Raises CheckpointError if one of them is missing or broken.
    """
    return _parse(folder / FILE, last_round)[0]


def resume_history(folder: Path, *, last_round: int | None) -> tuple[RoundRecord, ...]:
    """The same, and cuts the file behind them; None: no round is committed, and the whole file goes."""
    path = folder / FILE
    if last_round is None:
        path.unlink(missing_ok=True)
        return ()
    records, end = _parse(path, last_round)
    with path.open("r+b") as file:
        file.truncate(end)
        os.fsync(file.fileno())
    return records


def _parse(path: Path, last_round: int) -> tuple[tuple[RoundRecord, ...], int]:
    """The committed records, and the offset in bytes behind them."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)[: last_round + 1]
    except OSError as error:
        raise _damaged(str(path), f"cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _from_line(line)
        except (ValueError, KeyError, TypeError):
            raise _damaged(f"{path}:{number}", "is no record of a round") from None
        if record.round != number - 1 or not line.endswith(b"\n"):
            raise _damaged(f"{path}:{number}", f"is of round {record.round}, not {number - 1}, or torn")
        records.append(record)
    if len(records) <= last_round:
        raise _damaged(str(path), f"ends at round {len(records) - 1}, but round {last_round} has a checkpoint")
    return tuple(records), sum(map(len, lines))


def _damaged(where: str, what: str) -> CheckpointError:
    return CheckpointError(str(Problem(where, what, "restore it from a copy, or start in a new run folder")))


def _to_line(record: RoundRecord) -> bytes:
    data = dataclasses.asdict(record)
    for site in data["sites"]:
        site["accuracy"] = None if math.isnan(site["accuracy"]) else site["accuracy"]
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _from_line(line: bytes) -> RoundRecord:
    data: dict[str, Any] = json.loads(line)
    sites = [{**site, "accuracy": math.nan if site["accuracy"] is None else site["accuracy"]} for site in data["sites"]]
    return RoundRecord(**{**data, "sites": tuple(SiteOutcome(**site) for site in sites)})
