"""The benchmark of the data path: its files are read alike by all, and its table says what was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from client.data import kept
from deploy.benchmarks import data_path
from deploy.benchmarks.data_path import COLUMNS, FITTED, KINDS, Files, ours, plain, table, write_site


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_both_have_the_same_images(kind: Files, tmp_path: Path) -> None:
    for name in kind.needs:
        pytest.importorskip(name)
    folder = write_site(tmp_path / "site", kind, images=6, side=80)
    one, other = (torch.cat(list(b)) for b in (ours(folder, FITTED, keep=True), plain(folder, FITTED, read=kind.read)))
    assert one.shape == other.shape == (6, 1, FITTED, FITTED)
    np.testing.assert_allclose(one, other, atol=0.3 if kind.needs else 0)  # the peer's window is each image's own
    assert torch.unique(one[:, 0, 0, 0]).numel() > 3


def test_the_table_has_a_row_for_each_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_path, "SETTLED_S", 0)
    monkeypatch.setattr(kept, "_SPARE", 0)
    monkeypatch.setattr(data_path, "SIDE", 64)
    monkeypatch.setattr(data_path, "KINDS", (KINDS[0], Files("unknown", None, None, needs=("no_such_module",))))
    head, rule, *rows = [
        [c.strip() for c in line.split("|")[1:-1]] for line in table(tmp_path, images=12, many=15, repeats=1)
    ]
    assert tuple(head) == COLUMNS
    assert {len(row) for row in (rule, *rows)} == {len(COLUMNS)}
    assert [row[:2] for row in rows] == [
        ["12 PNG", "Consilium, not cached (1)"],
        ["12 PNG", "Consilium, cached (1)"],
        ["12 PNG", "Dataset (1)"],
        ["unknown", "not measured: no_such_module not installed"],
        ["15 small PNG", "Consilium, not cached (1)"],
        ["15 small PNG", "Consilium, cached (1)"],
        ["15 small PNG", "Dataset (1)"],
    ]
    assert all(float(cell) >= 0 for row in rows if len(row[2]) for cell in row[2:])
    assert rows[2][-1] == rows[-1][-1] == "1.00"
