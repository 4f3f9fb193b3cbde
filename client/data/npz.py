"""A site's or a data set's images in one `.npz`, never unpickled.

Two forms:
    images, labels, patient_ids  [label_names, split, masks, has_mask, site, modality, age, sex, scanner]
    train_images, train_labels   [val_..., test_...]                 MedMNIST; it names no patients, so there each
                                                                     image counts as a patient of its own
Images (n, H, W), (n, H, W, 1) or (n, H, W, 3); labels text, or whole numbers that index label_names where given.
Rows whose has_mask is False have no mask, whatever masks holds there. Age in years, nan or empty where unknown.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.data.kept import KeptImages
from client.data.readers import UnreadableImageError, to_uint8
from client.data.rows import DETAILS, NO_PIXELS, SPLIT_WORDS, SPLITS, Details, Row, Source, read_details
from common.errors import Problem

_PARTS = ("train", "val", "test")
_PIXELS = ("images", "masks")  # how the names of large arrays end
_PER_ROW = ("labels", "patient_ids", "split", "site", *DETAILS)

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class NpzTable:
    """The columns of one npz; all have n entries."""

    path: Path
    images: np.ndarray  # any numeric type, (n, H, W) or (n, H, W, 3)
    labels: tuple[str, ...]
    label_names: tuple[str, ...]  # in class-index order; sorted where the file gives no order
    patients: tuple[str, ...]
    splits: tuple[str, ...]  # as written; "" where the file has none
    masks: np.ndarray | None  # uint8 (n, H, W)
    has_mask: np.ndarray  # bool (n,)
    details: tuple[Details, ...]
    sites: tuple[str, ...] | None  # the hospital of each row, in a file that pools several
    has_patients: bool  # False: each image counts as its own patient

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, row: int) -> str:
        """Rows count from 0, as in the arrays."""
        return f"{self.path} row {row}"


def read_npz(path: Path, problems: list[Problem], *, labelled: bool = True, pixels: bool = True) -> NpzTable | None:
    """The file's columns, or None with the reasons added to `problems`. Unless `labelled`, every label is empty; unless
    `pixels`, every pixel is 0 and takes no memory."""
    arrays = _load(path, problems, pixels=pixels)
    if arrays is None:
        return None
    medmnist = "train_images" in arrays
    if medmnist:
        arrays = _pool_parts(path, arrays, problems)
    if not labelled and "images" in arrays:
        arrays |= {"labels": np.full(len(np.atleast_1d(arrays["images"])), ""), "label_names": np.array([""])}
    if not _is_whole(path, arrays, problems):
        return None
    images = arrays["images"]
    label_names, labels = _labels(path, arrays, problems)
    count = len(images)
    if len(labels) != count:
        return None
    return NpzTable(
        path,
        images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images,
        labels,
        label_names,
        _text(arrays["patient_ids"]),
        _text(arrays["split"]) if "split" in arrays else ("",) * count,
        arrays.get("masks"),
        arrays.get("has_mask", np.full(count, "masks" in arrays)),
        _details(path, arrays, problems),
        _text(arrays["site"]) if "site" in arrays else None,
        not medmnist,
    )


def npz_rows(
    path: Path, problems: list[Problem], *, labelled: bool = True, kept: KeptImages | None = None
) -> Iterator[Row]:
    """Each row that can be used; every other row adds to `problems`. `labelled`: each must have a label."""
    source = Source.of(str(path.resolve())) if kept is not None else None
    hollow = kept is not None and kept.holds_any
    table = read_npz(path, problems, labelled=labelled, pixels=not hollow)
    if table is None:
        return
    for index in range(len(table)):
        split = SPLITS.get(table.splits[index].lower())
        if split is None:
            problems.append(Problem(table.where(index), "unknown split", f"write {SPLIT_WORDS}"))
            continue
        if not table.patients[index]:
            problems.append(Problem(table.where(index), "the patient's id is empty", "give every row a pseudonym"))
            continue
        label, patient, details = table.labels[index], table.patients[index], table.details[index]
        row = Row(table.where(index), NO_PIXELS, label, patient, split, None, details)
        masked = table.masks is not None and bool(table.has_mask[index])
        if kept is not None:
            row = kept.found(row, source, place=str(index), masked=masked)
        if row.fitted:
            yield row
            continue
        if hollow:
            hollow, whole = False, read_npz(path, [], labelled=labelled)
            if whole is None or source is None or Source.of(*source.files) != source:
                problems.append(Problem(str(path), "was changed while it was read", "try again"))
                return
            table = whole
        try:
            pixels = to_uint8(table.images[index])
        except UnreadableImageError as error:
            problems.append(Problem(table.where(index), f"image: {error}", "mend or leave out the row"))
            continue
        mask = table.masks[index] if masked and table.masks is not None else None
        yield dataclasses.replace(row, pixels=pixels, mask=mask)


def _load(path: Path, problems: list[Problem], *, pixels: bool) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise zipfile.BadZipFile
            large = () if pixels else (name for name in archive.files if name.endswith(_PIXELS))
            hollow = {name: array for name in large if (array := _hollow(path, name)) is not None}
            return {name: hollow[name] if name in hollow else archive[name] for name in archive.files}
    except FileNotFoundError:
        problems.append(Problem(str(path), "there is no such file", "check the path"))
    except ValueError as error:
        if "pickle" in str(error) and zipfile.is_zipfile(path):
            remedy = "save plain numbers and text: labels as int64 or '<U', no dtype=object"
            problems.append(Problem(str(path), "holds pickled objects, which are never opened", remedy))
        else:
            problems.append(Problem(str(path), "is not an npz file", "write it with numpy.savez_compressed"))
    except Exception as error:  # zipfile, zlib and numpy raise many types on a damaged archive
        what = f"is damaged, or not an npz file ({type(error).__name__}: {error})"
        problems.append(Problem(str(path), what, "write it with numpy.savez_compressed"))
    return None


def _hollow(path: Path, name: str) -> np.ndarray | None:
    """Zeros of the array's shape and type that take no memory; None for what is not numbers."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return None if dtype.hasobject else np.broadcast_to(np.zeros((), dtype), shape)


def _one_after_another(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Of one shape but for their lengths."""
    if any(arrays[0].strides) or not arrays[0].size:
        return np.concatenate(arrays)
    return np.broadcast_to(np.zeros((), np.result_type(*arrays)), (sum(map(len, arrays)), *arrays[0].shape[1:]))


def _pool_parts(path: Path, arrays: Arrays, problems: list[Problem]) -> Arrays:
    """MedMNIST's train, val and test parts one after the other, in the form with one array each."""
    parts = [part for part in _PARTS if f"{part}_images" in arrays]
    bare = [part for part in parts if f"{part}_labels" not in arrays]
    problems += [Problem(str(path), f"{part}_images has no {part}_labels") for part in bare]
    unequal = [p for p in parts if p not in bare and len(arrays[f"{p}_images"]) != len(arrays[f"{p}_labels"])]
    problems += [Problem(str(path), f"{part}_images and {part}_labels differ in length") for part in unequal]
    shapes = {arrays[f"{part}_images"].shape[1:] for part in parts}
    if len(shapes) > 1:
        problems.append(Problem(str(path), "its parts hold images of different sizes"))
    if bare or unequal or len(shapes) > 1:
        return {}
    split = np.concatenate([np.full(len(arrays[f"{part}_images"]), part) for part in parts])
    pooled = {name: _one_after_another([arrays[f"{part}_{name}"] for part in parts]) for name in ("images", "labels")}
    names = {name: arrays[name] for name in ("label_names",) if name in arrays}
    return {**pooled, **names, "split": split, "patient_ids": np.arange(len(split))}


def _is_whole(path: Path, arrays: Arrays, problems: list[Problem]) -> bool:
    """Whether the columns are there, and their shapes and types agree."""
    if not arrays:
        return False
    missing = [name for name in ("images", "labels", "patient_ids") if name not in arrays]
    if missing:
        remedy = "give images, labels, patient_ids; or MedMNIST's train_images, train_labels"
        problems.append(Problem(str(path), f"missing array: {', '.join(missing)}", remedy))
        return False
    found: list[str] = []
    images, masks = arrays["images"], arrays.get("masks")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or 0 in images.shape[1:]:
        found.append(f"images has shape {images.shape}; allowed: (n, H, W), (n, H, W, 1), (n, H, W, 3)")
    if images.dtype.kind not in "uif":
        found.append(f"images is of type {images.dtype}; allowed: whole or floating-point numbers")
    if masks is not None and (masks.dtype not in (np.uint8, np.bool_) or masks.shape[1:] != images.shape[1:3]):
        found.append(f"masks is {masks.dtype} {masks.shape}; allowed: uint8 or bool, the images' (n, H, W)")
    elif masks is not None:
        arrays["masks"] = masks.view(np.uint8)
    if "has_mask" in arrays and (arrays["has_mask"].dtype != np.bool_ or arrays["has_mask"].ndim != 1):
        found.append(f"has_mask is {arrays['has_mask'].dtype} {arrays['has_mask'].shape}; allowed: bool, one a row")
    if "has_mask" in arrays and masks is None:
        found.append("has_mask is there, but masks is missing")
    for name in (*_PER_ROW, "label_names"):
        if name not in arrays:
            continue
        if arrays[name].ndim == 2 and arrays[name].shape[1] == 1:
            arrays[name] = arrays[name][:, 0]
        kinds, allowed = ("uifU", "number") if name == "age" else ("uiU", "whole number")
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in kinds:
            found.append(f"{name} is {arrays[name].dtype} {arrays[name].shape}; allowed: one {allowed} or text a row")
    for name in (*_PER_ROW, "masks", "has_mask"):
        if name in arrays and arrays[name].shape[:1] != images.shape[:1]:
            found.append(f"{name} has {len(np.atleast_1d(arrays[name]))} rows, images has {len(np.atleast_1d(images))}")
    problems += [Problem(str(path), what) for what in found]
    return not found


def _labels(path: Path, arrays: Arrays, problems: list[Problem]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(label names, the label of each row); numbers outside label_names become problems."""
    labels = arrays["labels"]
    if labels.dtype.kind == "U" or "label_names" not in arrays:
        text = _text(labels)
        return (_text(arrays["label_names"]) if "label_names" in arrays else tuple(sorted(set(text)))), text
    names = _text(arrays["label_names"])
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    problems += [
        Problem(f"{path} row {row}", f"the label's number is not below {len(names)}, the length of label_names")
        for row in outside
    ]
    return names, tuple(names[i] if 0 <= i < len(names) else "" for i in labels) if not len(outside) else ()


def _details(path: Path, arrays: Arrays, problems: list[Problem]) -> tuple[Details, ...]:
    """What is known of each row; an age that is none becomes a problem."""
    count = len(arrays["images"])
    columns = {name: _text(arrays[name]) if name in arrays else ("",) * count for name in DETAILS}
    if "age" in arrays and arrays["age"].dtype.kind == "f":
        columns["age"] = tuple("" if np.isnan(age) else str(age) for age in arrays["age"].tolist())
    return tuple(
        read_details(f"{path} row {row}", **{name: columns[name][row] for name in DETAILS}, problems=problems)
        for row in range(count)
    )


def _text(values: np.ndarray) -> tuple[str, ...]:
    return tuple(str(value).strip() for value in values.tolist())
