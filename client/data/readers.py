"""Image files to 8-bit arrays, and arrays to the plan's size and channels.

Deeper than 8 bits: each image's own darkest pixel becomes 0 and its brightest 255. That uses no other image, so
nothing about another patient enters a pixel; absolute units (Hounsfield) are given up.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_FORMATS = ("PNG", "JPEG", "TIFF")
_LUMINANCE = "L"


class UnreadableImageError(ValueError):
    """Why an image or a mask cannot be used, in words that name no file and no patient."""


def read_image(path: Path) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) of a PNG, JPEG or TIFF; transparency lies on black.

    Raises UnreadableImageError.
    """
    image = _decode(path)
    if image.mode.startswith(("I", "F")):
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
    image = _decode(path)
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


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            pages = getattr(image, "n_frames", 1)
            image.load()
            upright = ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UnreadableImageError("there is no such file") from None
    except Exception:  # decoders raise whatever they like on a damaged file: OSError, SyntaxError, struct.error ...
        raise UnreadableImageError("the file is damaged, or no PNG, JPEG or TIFF") from None
    if pages > 1:
        raise UnreadableImageError(f"the file holds {pages} pages; one image per file")
    return upright
