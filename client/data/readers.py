"""Image files to 8-bit arrays, and arrays to the plan's size and channels.

Pictures deeper than 8 bits: each image's own darkest pixel becomes 0 and its brightest 255. DICOM: the file's
window. Either uses no other image, so nothing about another patient enters a pixel; absolute units (Hounsfield) are
given up.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, ImageSequence

Kind = Literal["picture", "dicom", "nifti", "other"]

NIFTI_1, NIFTI_2 = ((size, int.from_bytes(size.to_bytes(4, "big"), "little")) for size in (348, 540))  # either order
EXTRA = "DICOM and NIfTI need the extra 'imaging': pip install 'consilium[imaging]'"

_FORMATS = ("PNG", "JPEG", "TIFF")
_PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BARE_DICOM = (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0")  # no preamble
_LUMINANCE = "L"
MOST_PIXELS = 2**27  # of one image or stack: a damaged or hostile header fills no memory


class UnreadableImageError(ValueError):
    """Why an image or a mask cannot be used, in words that name no file and no patient."""


def kind_of(path: Path) -> Kind:
    """By the file's first bytes: a PACS export has no endings. Raises UnreadableImageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(352)
            if head.startswith(b"\x1f\x8b"):
                file.seek(0)
                head = _unpacked(file.read(65536))
    except FileNotFoundError:
        raise UnreadableImageError("there is no such file") from None
    except OSError as error:
        raise UnreadableImageError(f"the file cannot be opened ({type(error).__name__})") from None
    if head[128:132] == b"DICM":  # first: what stands before it may be another format's beginning
        return "dicom"
    if head.startswith(_PICTURES):
        return "picture"
    size, magic = int.from_bytes(head[:4], "little"), head[344:347]
    if (size in NIFTI_1 and magic == b"n+1") or (size in NIFTI_2 and head[4:7] == b"n+2"):
        return "nifti"
    return "dicom" if head.startswith(_BARE_DICOM) else "other"


def require_extra(*names: str) -> None:
    """Raise UnreadableImageError where the readers of DICOM and NIfTI, or the packages `names`, are not installed."""
    if not all(importlib.util.find_spec(name) for name in names or ("pydicom", "gdcm", "nibabel")):
        raise UnreadableImageError(EXTRA)


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) of a PNG, JPEG, TIFF, or of DICOM or NIfTI that hold one image; transparent is black.

    Raises UnreadableImageError.
    """
    kind = kind_of(path)
    if kind == "dicom":
        require_extra()
        from client.data import dicom

        return dicom.read_image(path)
    if kind == "nifti":
        require_extra()
        from client.data import nifti

        return nifti.read_image(path)
    return _read_picture(path)


def count_pages(path: Path) -> int:
    """Of a picture: more than one in a TIFF alone. Raises UnreadableImageError."""
    with _opened(path) as image:
        return getattr(image, "n_frames", 1) if image.format == "TIFF" else 1


def read_pages(path: Path) -> list[np.ndarray]:
    """Every page of a TIFF, as `read_image`; those deeper than 8 bits windowed from the darkest to the brightest pixel
    of all pages.

    Raises UnreadableImageError, also for pages of different sizes: those are no slices.
    """
    pages = _decode_all(path)
    if any(_is_deep(page) for page in pages):
        return list(to_uint8(np.stack([np.asarray(page) for page in pages])))
    return [_shown(page) for page in pages]


def _read_picture(path: Path) -> np.ndarray:
    return _shown(_decode(path))


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith(("I", "F"))


def _shown(image: Image.Image) -> np.ndarray:
    if _is_deep(image):
        return to_uint8(np.asarray(image))
    if image.mode == "1":
        return np.asarray(image.convert(_LUMINANCE))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer).convert("RGB"))
    return np.asarray(image if image.mode == _LUMINANCE else image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """uint8 (H, W): grey values or palette indices as they stand, 0 = background; colour: 1 where not black.

    Raises UnreadableImageError.
    """
    return _mask(_decode(path))


def read_masks(path: Path) -> list[np.ndarray]:
    """The same of every page. Raises UnreadableImageError."""
    return [_mask(page) for page in _decode_all(path)]


def _mask(image: Image.Image) -> np.ndarray:
    flat = image.mode in ("1", "L", "P") or image.mode.startswith("I")
    values = np.asarray(image) if flat else np.asarray(image.convert("RGB")).max(axis=2) > 0
    if values.dtype.kind != "b" and values.size and (values.min() < 0 or values.max() > 255):
        raise UnreadableImageError("the mask holds values above 255")
    return values.astype(np.uint8)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """8 bits as they are; other numbers windowed from their own minimum and maximum to 0..255.

    Raises UnreadableImageError if a pixel is not finite or no number.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind not in "uif":
        raise UnreadableImageError(f"the pixels are of type {values.dtype}, not numbers")
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise UnreadableImageError("a pixel is NaN or infinite")
    low, high = wide.min(), wide.max()
    scale = 255.0 / (high - low) if high > low else 0.0
    shown: np.ndarray = np.rint((wide - low) * scale).astype(np.uint8)
    return shown


def fit_image(pixels: np.ndarray, *, size: int, channels: int) -> np.ndarray:
    """uint8 (channels, size, size): luminance or replication, then Lanczos with antialiasing; never enlarged.

    The whole image is kept, so one that is not square is squeezed. Raises UnreadableImageError if a side is too short.
    """
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        raise UnreadableImageError(f"the image is {width}x{height} pixels; the plan needs at least {size}x{size}")
    image = Image.fromarray(pixels).convert(_LUMINANCE if channels == 1 else "RGB")
    if (height, width) != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(image)
    return array[None] if channels == 1 else np.moveaxis(array, 2, 0)


def fit_mask(mask: np.ndarray, *, size: int) -> np.ndarray:
    """uint8 (size, size), by nearest neighbour: a mask's values are names, not amounts."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def _unpacked(packed: bytes) -> bytes:
    """The beginning of what gzip packed; empty if it is no gzip."""
    try:
        return zlib.decompressobj(wbits=31).decompress(packed, 352)
    except zlib.error:
        return b""


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except UnreadableImageError:
        raise
    except FileNotFoundError:
        raise UnreadableImageError("there is no such file") from None
    except Exception:  # decoders raise whatever they like on a damaged file: OSError, SyntaxError, struct.error ...
        raise UnreadableImageError("the file is damaged, or no PNG, JPEG, TIFF, DICOM or NIfTI") from None


def _decode(path: Path) -> Image.Image:
    with _opened(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1:
            what = "`consilium-site data import` makes images of them" if image.format == "TIFF" else "save one alone"
            raise UnreadableImageError(f"the file holds {pages} pages; {what}")
        return ImageOps.exif_transpose(image)


def _decode_all(path: Path) -> list[Image.Image]:
    with _opened(path) as image:
        count = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if image.width * image.height * count > MOST_PIXELS:
            raise UnreadableImageError(f"the file says that it is {image.width}x{image.height}x{count} pixels large")
        if count == 1:
            return [_decode(path)]
        pages = [page.copy() for page in ImageSequence.Iterator(image)]
    if len({(page.size, page.mode) for page in pages}) > 1:
        what = f"its {count} pages are of different sizes or kinds, no slices of one stack"
        raise UnreadableImageError(f"{what}; save the one that is meant alone")
    return pages
