"""The history: a round's line counts only with the round's checkpoint."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest

from common.errors import CheckpointError
from server.history import FILE, RoundRecord, SiteOutcome, append_record, read_history, resume_history


def record(round: int, accuracy: float = 0.75) -> RoundRecord:
    sites = (
        SiteOutcome(site="alder", status="ok", code="ok", accuracy=accuracy, epsilon=1.5, ledger_rows=round),
        SiteOutcome(site="birch", status="late", code="late", reason="no answer in time", seconds=60.0),
    )
    return RoundRecord(round=round, status="committed", seconds=1.25, update_norm=0.5, sites=sites)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for round in range(4):
        append_record(tmp_path, record(round))
    return tmp_path


def test_round_trip(folder):
    records = read_history(folder, last_round=3)
    assert [r.round for r in records] == [0, 1, 2, 3]
    assert records[2].sites[0] == record(2).sites[0]
    assert math.isnan(records[2].sites[1].accuracy)  # nan in, nan out, and no NaN in the file
    assert "NaN" not in (folder / FILE).read_text()


def test_lines_beyond_the_checkpoint_are_dropped(folder):
    assert len(resume_history(folder, last_round=1)) == 2
    assert len((folder / FILE).read_text().splitlines()) == 2
    append_record(folder, record(2, accuracy=0.5))
    assert read_history(folder, last_round=2)[2].sites[0].accuracy == 0.5


@pytest.mark.parametrize("torn", [b'{"round": 4, "st', b"\x00\xff", b"\n\n"])
def test_a_torn_line_beyond_the_checkpoint_is_dropped(folder, torn):
    with (folder / FILE).open("ab") as file:
        file.write(torn)
    assert len(resume_history(folder, last_round=3)) == 4
    append_record(folder, record(4))
    assert len(read_history(folder, last_round=4)) == 5


def test_a_broken_committed_line(folder):
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    (folder / FILE).write_text(lines[0] + lines[1][:20] + "\n" + lines[2] + lines[3])
    with pytest.raises(CheckpointError, match=r"history.jsonl:2: is no record of a round -- restore it from a copy"):
        resume_history(folder, last_round=3)
    assert len((folder / FILE).read_text().splitlines()) == 4  # nothing was cut


def test_a_torn_committed_line(folder):
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"history.jsonl:4: is of round 3, not 3, or torn"):
        resume_history(folder, last_round=3)


def test_a_lost_line(folder):
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    (folder / FILE).write_text(lines[0] + lines[2] + lines[3])
    with pytest.raises(CheckpointError, match=r"history.jsonl:2: is of round 2, not 1"):
        resume_history(folder, last_round=2)
    (folder / FILE).write_text(lines[0])
    with pytest.raises(CheckpointError, match=r"ends at round 0, but round 3 has a checkpoint"):
        resume_history(folder, last_round=3)


def test_a_missing_history(tmp_path):
    with pytest.raises(CheckpointError, match=r"history.jsonl: cannot be read: No such file or directory"):
        resume_history(tmp_path, last_round=0)


def test_a_full_disk(folder, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="cannot be written: No space left on device -- make room"):
            append_record(folder, record(4))
    assert len(resume_history(folder, last_round=3)) == 4
