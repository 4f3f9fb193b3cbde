"""What a hospital's own table says of files, series, studies and patients: labels above all.

Columns file (path below the imported folder), series, study (their DICOM UIDs), patient (PatientID), of which each line
fills one or more; and label, split, mask (a file below the folder), modality, age, sex, scanner, all optional. A line
speaks of the smallest thing that it names; a `patient` beside it says whose that is, for files that say it not
themselves. Of several lines for one image the one of the smaller thing wins, cell by cell.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from client.data.rows import DETAILS, SPLIT_WORDS, SPLITS
from common.errors import DataError, Problem

THINGS = ("file", "series", "study", "patient")  # from small to large
_TOLD = ("label", "patient", "split", "mask", *DETAILS)

Cells = dict[str, str]


class Labels:
    """The lines of one table, and which of them were asked for."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lines: dict[tuple[str, str], tuple[int, Cells]] = {}
        self._used: set[int] = set()
        if path is not None:
            self._read(path)

    def of(self, things: Mapping[str, str]) -> Cells:
        """What is told of an image that is in these things."""
        told: Cells = {}
        for thing in reversed(THINGS):
            line = self._lines.get((thing, things.get(thing, "")))
            if line is not None:
                self._used.add(line[0])
                told |= line[1]
        return told

    def masks(self) -> set[str]:
        """The files named as masks: they are no images."""
        return {cells["mask"] for _, cells in self._lines.values() if "mask" in cells}

    def unused(self) -> Iterator[Problem]:
        """The lines of which nothing was found."""
        for number, _ in self._lines.values():
            if number not in self._used:
                remedy = "check its spelling; a file is written as its path below the imported folder"
                yield Problem(f"{self.path}:{number}", "nothing that was found is what this line names", remedy)

    def _read(self, path: Path) -> None:
        """Raises DataError with every problem of the table."""
        problems: list[Problem] = []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
                if not set(THINGS) & set(reader.fieldnames):
                    remedy = f"the first line names columns: one of {', '.join(THINGS)}, and label"
                    raise DataError(Problem(f"{path}:1", "no column says what the labels are of", remedy))
                for cells in reader:
                    self._line(reader.line_num, {k: (v or "").strip() for k, v in cells.items() if k}, problems)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(
                Problem(str(path), f"cannot be read as a CSV file ({type(error).__name__})", "save as UTF-8")
            ) from None
        if problems:
            raise DataError(problems)

    def _line(self, number: int, cells: Cells, problems: list[Problem]) -> None:
        where = f"{self.path}:{number}"
        thing = next((thing for thing in THINGS if cells.get(thing)), None)
        if thing is None:
            if any(cells.values()):
                problems.append(Problem(where, "it says not what it is of", f"fill one of: {', '.join(THINGS)}"))
            return
        told = {name: cells[name] for name in _TOLD if cells.get(name)}
        if told.get("split", "").lower() not in SPLITS:
            problems.append(Problem(where, "unknown split", f"write {SPLIT_WORDS}"))
        first, known = self._lines.setdefault((thing, cells[thing]), (number, told))
        if known != told:
            problems.append(Problem(where, f"it contradicts line {first}", "leave one of them out"))
