"""One image of a site as its files give it, before it is fitted to a plan.

Problems found on the way are collected, not raised: a hospital mends them in one go. A problem names file and line
and never quotes a cell of the manifest: a path, a label or a pseudonym in an error text could leave the site with it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import DataError, Problem
from common.plan import RowFilter

SPLITS = {"": "train", "train": "train", "val": "train", "validation": "train", "test": "test"}
SPLIT_WORDS = "'train', 'val' (counted as train: nothing is tuned on a site's validation part) or 'test'"

DETAILS = ("modality", "age", "sex", "scanner")

NO_PIXELS = np.zeros((0, 0), dtype=np.uint8)  # of a row that was not read

_SHOWN = 20
_OLDEST = 130  # years


@dataclass(frozen=True, slots=True)
class Details:
    """What else is known of an image; empty or nan where it is not."""

    modality: str = ""
    age: float = math.nan  # years
    sex: str = ""
    scanner: str = ""

    def match(self, wanted: RowFilter) -> bool:
        """Whether all that is asked for is known and right."""
        named = ((wanted.modality, self.modality), (wanted.sex, self.sex), (wanted.scanner, self.scanner))
        old_enough = wanted.min_age is None or self.age >= wanted.min_age  # nan is neither
        young_enough = wanted.max_age is None or self.age <= wanted.max_age
        return (
            all(names is None or (value != "" and value in names) for names, value in named)
            and old_enough
            and young_enough
        )


@dataclass(frozen=True, slots=True)
class Source:
    """Files as they stand at one moment."""

    files: tuple[str, ...]
    key: bytes  # of path, size, inode, mtime and ctime of each
    newest_ns: int  # when the last of them was changed

    @classmethod
    def of(cls, *files: str) -> Source | None:
        """None if one is not there."""
        try:
            stats = [os.stat(file) for file in files]
        except (OSError, ValueError):
            return None
        facts = [(s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for s in stats]
        key = hashlib.blake2b(repr((files, facts)).encode(errors="surrogateescape"), digest_size=16).digest()
        return cls(files, key, max(max(s.st_mtime_ns, s.st_ctime_ns) for s in stats))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an image came from."""

    source: Source  # before it was read
    key: bytes  # of the source and the image's place in it
    told: tuple[str, str, Details]  # label, split and details, as the site tells them


@dataclass(frozen=True, slots=True)
class Row:
    """One image and what is known of it."""

    where: str  # "alder/manifest.csv:7", "alder/data.npz row 7" (rows from 0)
    pixels: np.ndarray  # uint8 (H, W) or (H, W, 3)
    label: str
    patient: str  # pseudonym
    split: str  # "train" or "test"
    mask: np.ndarray | None  # uint8 (H, W), 0 = background
    details: Details = Details()
    origin: Origin | None = None  # None where nothing is kept
    fitted: bool = False  # `pixels` and `mask` are those of an earlier start, fitted to the plan


def read_details(where: str, *, modality: str, age: str, sex: str, scanner: str, problems: list[Problem]) -> Details:
    """The details that these cells tell, each empty where unknown; an age that is none adds to `problems`."""
    years = _years(age) if age else math.nan
    if years is None:
        what = f"the age is no number of years from 0 to {_OLDEST}"
        problems.append(Problem(where, what, "give years, as 63 or 0.5; leave it empty where it is unknown"))
    return Details(modality, math.nan if years is None else years, sex, scanner)


def one_split_each(rows: Iterator[Row], problems: list[Problem]) -> Iterator[Row]:
    """The same rows; notes every patient who stands in two splits, once."""
    first: dict[str, tuple[str, str]] = {}
    told: set[str] = set()
    for row in rows:
        split, where = first.setdefault(row.patient, (row.split, row.where))
        if split != row.split and row.patient not in told:
            told.add(row.patient)
            what = f"this patient is in split '{row.split}' here and in '{split}' at {where}"
            problems.append(Problem(row.where, what, "put all images of a patient into one split"))
        yield row


def _years(cell: str) -> float | None:
    try:
        years = float(cell)
    except ValueError:
        return None
    return years if 0 <= years <= _OLDEST else None


def refuse(problems: list[Problem]) -> None:
    """Raise DataError if there are problems: the first 20 and the number of the rest."""
    if not problems:
        return
    rest = len(problems) - _SHOWN
    more = [Problem("", f"and {rest} more problems", "`consilium-site data check` lists all")] if rest > 0 else []
    raise DataError(problems[:_SHOWN] + more)
