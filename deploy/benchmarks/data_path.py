"""From files to tensors: a site's first start, its second from what it kept, and a plain torch Dataset beside them.

    python -m deploy.benchmarks.data_path

writes sites of drawn images of each kind of file (256 x 256 pixels, for a network of 64 x 64; and 100 000 small PNGs
under one manifest) and prints one table.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from client.data.kept import ImageStore
from client.data.load import load_site
from common.command_line import run
from common.images import normalise
from common.plan import StudyPlan
from deploy.benchmarks.machine import begin_peak, peak, processor

SIDE, FITTED, SMALL = 256, 64, 32  # pixels
BATCH = 64
DIFFERENT = 50  # images; the rest are copies of these files
LARGE = 20_000  # of a site of more images only the cached start is repeated: the others take minutes
SETTLED_S = 2.5  # until a file is old enough to be trusted
LABELS = ("normal", "nodule")
COLUMNS = ("files", "read by", "start, s", "pass, s", "images/s", "peak MB, start", "peak MB, pass", "beside Dataset")
LEGEND = """\
start: every image is read, checked and fitted, or found unchanged; a plain Dataset only reads its table. pass: all
images once, at random, in batches of 64, as the network's input. images/s: of start and pass together. peak MB: what
the process needed by then above its imports, pages of mapped files among it. beside Dataset: images/s by the Dataset's.
In brackets how many fresh processes the medians are over; of the large site the first start also writes what it keeps.
The files lie in the page cache.
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Read = Callable[[Path], np.ndarray]


@dataclass(frozen=True)
class Files:
    """One kind of files: how one image of twelve bits is written, and how a plain Dataset would read it."""

    name: str
    write: Callable[[Path, np.ndarray], None] | None  # None: all images in one npz
    read: Read | None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Of one process."""

    start_s: float
    pass_s: float
    start_mb: float
    pass_mb: float


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Eight bits."""
    Image.fromarray((pixels >> 4).astype(np.uint8)).save(path, "PNG")


def read_png(path: Path) -> np.ndarray:
    """By PIL."""
    return np.asarray(Image.open(path).convert("L"))


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    """Twelve bits with a window, not compressed."""
    from pydicom.dataset import Dataset as Header
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    header = Header()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.SOPInstanceUID, header.Modality, header.PatientID = generate_uid(), "CT", "phantom"
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
    header.RescaleSlope, header.RescaleIntercept, header.WindowCenter, header.WindowWidth = 1, -1024, 1024, 2048
    header.PixelData = pixels.astype(np.uint16).tobytes()
    header.save_as(path, enforce_file_format=True)


def write_jpeg_2000(path: Path, pixels: np.ndarray) -> None:
    """The same, compressed without loss."""
    import gdcm

    write_dicom(path, pixels)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    if not reader.Read():
        raise OSError(f"{path} cannot be read")
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEG2000Lossless))
    change.SetInput(reader.GetImage())
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    if not change.Change():
        raise OSError(f"{path} cannot be compressed")
    writer.SetImage(change.GetOutput())
    if not writer.Write():
        raise OSError(f"{path} cannot be written")


def read_dicom(path: Path) -> np.ndarray:
    """By pydicom, with its own rescale and window."""
    from pydicom import dcmread
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    header = dcmread(path)
    shown = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header)
    low, high = shown.min(), shown.max()
    grey: np.ndarray = ((shown - low) * (255 / max(high - low, 1))).astype(np.uint8)
    return grey


IMAGING = ("pydicom", "gdcm", "nibabel")
KINDS = (
    Files("PNG", write_png, read_png),
    Files("DICOM", write_dicom, read_dicom, IMAGING),
    Files("DICOM, JPEG 2000", write_jpeg_2000, read_dicom, IMAGING),
    Files("npz", None, None),
)


def write_site(folder: Path, kind: Files, *, images: int, side: int) -> Path:
    """A site of drawn images, three of each patient."""
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    drawn = list(_draw(min(images, DIFFERENT), side))
    patients = [f"p{row // 3}" for row in range(images)]
    source = "npz: data.npz" if kind.write is None else "manifest: manifest.csv"
    (folder / "site.yaml").write_text(f"name: alder\n{source}\nbudget: {{epsilon: 8, delta: 0.001}}\n")
    if kind.write is None:
        pixels = np.stack([(drawn[row % len(drawn)] >> 4).astype(np.uint8) for row in range(images)])
        columns = {"labels": np.arange(images) % 2, "label_names": np.array(LABELS)}
        np.savez_compressed(folder / "data.npz", images=pixels, patient_ids=patients, **columns)
        return folder
    (folder / "images").mkdir()
    for row, pixels in enumerate(drawn):
        kind.write(folder / f"images/{row:06d}", pixels)
    for row in range(len(drawn), images):
        shutil.copyfile(folder / f"images/{row % len(drawn):06d}", folder / f"images/{row:06d}")
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("path", "label", "patient"))
        table.writerows((f"images/{row:06d}", LABELS[row % 2], patients[row]) for row in range(images))
    return folder


def ours(folder: Path, fitted: int, *, keep: bool) -> Iterator[Tensor]:
    """The batches of a pass by the product; the start is done when this returns."""
    plan = _plan(fitted)
    data = load_site(folder, plan, split="train", store=ImageStore(folder / "state") if keep else None)
    return (data.inputs(rows) for rows in _shuffled(len(data)).split(BATCH))


class Pictures(Dataset[Tensor]):
    """What a user would write instead: decodes and fits when asked."""

    def __init__(self, folder: Path, fitted: int, read: Read | None) -> None:
        self._folder, self._fitted, self._read = folder, fitted, read
        if read is None:
            with np.load(folder / "data.npz") as arrays:
                self._rows = list(arrays["images"])
        else:
            with (folder / "manifest.csv").open(newline="") as file:
                self._rows = [row["path"] for row in csv.DictReader(file)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Tensor:
        pixels = self._rows[row] if self._read is None else self._read(self._folder / self._rows[row])
        image = Image.fromarray(pixels).resize((self._fitted, self._fitted), Image.Resampling.LANCZOS)
        return normalise(torch.from_numpy(np.asarray(image)[None].copy()))


def plain(folder: Path, fitted: int, *, read: Read | None) -> Iterator[Tensor]:
    """The same by a plain Dataset and DataLoader."""
    pictures = Pictures(folder, fitted, read)
    return iter(DataLoader(pictures, batch_size=BATCH, sampler=_shuffled(len(pictures)).tolist()))


def cost(images: int, start: Callable[[], Iterator[Tensor]]) -> Cost:
    """Of a start and a pass, in a process of their own. Raises ValueError unless so many images come."""
    context = multiprocessing.get_context("fork")  # the imports are done, and counted for nobody
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(start, sending))
    child.start()
    sending.close()
    seen, found = receiving.recv()
    child.join()
    if seen != images:
        raise ValueError(f"{seen} of {images} images came")
    return found  # type: ignore[no-any-return]


def _measure(start: Callable[[], Iterator[Tensor]], sending: Connection) -> None:
    before, began = begin_peak(), time.perf_counter()
    batches = start()
    started, by_start = time.perf_counter(), peak()
    seen = sum(len(batch) for batch in batches)
    pass_s, whole = time.perf_counter() - started, peak()
    sending.send((seen, Cost(started - began, pass_s, (by_start - before) / 2**20, (whole - before) / 2**20)))


def rows_of(kind: str, folder: Path, fitted: int, read: Read | None, *, images: int, repeats: int) -> Iterator[str]:
    """Of one site: read at every start, from what was kept, and by the plain Dataset."""
    time.sleep(SETTLED_S)
    read_all, kept = (functools.partial(ours, folder, fitted, keep=keep) for keep in (False, True))
    by_dataset, first = functools.partial(plain, folder, fitted, read=read), cost(images, kept)
    fewer = 1 if images > LARGE else repeats
    costs = [
        [first] if images > LARGE else [cost(images, read_all) for _ in range(repeats)],
        [cost(images, kept) for _ in range(repeats)],
        [cost(images, by_dataset) for _ in range(fewer)],
    ]
    speeds = [images / (middle.start_s + middle.pass_s) for middle in map(_median, costs)]
    for who, some, speed in zip(("Consilium, not cached", "Consilium, cached", "Dataset"), costs, speeds, strict=True):
        middle = _median(some)
        seconds = [f"{middle.start_s:.2f}", f"{middle.pass_s:.2f}", f"{speed:.0f}"]
        memory = [f"{middle.start_mb:.0f}", f"{middle.pass_mb:.0f}"]
        yield _line(f"{images} {kind}", f"{who} ({len(some)})", *seconds, *memory, f"{speed / speeds[-1]:.2f}")


def table(place: Path, *, images: int, many: int, repeats: int) -> Iterator[str]:
    """The lines of the table."""
    yield _line(*COLUMNS)
    yield _line(*["---"] * len(COLUMNS))
    for number, kind in enumerate(KINDS):
        missing = [name for name in kind.needs if importlib.util.find_spec(name) is None]
        if missing:
            yield _line(kind.name, f"not measured: {', '.join(missing)} not installed", *[""] * (len(COLUMNS) - 2))
            continue
        folder = write_site(place / str(number), kind, images=images, side=SIDE)
        yield from rows_of(kind.name, folder, FITTED, kind.read, images=images, repeats=repeats)
        shutil.rmtree(folder)
    folder = write_site(place / "many", KINDS[0], images=many, side=SMALL)
    yield from rows_of("small PNG", folder, SMALL, KINDS[0].read, images=many, repeats=repeats)


@app.command()
def main(
    images: Annotated[int, typer.Option(min=10, help="Of each kind.")] = 250,
    many: Annotated[int, typer.Option(min=10, help="Of the large manifest.")] = 100_000,
    repeats: Annotated[int, typer.Option(min=1, help="Processes for each figure.")] = 5,
) -> None:
    """Images a second from files to tensors, cached and not, beside a plain Dataset."""
    torch.set_num_threads(1)
    typer.echo(f"{processor()}, {os.cpu_count()} processors, 1 thread, torch {torch.__version__}\n")
    with tempfile.TemporaryDirectory(prefix="data-path-") as place:
        for line in table(Path(place), images=images, many=many, repeats=repeats):
            typer.echo(line)
    typer.echo(f"\n{LEGEND}")


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(1))


def _draw(count: int, side: int) -> Iterator[np.ndarray]:
    """uint16 (side, side) of twelve bits, smooth and noisy."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(200, 3600, (12, 12)).astype(np.float32))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        yield (smooth + rng.normal(0, 40, (side, side))).clip(0, 4095).astype(np.uint16)


def _plan(fitted: int) -> StudyPlan:
    kind = {"kind": "classification", "image_size": fitted, "channels": 1, "label_sets": {"sign": list(LABELS)}}
    study = {"study": "data-path", "task": kind, "sites": {"alder": {"labels": "sign", "patients": 2}}, "quorum": 1}
    model = {"name": "conv4", "width": 8, "trainable": "all"}
    algorithm = {"name": "reptile", "inner_steps": 1, "inner_lr": 0.1}
    private = {"sampling": {"sample_rate": 0.5}, "privacy": {"epsilon": 8.0}}
    return StudyPlan.model_validate({**study, "model": model, "algorithm": algorithm, "rounds": 1, **private})


def _median(costs: Sequence[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*map(dataclasses.astuple, costs), strict=True)))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    run(app)
