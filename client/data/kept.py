"""What a site's images became, kept in its state folder: the next start maps them and decodes nothing.

A file for each view (what a plan asks of images) and split: records of one size in the order of the rows, each the
fitted image and its mask; the keys of the files that they come from; a footer. Mapped read-only, so processes share it
and memory does not grow with the number of images.

Never stale: a record is taken only where path, size, inode, mtime and ctime of its files are what they were before they
were read, and were older then than the coarsest clock's tick (two writings within one tick have equal times). Other
software has other files, damage is found by a checksum: both are read anew. Removing the folder is always safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import logging
import math
import os
import shutil
import struct
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from client.data.rows import NO_PIXELS, SPLITS, Origin, Row, Source
from common.errors import DataError, Problem
from common.files import give_to_owner_of
from common.records import software_version

_DECODERS = ("numpy", "pillow", "pydicom", "python-gdcm", "nibabel")
_HALF = ".tmp"
_MAGIC = b"CONSIMG1"
_FOOTER = struct.Struct("<8s16sQ?I")  # magic, view, number of records, whether they have masks, CRC-32 of all before
_KEY = 16  # bytes
_NEVER = bytes(_KEY)  # the key of a record that must not be taken
_TICK_NS = 2 * 10**9  # of the coarsest clock of a file system, FAT's
_SPARE = 2**30  # bytes that stay free on the disk: the ledger needs them more
_AT_ONCE = 2**23  # bytes
_LEFT_BEHIND_S, _UNUSED_S = 86400.0, 90 * 86400.0  # after that a killed process's file, and any other, is removed

_log = logging.getLogger(__name__)


Pixels = tuple[np.ndarray, np.ndarray | None]  # images uint8 (n, C, S, S), masks uint8 (n, S, S)


class NotKept(Exception):
    """The disk takes no more; the images are there all the same."""


@dataclass(frozen=True)
class ImageStore:
    """A site's kept images, in its state folder, and who is told how it went."""

    state: Path
    log: logging.Logger = _log

    @property
    def folder(self) -> Path:
        return self.state / "images"

    def open(self, view: object, *, size: int, channels: int, terms: object = "") -> KeptImages | None:
        """What is kept for a view; None where nothing can be, or the site has no state yet. `terms`: what else decides
        which rows take part."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            give_to_owner_of(self.state, self.folder)
            return KeptImages(self, repr(view), repr(terms), (channels, size, size))
        except FileNotFoundError:
            return None
        except OSError as error:
            self.unusable(error)
            return None

    def unusable(self, error: Exception) -> None:
        """Say so; nobody has to mend it."""
        self.log.warning("images cannot be kept for the next start (%s): %s", self.folder, error)

    def forget(self) -> None:
        """The next start reads every image. Raises DataError if the files cannot be removed."""
        try:
            shutil.rmtree(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            what = f"cannot be removed ({type(error).__name__})"
            raise DataError(Problem(str(self.folder), what, "remove it as the user of the worker")) from None


class KeptImages:
    """The images of one view while a site is loaded: `found`, then `add` or `pass_over` for each row, then `finish`.

    Raises OSError where the folder cannot be written.
    """

    def __init__(self, store: ImageStore, view: str, terms: str, shape: tuple[int, int, int]) -> None:
        os.utime(store.folder)
        self._store, self._terms, self._opened_ns = store, terms, store.folder.stat().st_mtime_ns  # by the disk's clock
        digest = hashlib.sha256(f"{software()}/{view}/{shape}".encode()).digest()[:16]
        stem = f"{software()}-{digest[:6].hex()}"
        self._parts = {
            split: _Part(store, store.folder / f"{stem}-{split}", digest, shape) for split in sorted({*SPLITS.values()})
        }
        self._passed = _Part(store, store.folder / f"{stem}-passed", digest, (0, 0, 0))
        self.holds_any = any(part.old for part in (*self._parts.values(), self._passed))
        self._read = 0  # rows that take part and were not found

    def __enter__(self) -> KeptImages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for part in (*self._parts.values(), self._passed):
            part.close()

    def found(self, row: Row, source: Source | None, *, masked: bool, place: str = "") -> Row:
        """The row with its pixels and mask if they are kept, else with its origin alone. Without a source: as it is."""
        if source is None:
            return row
        origin = Origin(source, _digest(source.key, place), (row.label, row.split, row.details))
        record = self._parts[row.split].find(origin.key, masked=masked)
        if record is None and self._passed.old and self._passed.find(self._passed_key(origin), masked=False):
            record = NO_PIXELS, None
        pixels, mask = record or (row.pixels, row.mask)
        details, fitted = row.details, record is not None
        return Row(row.where, pixels, row.label, row.patient, row.split, mask, details, origin, fitted)

    def add(self, row: Row) -> None:
        """The next row that takes part. Raises NotKept."""
        key = row.origin.key if row.origin and self._lasting(row) else _NEVER
        self._parts[row.split].add(row, key)
        self._read += not row.fitted

    def pass_over(self, row: Row) -> None:
        """A sound row that takes no part. Raises NotKept."""
        key = self._passed_key(row.origin) if row.origin and self._lasting(row) else _NEVER
        self._passed.add(dataclasses.replace(row, pixels=NO_PIXELS, mask=None), key)

    def finish(self) -> dict[str, Pixels]:
        """(images (n, C, S, S), masks (n, S, S)) of each split, read-only, in the order in which they were added.

        Raises NotKept.
        """
        self._passed.finish()
        arrays = {split: part.finish() for split, part in self._parts.items()}
        self._sweep()
        total = sum(len(images) for images, _ in arrays.values())
        self._store.log.info("images: %d, of which %d were read; the others were kept", total, self._read)
        return arrays

    def _passed_key(self, origin: Origin) -> bytes:
        """What is told decides whether a row takes part."""
        return _digest(origin.key, repr(origin.told), self._terms)

    def _lasting(self, row: Row) -> bool:
        """Whether a file that changes will be seen to have changed, since before it was read."""
        if row.fitted or row.origin is None:
            return row.fitted
        source = row.origin.source
        return source.newest_ns + _TICK_NS <= self._opened_ns and Source.of(*source.files) == source

    def _sweep(self) -> None:
        """Remove what other software kept, what nobody used for long, and what a killed process left."""
        for path in self._store.folder.glob("*"):
            try:
                unused_s = time.time() - path.stat().st_mtime
                limit_s = _LEFT_BEHIND_S if path.suffix == _HALF else _UNUSED_S
                if unused_s > limit_s or not path.name.startswith(software()):
                    path.unlink()
            except OSError:  # another process was faster
                continue


@functools.cache
def software() -> str:
    """A digest of everything that makes pixels of files: this code, and the libraries that decode."""
    digest = hashlib.sha256(software_version().encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for name in _DECODERS:
        try:
            digest.update(f"/{name} {importlib.metadata.version(name)}".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"/{name} absent".encode())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class _Records:
    """A file of records, mapped."""

    keys: bytes
    records: np.ndarray  # uint8 (n, bytes of one)
    images: np.ndarray  # (n, C, S, S), a view
    masks: np.ndarray | None  # (n, S, S), a view

    def __len__(self) -> int:
        return len(self.records)

    def key(self, row: int) -> bytes:
        return self.keys[_KEY * row : _KEY * (row + 1)]


class _Part:
    """One file: what it held, and what it will hold. It is written anew from the first row on that differs."""

    def __init__(self, store: ImageStore, path: Path, view: bytes, shape: tuple[int, int, int]) -> None:
        self._store, self._path, self._view, self._shape = store, path, view, shape
        self.old = self._read()
        self._places: dict[bytes, int] | None = None
        self._next = 0  # row of `old` that is likely the next to be asked for
        self._count, self._masked = 0, False
        self._file: BinaryIO | None = None
        self._temporary = Path()
        self._keys, self._checksum, self._unchecked = bytearray(), 0, 0

    def find(self, key: bytes, *, masked: bool) -> tuple[np.ndarray, np.ndarray | None] | None:
        """(pixels (C, S, S), mask (S, S)), views of the file."""
        if self.old is None or (masked and self.old.masks is None):
            return None
        row = self._row_of(key, self.old)
        if row is None:
            return None
        return self.old.images[row], self.old.masks[row] if masked and self.old.masks is not None else None

    def add(self, row: Row, key: bytes) -> None:
        """Raises NotKept."""
        if row.pixels.size != math.prod(self._shape):
            raise ValueError(f"a row of shape {row.pixels.shape} among those of {self._shape}")
        if self._count == 0:
            self._masked = row.mask is not None  # or not all have one, and none is used
        if self._file is None and not (row.fitted and self._stands_at(self._count, key)):
            self._begin()
        if self._file is not None:
            self._keys += key
            self._write(self._file, row.pixels.tobytes())
            if self._masked:
                mask = np.zeros(self._shape[1:], np.uint8) if row.mask is None else row.mask
                self._write(self._file, mask.tobytes())
        self._count += 1

    def finish(self) -> Pixels:
        """The images and masks of every row that was added. Raises NotKept."""
        if self._file is None and self._count < len(self.old or ()):
            self._begin()
        if self._file is not None:
            self.old = self._committed(self._file)
        elif self.old is not None:
            self._used()
        return (self.old.images, self.old.masks) if self.old else (np.zeros((0, *self._shape), np.uint8), None)

    def close(self) -> None:
        """Leaves nothing half-written behind."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # of a full disk, said already
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file = None

    def _stands_at(self, row: int, key: bytes) -> bool:
        return self.old is not None and (self.old.masks is not None) == self._masked and self.old.key(row) == key

    def _row_of(self, key: bytes, old: _Records) -> int | None:
        if old.key(self._next) == key:
            self._next += 1
            return self._next - 1
        if self._places is None:
            self._places = {old.key(row): row for row in range(len(old))}
        row = self._places.get(key)
        self._next = self._next if row is None else row + 1
        return row

    def _begin(self) -> None:
        try:
            handle, name = tempfile.mkstemp(_HALF, software(), self._path.parent)  # mode 0600
        except OSError as error:
            raise NotKept(error) from None
        self._file, self._temporary = os.fdopen(handle, "wb"), Path(name)
        if self.old is not None and self._count:
            self._keys += self.old.keys[: _KEY * self._count]
            many = max(1, _AT_ONCE // max(1, self.old.records.shape[1]))
            for start in range(0, self._count, many):
                self._write(self._file, self.old.records[start : min(start + many, self._count)].tobytes())

    def _write(self, file: BinaryIO, content: bytes) -> None:
        try:
            if self._unchecked <= 0:
                self._unchecked = _AT_ONCE
                if shutil.disk_usage(self._path.parent).free < _SPARE:
                    raise NotKept("the disk is nearly full")
            file.write(content)
        except OSError as error:
            raise NotKept(error) from None
        self._unchecked -= len(content)
        self._checksum = zlib.crc32(content, self._checksum)

    def _committed(self, file: BinaryIO) -> _Records:
        """What was written, mapped before others see it: another process may replace the file at any time."""
        self._write(file, bytes(self._keys))
        self._write(file, _FOOTER.pack(_MAGIC, self._view, self._count, self._masked, self._checksum))
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            with self._temporary.open("rb") as written:
                found = _mapped(written, self._view, self._shape)
            give_to_owner_of(self._path.parent, self._temporary)
            if found is not None:
                os.replace(self._temporary, self._path)
        except OSError as error:
            raise NotKept(error) from None
        if found is None:
            raise NotKept("what was written is not what is there")
        self._file = None
        return found

    def _used(self) -> None:
        with contextlib.suppress(OSError):  # another process wrote it anew
            os.utime(self._path)

    def _read(self) -> _Records | None:
        """The file as it is; None if it is absent, or damaged, which is said."""
        try:
            with self._path.open("rb") as file:
                found = _mapped(file, self._view, self._shape)
        except FileNotFoundError:
            return None
        if found is None:
            self._store.log.warning("%s is damaged: its images are read anew", self._path)
        return found


def _mapped(file: BinaryIO, view: bytes, shape: tuple[int, int, int]) -> _Records | None:
    """The records of a file that is whole and of this view."""
    size, image, mask = os.fstat(file.fileno()).st_size, math.prod(shape), math.prod(shape[1:])
    if size < _FOOTER.size:
        return None
    file.seek(size - _FOOTER.size)
    magic, of, count, masked, checksum = _FOOTER.unpack(file.read())
    record = image + masked * mask
    if (magic, of, size) != (_MAGIC, view, count * (record + _KEY) + _FOOTER.size):
        return None
    file.seek(0)
    if _checksum(file, size - _FOOTER.size) != checksum:
        return None
    file.seek(count * record)
    keys, whole = file.read(count * _KEY), (count, record)
    records = np.asarray(np.memmap(file, np.uint8, "r", shape=whole)) if count * record else np.zeros(whole, np.uint8)
    images = records[:, :image].reshape(count, *shape)
    return _Records(keys, records, images, records[:, image:].reshape(count, *shape[1:]) if masked else None)


def _checksum(file: BinaryIO, size: int) -> int:
    """CRC-32 of the next `size` bytes, a few in memory at a time."""
    checksum = 0
    while size:
        read = file.read(min(size, _AT_ONCE))
        if not read:
            return -1
        checksum, size = zlib.crc32(read, checksum), size - len(read)
    return checksum


def _digest(key: bytes, *more: str) -> bytes:
    return hashlib.blake2b(key + "\0".join(more).encode(errors="surrogateescape"), digest_size=_KEY).digest()
