"""From an imported image back to the hospital's own file, for the hospital's own eyes.

Which file became which image is kept in the site's state folder, sealed under the key of the pseudonyms: without it
the list says no more than they do.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.data.pseudonyms import KEY_FILE, Pseudonyms
from client.site import load_site_config
from common.errors import DataError, Problem
from common.files import give_to_owner_of, write_atomically

SEALED = "origins.sealed"

_IMAGE = re.compile(r"(?:images|masks)/([0-9a-f]+)/([0-9a-f]+)-(\d{4,})\.png")


def keep_origins(state: Path, names: Pseudonyms, folder: str, source: Path, files: Mapping[str, Path]) -> None:
    """Note of the images and masks below `folder` which of the `files` in `source` each is of; what was noted of the
    folder before is forgotten."""
    known = _read(state, names)
    known[folder] = {"source": str(source), "files": {name: str(path) for name, path in files.items()}}
    write_atomically(state / SEALED, names.sealed(json.dumps(known).encode()))
    give_to_owner_of(state, state / SEALED)


def find_origin(site: Path, image: str) -> tuple[Path, int]:
    """The original and which of its images (from 0) `image` is: a path of the manifest, or a line as "manifest.csv:7".

    Raises DataError.
    """
    config = load_site_config(site)
    state = site / config.state
    line = re.fullmatch(r"(?:.*manifest\.csv)?:?(\d+)", image)
    path = _path_of_line(site / str(config.manifest), int(line[1])) if line else image
    inside = Path(path).resolve().relative_to(site.resolve()).as_posix() if Path(path).is_file() else path
    found = _IMAGE.fullmatch(inside)
    if not found or not (state / KEY_FILE).exists():
        raise _unknown(image, "it was not made by `consilium-site data import`")
    told = _read(state, Pseudonyms.of(state)).get(found[1], {})
    if found[2] not in told.get("files", {}):
        raise _unknown(image, "of which file it is was not noted")
    return Path(told["source"], told["files"][found[2]]), int(found[3])


def _path_of_line(manifest: Path, number: int) -> str:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            began = 2
            for cells in reader:
                if began <= number <= reader.line_num:
                    return cells.get("path") or ""
                began = reader.line_num + 1
    except (OSError, UnicodeDecodeError, csv.Error):
        pass
    raise DataError(Problem(f"{manifest}:{number}", "there is no such line", "lines count from 1, the header's"))


def _read(state: Path, names: Pseudonyms) -> dict[str, Any]:
    path = state / SEALED
    if not path.exists():
        return {}
    try:
        known: dict[str, Any] = json.loads(names.opened(path.read_bytes()))
    except ValueError:
        what = "it is damaged, or sealed under another key"
        raise DataError(
            Problem(str(path), what, f"restore it with {KEY_FILE}, or remove it and import again")
        ) from None
    return known


def _unknown(image: str, what: str) -> DataError:
    return DataError(Problem(image, what, "name a path of the manifest, or a line as manifest.csv:7; or import again"))
