"""One file of a hospital's archive to 8-bit PNGs that hold pixels and nothing else. Runs in a process of its own: a
decoder that crashes on a damaged file takes nobody with it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from client.data.pixels import Window
from client.data.readers import Kind, UnreadableImageError, kind_of, read_masks
from client.data.slices import SliceRule
from client.data.stacks import is_segmentation, read_stack
from common.files import write_atomically
from common.processes import process_pool

_AHEAD = 4  # files waiting for each process


@dataclass(frozen=True)
class Job:
    """One file, and where its images go: `image`-FRAME.png and `mask`-FRAME.png."""

    path: Path
    kind: Kind
    frames: tuple[int, ...]  # of `stack`
    stack: int  # how many the file holds
    sliced: bool  # they, or it, are of a volume
    rule: SliceRule
    image: Path
    mask: Path | None = None
    mask_source: Path | None = None
    window: Window | None = None


def image_file(stem: Path, frame: int) -> Path:
    """Of one frame."""
    return stem.with_name(f"{stem.name}-{frame:04d}.png")


def convert(job: Job) -> tuple[int, ...]:
    """Write the chosen frames that are not there yet; returns all that are chosen. Raises UnreadableImageError."""
    masks = _masks(job) if job.mask_source else None
    frames = job.frames
    if job.rule.margin is not None and job.sliced:
        frames = job.rule.marked(masks) if masks is not None else ()
    missing = [frame for frame in frames if not _there(job, frame)]
    for frame, pixels in zip(missing, read_stack(job.path, job.kind, missing, job.window), strict=True):
        if masks is not None and job.mask is not None:
            _same_size(masks[frame], pixels)
            _write(image_file(job.mask, frame), masks[frame])
        _write(image_file(job.image, frame), pixels)
    return frames


def convert_all(jobs: Iterable[Job], processes: int) -> Iterator[tuple[Job, tuple[int, ...] | UnreadableImageError]]:
    """Every job with its frames, or why it has none, as they are done."""
    waiting, rest = dict[Future[tuple[int, ...]], Job](), iter(jobs)
    pool = _pool(processes)
    try:
        while True:
            lost: list[Job] = []
            while not lost and len(waiting) < _AHEAD * processes and (job := next(rest, None)):
                try:
                    waiting[pool.submit(convert, job)] = job
                except BrokenProcessPool:
                    lost.append(job)
            if not waiting and not lost:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job = waiting.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    lost.append(job)
                else:
                    yield job, _outcome(future)
            if lost:  # one of those in work is to blame
                lost += waiting.values()
                waiting.clear()
                pool.shutdown()
                yield from _one_by_one(lost)
                pool = _pool(processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(jobs: Iterable[Job]) -> Iterator[tuple[Job, tuple[int, ...] | UnreadableImageError]]:
    pool = _pool(1)
    try:
        for job in jobs:
            try:
                yield job, _outcome(pool.submit(convert, job))
            except BrokenProcessPool:
                pool.shutdown()
                pool = _pool(1)
                yield job, UnreadableImageError("the file is damaged: its decoder crashes on it")
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(future: Future[tuple[int, ...]]) -> tuple[int, ...] | UnreadableImageError:
    try:
        return future.result()
    except UnreadableImageError as error:
        return error
    except MemoryError:
        return UnreadableImageError("there is not enough memory for it")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # a reader's own surprise
        return UnreadableImageError(f"the file is damaged ({type(error).__name__})")


def _pool(processes: int) -> ProcessPoolExecutor:
    return process_pool(processes, preload=__name__)


def _masks(job: Job) -> Sequence[np.ndarray]:
    """uint8 (H, W) for every frame of the stack."""
    path = job.mask_source or job.path
    try:
        masks = _mask_slices(path, job)
    except UnreadableImageError as error:
        raise UnreadableImageError(f"its mask: {error}") from None
    if len(masks) != job.stack:
        raise UnreadableImageError(f"its mask has {len(masks)} slices, it has {job.stack}")
    return masks


def _mask_slices(path: Path, job: Job) -> Sequence[np.ndarray]:
    kind = kind_of(path)
    if kind == "nifti":
        from client.data import nifti

        return list(nifti.read_mask(path, nifti.read_header(job.path if job.kind == "nifti" else path)))
    if job.kind == "dicom" and is_segmentation(path):
        from client.data import segmentation

        return segmentation.read_masks(path, job.path)
    if kind == "dicom":
        from client.data import dicom

        return [_small(values) for values in dicom.read_values(path, range(dicom.count_frames(path)))]
    return read_masks(path)


def _small(values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or values.min() < 0 or values.max() > 255:
        raise UnreadableImageError("the mask holds values that are no whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _same_size(mask: np.ndarray, pixels: np.ndarray) -> None:
    if mask.shape != pixels.shape[:2]:
        sizes = "its mask is {1}x{0} pixels, it is {3}x{2}".format(*mask.shape, *pixels.shape[:2])
        raise UnreadableImageError(sizes)


def _there(job: Job, frame: int) -> bool:
    mask = job.mask is None or image_file(job.mask, frame).exists()
    return mask and image_file(job.image, frame).exists()


def _write(path: Path, pixels: np.ndarray) -> None:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG", compress_level=1)
    write_atomically(path, packed.getvalue())
