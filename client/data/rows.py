"""One image of a site as its files give it, before it is fitted to a plan.

Problems found on the way are collected, not raised: a hospital mends them in one go. A problem names file and line
and never quotes a cell of the manifest: a path, a label or a pseudonym in an error text could leave the site with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import DataError, Problem

SPLITS = {"": "train", "train": "train", "val": "train", "validation": "train", "test": "test"}
SPLIT_WORDS = "'train', 'val' (counted as train: nothing is tuned on a site's validation part) or 'test'"

_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One image and what is known of it."""

    where: str  # "alder/manifest.csv:7", "alder/data.npz row 7" (rows from 0)
    pixels: np.ndarray  # uint8 (H, W) or (H, W, 3)
    label: str
    patient: str  # pseudonym
    split: str  # "train" or "test"
    mask: np.ndarray | None  # uint8 (H, W), 0 = background


def one_split_each(rows: Iterator[Row], problems: list[Problem]) -> Iterator[Row]:
    """The same rows; notes every patient who stands in two splits, once."""
    first: dict[str, Row] = {}
    told: set[str] = set()
    for row in rows:
        earlier = first.setdefault(row.patient, row)
        if earlier.split != row.split and row.patient not in told:
            told.add(row.patient)
            what = f"this patient is in split '{row.split}' here and in '{earlier.split}' at {earlier.where}"
            problems.append(Problem(row.where, what, "put all images of a patient into one split"))
        yield row


def refuse(problems: list[Problem]) -> None:
    """Raise DataError if there are problems: the first 20 and the number of the rest."""
    if not problems:
        return
    rest = len(problems) - _SHOWN
    more = [Problem("", f"and {rest} more problems", "`consilium-site data check` lists all")] if rest > 0 else []
    raise DataError(problems[:_SHOWN] + more)
