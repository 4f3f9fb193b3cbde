"""Writing a site's folder: site.yaml and one data.npz, or PNGs and a manifest.csv. Whole or not at all."""

from __future__ import annotations

import csv
import io
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image

from client.data.rows import DETAILS, Details
from client.site import SITE_FILE, Orientation
from common.errors import DataError, Problem
from common.files import sync_folder, write_through

Format = Literal["npz", "png"]

PHANTOM_FILE = "PHANTOM.txt"
PHANTOM_NOTE = (
    "PHANTOM: drawn by a program, no patient's images. Any resemblance to a finding is intended; none is real.\n"
)

_BUDGET_EPSILON = 10.0  # a made site's total budget: room for a few studies


@dataclass(frozen=True)
class SiteImages:
    """What a site's folder will hold; rows agree across all fields."""

    name: str
    images: np.ndarray  # uint8 (n, H, W) or (n, H, W, 3)
    labels: np.ndarray  # int64 (n,), index into label_names
    patients: np.ndarray  # '<U' (n,)
    split: np.ndarray  # '<U' (n,): "train" or "test"
    label_names: tuple[str, ...]
    details: tuple[Details, ...]
    masks: np.ndarray | None = None  # uint8 (n, H, W)
    has_mask: np.ndarray | None = None  # bool (n,): which rows of `masks` are masks; None: every one
    orientation: Orientation = "fixed"
    phantom: bool = False

    def rows(self, keep: np.ndarray) -> SiteImages:
        """The rows that `keep` selects (a boolean mask, or indices)."""
        return replace(
            self,
            images=self.images[keep],
            labels=self.labels[keep],
            patients=self.patients[keep],
            split=self.split[keep],
            details=tuple(self.details[row] for row in np.arange(len(self.labels))[keep]),
            masks=None if self.masks is None else self.masks[keep],
            has_mask=None if self.has_mask is None else self.has_mask[keep],
        )

    def details_by_column(self) -> dict[str, np.ndarray]:
        """The columns of `details` of which something is known: text (n,), and age float64 (n,)."""
        columns = {name: np.array([getattr(row, name) for row in self.details]) for name in DETAILS}
        return {name: column for name, column in columns.items() if not _unknown(column).all()}


def write_sites(out: Path, sites: Sequence[tuple[str, SiteImages]], *, format: Format = "npz") -> list[Path]:
    """Write each (folder below `out`, images); all are written beside `out` first and then renamed into place.

    Returns the folders. Raises DataError, before anything is written, if one of them exists and is not empty.
    """
    targets = [out / folder for folder, _ in sites]
    taken = [path for path in targets if path.exists() and (not path.is_dir() or any(path.iterdir()))]
    if taken:
        remedy = "remove it, or choose another folder or name"
        raise DataError([Problem(str(path), "already exists and is not empty", remedy) for path in taken])
    with _workplace(out) as workplace:
        for index, (_, site) in enumerate(sites):
            _write_site(workplace / str(index), site, format)
        for index, target in enumerate(targets):
            target.parent.mkdir(parents=True, exist_ok=True)
            (workplace / str(index)).rename(target)
            sync_folder(target.parent)
    return targets


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    beside = out.resolve()  # on the same file system, so that a rename is one step
    beside.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{beside.name}-", dir=beside.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_site(folder: Path, site: SiteImages, format: Format) -> None:
    folder.mkdir()
    source = _write_npz(folder, site) if format == "npz" else _write_pngs(folder, site)
    training = len(np.unique(site.patients[site.split == "train"]))
    budget = {"epsilon": _BUDGET_EPSILON, "delta": float(f"{1 / (10 * max(1, training)):.3g}")}
    nature = {"phantom": site.phantom, "orientation": site.orientation}
    config = {"name": site.name, **source, **nature, "state": "state", "budget": budget}
    write_through(folder / SITE_FILE, yaml.safe_dump(config, sort_keys=False).encode())
    if site.phantom:
        write_through(folder / PHANTOM_FILE, PHANTOM_NOTE.encode())
    sync_folder(folder)


def _write_npz(folder: Path, site: SiteImages) -> dict[str, str]:
    arrays = {
        "images": site.images,
        "labels": site.labels,
        "label_names": np.array(site.label_names),
        "patient_ids": site.patients,
        "split": site.split,
        **site.details_by_column(),
    }
    if site.masks is not None:
        arrays["masks"] = site.masks
    if site.masks is not None and site.has_mask is not None and not site.has_mask.all():
        arrays["has_mask"] = site.has_mask
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
    write_through(folder / "data.npz", packed.getvalue())
    return {"npz": "data.npz"}


def _write_pngs(folder: Path, site: SiteImages) -> dict[str, str]:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    masked, details = site.masks is not None, site.details_by_column()
    writer.writerow(["path", "label", "patient", "split", *details] + ["mask"] * masked)
    for name in ("images", "masks")[: 1 + masked]:
        (folder / name).mkdir()
    for row, pixels in enumerate(site.images):
        path = f"images/{row:05d}.png"
        write_through(folder / path, _png(pixels))
        cells = [path, site.label_names[site.labels[row]], site.patients[row], site.split[row]]
        cells += [_cell(column[row]) for column in details.values()]
        if site.masks is not None and (site.has_mask is None or site.has_mask[row]):
            cells.append(f"masks/{row:05d}.png")
            write_through(folder / cells[-1], _png(site.masks[row]))
        writer.writerow(cells)
    write_through(folder / "manifest.csv", table.getvalue().encode())
    return {"manifest": "manifest.csv"}


def _unknown(column: np.ndarray) -> np.ndarray:
    """bool (n,)"""
    unknown: np.ndarray = np.isnan(column) if column.dtype.kind == "f" else column == ""
    return unknown


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:g}"


def _png(pixels: np.ndarray) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()
