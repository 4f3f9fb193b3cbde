"""Rows of a `manifest.csv`.

Columns path, label, patient; optional mask, modality, split, age (years), sex, scanner; others are ignored. A site
that only segments needs no labels. Paths are relative to the site's folder. UTF-8, separated by commas.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from client.data.readers import UnreadableImageError, read_image, read_mask
from client.data.rows import DETAILS, SPLIT_WORDS, SPLITS, Row, read_details
from common.errors import Problem

REQUIRED = ("path", "label", "patient")

Cells = dict[str, str]


def manifest_rows(folder: Path, manifest: Path, problems: list[Problem], *, labelled: bool = True) -> Iterator[Row]:
    """Each row whose image can be read; every other row adds to `problems`. `labelled`: each must have a label."""
    required = tuple(name for name in REQUIRED if labelled or name != "label")
    listed: dict[Path, str] = {}
    for where, cells in _lines(manifest, required, problems):
        row = _row(folder, where, cells, required, listed, problems)
        if row is not None:
            yield row


def _lines(manifest: Path, required: tuple[str, ...], problems: list[Problem]) -> list[tuple[str, Cells]]:
    """(file:line, cells by column) of every line that is not blank."""
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            missing = [name for name in required if name not in header]
            if missing:
                what = f"missing column: {', '.join(missing)}" if header else "the manifest is empty"
                remedy = f"the first line names the columns, separated by commas: {','.join(required)}"
                problems.append(Problem(f"{manifest}:1", what, remedy))
                return []
            return list(_cells(reader, header, manifest, problems))
    except FileNotFoundError:
        problems.append(Problem(str(manifest), "there is no such file", "check 'manifest' in site.yaml"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(
            Problem(str(manifest), f"cannot be read as a CSV file: {type(error).__name__}", "save as UTF-8")
        )
    return []


def _cells(
    reader: Iterator[list[str]], header: list[str], manifest: Path, problems: list[Problem]
) -> Iterator[tuple[str, Cells]]:
    start = reader.line_num + 1  # type: ignore[attr-defined]
    for cells in reader:
        where, start = f"{manifest}:{start}", reader.line_num + 1  # type: ignore[attr-defined]
        if len(cells) > len(header):
            problems.append(Problem(where, f"{len(cells)} cells, but {len(header)} columns", "quote cells with commas"))
        elif any(cell.strip() for cell in cells):
            yield where, dict(zip(header, (cell.strip() for cell in cells), strict=False))


def _row(
    folder: Path,
    where: str,
    cells: Cells,
    required: tuple[str, ...],
    listed: dict[Path, str],
    problems: list[Problem],
) -> Row | None:
    found: list[Problem] = []
    for name in required:
        if not cells.get(name):
            found.append(Problem(where, f"the cell '{name}' is empty", "fill it in"))
    split = SPLITS.get(cells.get("split", "").lower())
    if split is None:
        found.append(Problem(where, "unknown split", f"write {SPLIT_WORDS}"))
    told = {name: cells.get(name, "") for name in DETAILS}
    details = read_details(where, **told, problems=found)
    pixels = _image(folder, where, cells.get("path", ""), listed, found)
    mask = _mask(folder, where, cells.get("mask", ""), pixels, found)
    problems += found
    if found or pixels is None or split is None:
        return None
    return Row(where, pixels, cells.get("label", ""), cells["patient"], split, mask, details)


def _image(folder: Path, where: str, name: str, listed: dict[Path, str], problems: list[Problem]) -> np.ndarray | None:
    path = _inside(folder, where, name, "image", problems)
    if path is None:
        return None
    if path in listed:
        problems.append(Problem(where, f"the same image as {listed[path]}", "list each image once"))
        return None
    listed[path] = where
    try:
        return read_image(path)
    except UnreadableImageError as error:
        problems.append(Problem(where, f"image: {error}", "mend or leave out the row"))
        return None


def _mask(folder: Path, where: str, name: str, pixels: np.ndarray | None, problems: list[Problem]) -> np.ndarray | None:
    path = _inside(folder, where, name, "mask", problems)
    if path is None or pixels is None:
        return None
    try:
        mask = read_mask(path)
    except UnreadableImageError as error:
        problems.append(Problem(where, f"mask: {error}", "mend it or leave the column out"))
        return None
    if mask.shape != pixels.shape[:2]:
        size = "the mask is {1}x{0} pixels, its image {3}x{2}".format(*mask.shape, *pixels.shape[:2])
        problems.append(Problem(where, size, "give a mask of the image's own size"))
        return None
    return mask


def _inside(folder: Path, where: str, name: str, what: str, problems: list[Problem]) -> Path | None:
    """The file, links followed, if `name` is given and stays inside the folder."""
    if not name:
        return None
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError):
        problems.append(Problem(where, f"{what}: no valid path"))
        return None
    if path.is_relative_to(folder.resolve()):
        return path
    problems.append(Problem(where, f"{what}: the path leaves the site's folder", "copy the file into it"))
    return None
