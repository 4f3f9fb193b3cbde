"""Rows of a `manifest.csv`.

Columns path, label, patient; optional mask, modality, split, age (years), sex, scanner; others are ignored. A site
that only segments needs no labels. Paths are relative to the site's folder. UTF-8, separated by commas.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from client.data.kept import KeptImages
from client.data.readers import UnreadableImageError, read_image, read_mask
from client.data.rows import DETAILS, NO_PIXELS, SPLIT_WORDS, SPLITS, Row, Source, read_details
from common.errors import Problem

REQUIRED = ("path", "label", "patient")

Cells = dict[str, str]


def manifest_rows(
    folder: Path, manifest: Path, problems: list[Problem], *, labelled: bool = True, kept: KeptImages | None = None
) -> Iterator[Row]:
    """Each row whose image can be read; every other row adds to `problems`. `labelled`: each must have a label."""
    required = tuple(name for name in REQUIRED if labelled or name != "label")
    files = _Files(folder, kept)
    for where, cells in _lines(manifest, required, problems):
        row = _row(files, where, cells, required, problems)
        if row is not None:
            yield row


def _lines(manifest: Path, required: tuple[str, ...], problems: list[Problem]) -> Iterator[tuple[str, Cells]]:
    """(file:line, cells by column) of every line that is not blank; none if any line is no CSV."""
    try:
        with _opened(manifest) as file:
            deque(csv.reader(file, strict=True), maxlen=0)
    except FileNotFoundError:
        problems.append(Problem(str(manifest), "there is no such file", "check 'manifest' in site.yaml"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        problems.append(
            Problem(str(manifest), f"cannot be read as a CSV file: {type(error).__name__}", "save as UTF-8")
        )
    else:
        yield from _parsed(manifest, required, problems)


def _parsed(manifest: Path, required: tuple[str, ...], problems: list[Problem]) -> Iterator[tuple[str, Cells]]:
    with _opened(manifest) as file:
        reader = csv.reader(file, strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        missing = [name for name in required if name not in header]
        if missing:
            what = f"missing column: {', '.join(missing)}" if header else "the manifest is empty"
            remedy = f"the first line names the columns, separated by commas: {','.join(required)}"
            problems.append(Problem(f"{manifest}:1", what, remedy))
            return
        yield from _cells(reader, header, manifest, problems)


def _opened(manifest: Path) -> IO[str]:
    return manifest.open(encoding="utf-8-sig", newline="")


def _cells(
    reader: Iterator[list[str]], header: list[str], manifest: Path, problems: list[Problem]
) -> Iterator[tuple[str, Cells]]:
    start = reader.line_num + 1  # type: ignore[attr-defined]
    name = str(manifest)
    for raw in reader:
        where, start = f"{name}:{start}", reader.line_num + 1  # type: ignore[attr-defined]
        cells = [cell.strip() for cell in raw]
        if len(cells) > len(header):
            problems.append(Problem(where, f"{len(cells)} cells, but {len(header)} columns", "quote cells with commas"))
        elif any(cells):
            yield where, dict(zip(header, cells, strict=False))


def _row(files: _Files, where: str, cells: Cells, required: tuple[str, ...], problems: list[Problem]) -> Row | None:
    found: list[Problem] = []
    for name in required:
        if not cells.get(name):
            found.append(Problem(where, f"the cell '{name}' is empty", "fill it in"))
    split = SPLITS.get(cells.get("split", "").lower())
    if split is None:
        found.append(Problem(where, "unknown split", f"write {SPLIT_WORDS}"))
    told = {name: cells.get(name, "") for name in DETAILS}
    details = read_details(where, **told, problems=found)
    path = files.new(where, cells.get("path", ""), found)
    of_mask: list[Problem] = []
    mask_path = files.inside(where, cells.get("mask", ""), "mask", of_mask)
    row = Row(where, NO_PIXELS, cells.get("label", ""), cells.get("patient", ""), split or "", None, details)
    if files.kept is not None and path is not None and not found and not of_mask:
        source = Source.of(path, mask_path) if mask_path else Source.of(path)
        row = files.kept.found(row, source, masked=mask_path is not None)
        if row.fitted:
            return row
    pixels = _image(path, where, found)
    mask = _mask(mask_path, where, pixels, of_mask)
    problems += found + of_mask
    if found or of_mask or pixels is None:
        return None
    return dataclasses.replace(row, pixels=pixels, mask=mask)


def _image(path: str | None, where: str, problems: list[Problem]) -> np.ndarray | None:
    if path is None:
        return None
    try:
        return read_image(Path(path))
    except UnreadableImageError as error:
        problems.append(Problem(where, f"image: {error}", "mend or leave out the row"))
        return None


def _mask(path: str | None, where: str, pixels: np.ndarray | None, problems: list[Problem]) -> np.ndarray | None:
    if path is None or pixels is None:
        return None
    try:
        mask = read_mask(Path(path))
    except UnreadableImageError as error:
        problems.append(Problem(where, f"mask: {error}", "mend it or leave the column out"))
        return None
    if mask.shape != pixels.shape[:2]:
        size = "the mask is {1}x{0} pixels, its image {3}x{2}".format(*mask.shape, *pixels.shape[:2])
        problems.append(Problem(where, size, "give a mask of the image's own size"))
        return None
    return mask


class _Files:
    """The files of one folder that its manifest names."""

    def __init__(self, folder: Path, kept: KeptImages | None) -> None:
        self.kept = kept
        self._folder, self._root = folder, str(folder.resolve())
        self._resolved: dict[str, str] = {}  # folders: there are few, and following their links takes long
        self._listed: dict[str, str] = {}

    def new(self, where: str, name: str, problems: list[Problem]) -> str | None:
        """An image that no earlier row names."""
        path = self.inside(where, name, "image", problems)
        if path is None:
            return None
        earlier = self._listed.setdefault(path, where)
        if earlier is not where:
            problems.append(Problem(where, f"the same image as {earlier}", "list each image once"))
            return None
        return path

    def inside(self, where: str, name: str, what: str, problems: list[Problem]) -> str | None:
        """The file, links followed, if `name` is given and stays inside the folder."""
        if not name:
            return None
        try:
            path = self._followed(name)
        except (OSError, ValueError):
            problems.append(Problem(where, f"{what}: no valid path"))
            return None
        if path == self._root or path.startswith(f"{self._root.rstrip(os.sep)}{os.sep}"):
            return path
        problems.append(Problem(where, f"{what}: the path leaves the site's folder", "copy the file into it"))
        return None

    def _followed(self, name: str) -> str:
        parent, _, last = name.rpartition(os.sep)
        if last in ("", ".", "..") or name.startswith(os.sep):
            return str((self._folder / name).resolve())
        if parent not in self._resolved:
            self._resolved[parent] = str((self._folder / parent).resolve())
        path = f"{self._resolved[parent].rstrip(os.sep)}{os.sep}{last}"
        return str(Path(path).resolve()) if _is_link(path) else path


def _is_link(path: str) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:
        return False
