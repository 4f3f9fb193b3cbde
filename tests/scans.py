"""DICOM files that tests write, plain and compressed, and GDCM as a reader of its own beside pydicom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="the extra 'imaging' is not installed")
gdcm = pytest.importorskip("gdcm", reason="the extra 'imaging' is not installed")

SYNTAXES = {
    "jpeg": "JPEGLosslessProcess14_1",
    "jpeg-ls": "JPEGLSLossless",
    "jpeg-2000": "JPEG2000Lossless",
    "rle": "RLELossless",
    "big-endian": "ExplicitVRBigEndian",
}


def dicom(path: Path, pixels: np.ndarray, **attributes: Any) -> Path:
    """A file of these stored values, (H, W), (frames, H, W) or RGB (H, W, 3); `attributes` by their DICOM keyword."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    coloured = pixels.ndim == 3 and pixels.shape[-1] == 3
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    plain = {
        "SOPClassUID": SecondaryCaptureImageStorage,
        "SOPInstanceUID": generate_uid(),
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": "1.2.3.4.5",
        "Modality": "OT",
        "PatientID": "P1",
        "PatientName": "Doe^Jane",
        "Rows": pixels.shape[0 if coloured else -2],
        "Columns": pixels.shape[1 if coloured else -1],
        "SamplesPerPixel": 3 if coloured else 1,
        "PhotometricInterpretation": "RGB" if coloured else "MONOCHROME2",
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": 8 * pixels.dtype.itemsize,
        "HighBit": 8 * pixels.dtype.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
    }
    if coloured:
        plain["PlanarConfiguration"] = 0
    elif pixels.ndim == 3:
        plain["NumberOfFrames"] = len(pixels)
    for name, value in (plain | attributes).items():
        setattr(dataset, name, value)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def compressed(path: Path, syntax: str) -> Path:
    """The same image beside it, in a transfer syntax of SYNTAXES, lossless."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, SYNTAXES[syntax])))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    written = path.with_name(f"{path.stem}-{syntax}")
    writer.SetFileName(str(written))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return written


def by_gdcm(path: Path) -> np.ndarray:
    """The stored values of all frames as GDCM alone reads them: (frames, H, W) or (frames, H, W, 3)."""
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    image = reader.GetImage()
    form = image.GetPixelFormat()
    kind = {0: "u1", 1: "i1"}.get(form.GetPixelRepresentation()) if form.GetBitsAllocated() == 8 else None
    kind = kind or ("i2" if form.GetPixelRepresentation() else "u2")
    width, height = image.GetDimension(0), image.GetDimension(1)
    frames = image.GetDimension(2) if image.GetNumberOfDimensions() == 3 else 1
    colours = form.GetSamplesPerPixel()
    content = image.GetBuffer().encode("utf-8", errors="surrogateescape")
    if form.GetBitsAllocated() == 1:  # least significant first
        return np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little").reshape(frames, height, width)
    values = np.frombuffer(content, dtype=kind)
    if image.GetPlanarConfiguration():
        return np.moveaxis(values.reshape(frames, colours, height, width), 1, 3)
    return values.reshape((frames, height, width) + ((colours,) if colours > 1 else ()))
