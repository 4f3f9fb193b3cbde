"""From a folder, or a PACS export, to a site's manifest and images: under pseudonyms, and without a word of the
originals. Two passes: headers say what there is, then each file that is wanted is decoded once. An image that is there
already is not written again, so the same command goes on where it was stopped; a changed file has another name.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from client.data.convert import Job, convert_all, image_file
from client.data.labels import Cells, Labels
from client.data.origins import keep_origins
from client.data.pixels import Window
from client.data.pseudonyms import Pseudonyms
from client.data.readers import Kind, UnreadableImageError, kind_of, require_extra
from client.data.rows import DETAILS, Details
from client.data.slices import EVERY_SLICE, SliceRule
from client.data.stacks import count_images, is_segmentation
from client.site import SITE_FILE, load_site_config
from common.errors import DataError, Problem, UsageError
from common.files import write_atomically
from common.service import only_instance

COLUMNS = ("path", "label", "patient", "split", *DETAILS, "spacing_mm", "mask")

Told = Callable[[str, int, int | None], None]  # what is done, how many, of how many

_LOCK = "import"
_MEND = "mend the file and import again, or do without it"


@dataclass(frozen=True)
class Choice:
    """What of a folder is imported, and how it is shown."""

    rule: SliceRule = EVERY_SLICE
    window: Window | None = None  # of DICOM and NIfTI, in place of their own
    test_fraction: float = 0.25  # of the patients whose split no table says
    patients_by_folder: bool = False  # a file that names no patient belongs to the one its folder is named after
    keep_burnt_in: bool = False


TAKE_ALL = Choice()


@dataclass(frozen=True)
class Imported:
    """What came of it; `left_out` names files of the hospital and is for its own eyes."""

    images: int
    patients: int
    left_out: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Scan:
    """One file that holds an image or a stack of them."""

    path: Path
    kind: Kind
    frames: int
    sliced: bool  # they, or it, are of a volume
    image: str  # SOPInstanceUID
    series: str
    place: float
    spacing: str
    details: Details
    told: Cells
    patient: str  # pseudonym


def import_images(
    source: Path,
    site: Path,
    *,
    labels: Path | None = None,
    choice: Choice = TAKE_ALL,
    processes: int | None = None,
    tell: Told = lambda what, done, of: None,
) -> Imported:
    """Take the images below `source` into the folder `site`; rows of its manifest from elsewhere stay.

    Raises DataError if the site's folder or the table of labels cannot serve, or no image is left.
    """
    config = load_site_config(site)
    if config.manifest is None:
        remedy = "make another site's folder, or remove 'npz' and write manifest: manifest.csv"
        raise DataError(Problem(str(site / SITE_FILE), "the site takes its images from an npz", remedy))
    if not source.is_dir():
        raise DataError(Problem(str(source), "is no folder", "name the folder of the originals"))
    table = Labels(labels)
    state = site / config.state
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_instance(state, _LOCK):
        return _import(source.resolve(), site, site / config.manifest, state, table, Pseudonyms.of(state), choice,
                       processes or min(8, os.cpu_count() or 1), tell)  # fmt: skip


def _import(
    source: Path,
    site: Path,
    manifest: Path,
    state: Path,
    table: Labels,
    names: Pseudonyms,
    choice: Choice,
    processes: int,
    tell: Told,
) -> Imported:
    left_out: list[Problem] = []
    folder = names.name("source", str(source))[:8]
    objects: list[Path] = []
    found = _once_each(_survey(source, site, table, names, choice, left_out, objects, tell), left_out)
    known = _labelled(_with_masks(source, found, objects, left_out), table, left_out)
    scans = list(_chosen(known, choice.rule))
    jobs = (_job(source, site / "images" / folder, site / "masks" / folder, scan, frames, names, choice)
            for scan, frames in scans)  # fmt: skip
    by_path = {scan.path: scan for scan, _ in scans}
    rows, origins = list[Cells](), dict[str, Path]()
    for done, (job, outcome) in enumerate(convert_all(jobs, processes), start=1):
        tell("images", done, len(scans))
        if isinstance(outcome, UnreadableImageError):
            left_out.append(Problem(str(job.path), str(outcome), _MEND))
        else:
            origins |= {stem.name: file.relative_to(source) for stem, file in _files_of(job)}
            rows += (_row(job, frame, by_path[job.path], site, names, choice) for frame in outcome)
    left_out += table.unused()
    if not rows:
        raise DataError([*left_out, Problem(str(source), "no image was found in it that can be used", "")])
    keep_origins(state, names, folder, source, origins)
    rows.sort(key=lambda cells: (cells["patient"], cells["path"]))  # nothing of the originals' order is left
    _write_manifest(manifest, [*_other_rows(manifest, f"images/{folder}/"), *rows])
    _remove_stale(site, folder, rows)
    return Imported(len(rows), len({cells["patient"] for cells in rows}), tuple(left_out))


def _survey(
    source: Path,
    site: Path,
    table: Labels,
    names: Pseudonyms,
    choice: Choice,
    left_out: list[Problem],
    objects: list[Path],
    tell: Told,
) -> Iterator[_Scan]:
    """Every file with an image whose patient is known; segmentation objects go to `objects`, others are `left_out`."""
    no_images = table.masks()
    for done, path in enumerate(_files(source, site, left_out), start=1):
        tell("headers", done, None)
        file = path.relative_to(source).as_posix()
        if file in no_images or (table.path is not None and path == table.path.resolve()):
            continue
        try:
            scan = _scan(path, file, table, names, choice)
        except UnreadableImageError as error:
            if is_segmentation(path):
                objects.append(path)
            else:
                left_out.append(Problem(str(path), str(error), _MEND))
        except _Objection as objection:
            left_out.append(Problem(str(path), *objection.args))
        else:
            yield scan


def _with_masks(source: Path, scans: list[_Scan], objects: list[Path], left_out: list[Problem]) -> Iterator[_Scan]:
    """The scans, those without a mask of the table with the object that names them; unless two do."""
    of = defaultdict[str, list[Path]](list)
    for path in objects:
        from client.data import segmentation

        for image in segmentation.marked_images(path):
            of[image].append(path)
    images = {scan.image for scan in scans}
    for path in objects:
        if not any(path in of[image] for image in images & of.keys()):
            left_out.append(Problem(str(path), "no image that it is of is here", "import it together with its images"))
    for scan in scans:
        masks = of.get(scan.image, []) if scan.kind == "dicom" and "mask" not in scan.told else []
        if len(masks) > 1:
            what = f"{len(masks)} segmentation objects are of it"
            left_out.append(Problem(str(scan.path), what, "name the right one in the table's column 'mask'"))
        elif masks:
            yield replace(scan, told=scan.told | {"mask": masks[0].relative_to(source).as_posix()})
        else:
            yield scan


def _labelled(scans: Iterator[_Scan], table: Labels, left_out: list[Problem]) -> Iterator[_Scan]:
    """Those that can be learned from; all, where no table was given."""
    for scan in scans:
        if table.path is None or scan.told.get("label") or scan.told.get("mask"):
            yield scan
        else:
            remedy = "add a line for its file, series, study or patient"
            left_out.append(Problem(str(scan.path), "the table has no label for it", remedy))


class _Objection(Exception):
    """What speaks against a sound file, and the remedy."""


def _scan(path: Path, file: str, table: Labels, names: Pseudonyms, choice: Choice) -> _Scan:
    """Raises UnreadableImageError, _Objection, and UsageError if the extra is missing."""
    kind = kind_of(path)
    if kind == "other":
        raise _Objection("it is no image", "nothing, if it is none")
    if kind in ("dicom", "nifti"):
        _needed()
    scan, things, patient = _facts(path, file, kind, choice)
    told = table.of(things)
    patient = patient or _table_patient(told, path, choice)
    if not patient:
        raise _Objection("whose image it is is not known", "name its patient in the table (--labels), beside its file")
    told |= {k: v for k, v in table.of({"patient": patient}).items() if k not in told}
    return replace(scan, told=told, patient=names.patient(patient))


def _table_patient(told: Cells, path: Path, choice: Choice) -> str:
    """Whose a file is that says it not itself; "" if nobody says."""
    return told.get("patient", "") or (path.parent.name if choice.patients_by_folder else "")


def _facts(path: Path, file: str, kind: Kind, choice: Choice) -> tuple[_Scan, Cells, str]:
    """What the file says of itself, the things that it is in, and its patient's identifier."""
    plain = _Scan(path, kind, 1, False, "", "", math.nan, "", Details(), {}, "")
    if kind == "nifti":
        from client.data import nifti

        volume = nifti.read_header(path)
        return (
            replace(plain, frames=volume.slices, sliced=volume.slices > 1, spacing=volume.spacing),
            {"file": file},
            "",
        )
    if kind == "picture":
        pages = count_images(path, kind)
        return replace(plain, frames=pages, sliced=pages > 1), {"file": file}, ""
    from client.data import dicom

    header = dicom.read_header(path)
    if header.burnt_in and not choice.keep_burnt_in:
        remedy = "look whether it names the patient; --keep-burnt-in takes such images"
        raise _Objection("it says that a text was drawn into its pixels", remedy)
    things = {"file": file, "series": header.series, "study": header.study, "patient": header.patient}
    facts = header.image, header.series, header.place, header.spacing, header.details
    return _Scan(path, kind, header.frames, header.frames > 1, *facts, {}, ""), things, header.patient


def _needed() -> None:
    try:
        require_extra()
    except UnreadableImageError as error:
        raise UsageError(str(error)) from None


def _once_each(scans: Iterator[_Scan], left_out: list[Problem]) -> list[_Scan]:
    """Of several files of one image the largest: a copy that broke off is the smaller one."""
    copies: defaultdict[str, list[_Scan]] = defaultdict(list)
    for scan in scans:
        copies[scan.image or str(scan.path)].append(scan)
    for same in copies.values():
        same.sort(key=lambda scan: -scan.path.stat().st_size)
        left_out += (
            Problem(str(scan.path), "the same image is in another file too", f"nothing: {same[0].path} is taken")
            for scan in same[1:]
        )
    return [same[0] for same in copies.values()]


def _chosen(scans: Iterable[_Scan], rule: SliceRule) -> Iterator[tuple[_Scan, tuple[int, ...]]]:
    """Each file of which something is wanted, with its frames. The single slices of a series are one volume; what their
    masks mark is known only when they are read."""
    volumes: defaultdict[tuple[str, str], list[_Scan]] = defaultdict(list)
    for scan in scans:
        if scan.frames == 1 and scan.series and not math.isnan(scan.place):
            volumes[scan.patient, scan.series].append(scan)
        elif frames := rule.choose(scan.frames):
            yield scan, frames
    for volume in volumes.values():
        volume.sort(key=lambda scan: scan.place)
        for index in rule.choose(len(volume)):
            yield replace(volume[index], sliced=len(volume) > 1), (0,)


def _job(
    source: Path, images: Path, masks: Path, scan: _Scan, frames: tuple[int, ...], names: Pseudonyms, choice: Choice
) -> Job:
    content = _version(scan.path)
    image = names.name("image", str(scan.path.relative_to(source)), content, repr(choice.window))
    job = Job(scan.path, scan.kind, frames, scan.frames, scan.sliced, choice.rule, images / image, window=choice.window)
    if "mask" not in scan.told:
        return job
    mask = source / scan.told["mask"]
    return replace(job, mask=masks / names.name("mask", image, str(mask), _version(mask)), mask_source=mask)


def _files_of(job: Job) -> Iterator[tuple[Path, Path]]:
    """What is written, and the originals that it is of."""
    yield job.image, job.path
    if job.mask is not None and job.mask_source is not None:
        yield job.mask, job.mask_source


def _version(path: Path) -> str:
    """Another one after each change of a file."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns}"


def _row(job: Job, frame: int, scan: _Scan, site: Path, names: Pseudonyms, choice: Choice) -> Cells:
    known = {name: _cell(getattr(scan.details, name)) for name in DETAILS}
    drawn = "test" if names.share(scan.patient) < choice.test_fraction else "train"
    return {
        "path": image_file(job.image, frame).relative_to(site).as_posix(),
        "label": scan.told.get("label", ""),
        "patient": scan.patient,
        "split": scan.told.get("split", drawn),
        **{name: scan.told.get(name, value) for name, value in known.items()},
        "spacing_mm": scan.spacing,
        "mask": image_file(job.mask, frame).relative_to(site).as_posix() if job.mask else "",
    }


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return "" if math.isnan(value) else f"{value:g}"


def _files(source: Path, site: Path, left_out: list[Problem]) -> Iterator[Path]:
    """Every ordinary file below `source`, in the order of their names; a link could lead anywhere."""
    own = site.resolve()

    def unopened(error: OSError) -> None:
        left_out.append(Problem(str(error.filename), f"cannot be opened ({type(error).__name__})", "check its mode"))

    for place, folders, files in os.walk(source, onerror=unopened):
        folders[:] = sorted(name for name in folders if Path(place, name).resolve() != own)
        for name in sorted(files):
            path = Path(place, name)
            if path.is_symlink() or not path.is_file():
                left_out.append(Problem(str(path), "it is a link, or no ordinary file", "copy what it leads to"))
            else:
                yield path


def _other_rows(manifest: Path, own: str) -> list[Cells]:
    """The rows of images from elsewhere."""
    if not manifest.exists():
        return []
    with manifest.open(encoding="utf-8-sig", newline="") as file:
        return [
            {name: cell or "" for name, cell in cells.items() if name}
            for cells in csv.DictReader(file)
            if not (cells.get("path") or "").startswith(own)
        ]


def _write_manifest(manifest: Path, rows: list[Cells]) -> None:
    columns = dict.fromkeys((*COLUMNS, *(name for cells in rows for name in cells)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(manifest, text.getvalue().encode())


def _remove_stale(site: Path, folder: str, rows: list[Cells]) -> None:
    """Images of files that changed, were left out since, or were interrupted half-way."""
    wanted = {cells[column] for cells in rows for column in ("path", "mask")}
    for kind in ("images", "masks"):
        for path in (site / kind / folder).glob("*"):
            if path.relative_to(site).as_posix() not in wanted:
                path.unlink()
