"""A contact sheet: some images of every label, with their masks' outlines, as one PNG for the hospital's own eyes."""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from client.data.rows import Row
from common.files import write_atomically

_SIDE, _GAP, _LINE = 150, 8, 18  # pixels
_ACROSS, _MOST_LABELS = 8, 12
_PAPER, _INK, _OUTLINE = (250, 250, 248), (30, 30, 34), (255, 90, 0)


@dataclass
class Sheet:
    """Keeps a few small pictures of each label while the rows pass by: those whose place has the smallest digest."""

    _kept: defaultdict[str, dict[bytes, tuple[str, Image.Image]]] = field(default_factory=lambda: defaultdict(dict))
    _seen: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def look(self, row: Row) -> None:
        """At one image, as its file gives it."""
        kept, rank = self._kept[row.label], hashlib.sha256(row.where.encode()).digest()
        self._seen[row.label] += 1
        if len(kept) >= _ACROSS and rank >= max(kept):
            return
        kept[rank] = (_caption(row), _small(row))
        if len(kept) > _ACROSS:
            del kept[max(kept)]

    def write(self, path: Path) -> None:
        """Labels below each other, in the order of their names."""
        labels = sorted(self._kept)
        shown, rest = labels[:_MOST_LABELS], len(labels) - _MOST_LABELS
        block = _LINE + _SIDE + _LINE + _GAP
        size = (_ACROSS * (_SIDE + _GAP) + _GAP, len(shown) * block + _GAP + (_LINE if rest > 0 else 0))
        sheet = Image.new("RGB", size, _PAPER)
        draw = ImageDraw.Draw(sheet)
        title, small = ImageFont.load_default(15), ImageFont.load_default(11)
        for number, label in enumerate(shown):
            top = _GAP + number * block
            draw.text((_GAP, top), label or "no label", fill=_INK, font=title)
            for column, rank in enumerate(sorted(self._kept[label])):
                caption, picture = self._kept[label][rank]
                left = _GAP + column * (_SIDE + _GAP)
                offset = ((_SIDE - picture.width) // 2, (_SIDE - picture.height) // 2)
                draw.rectangle((left, top + _LINE, left + _SIDE - 1, top + _LINE + _SIDE - 1), fill=(0, 0, 0))
                sheet.paste(picture, (left + offset[0], top + _LINE + offset[1]))
                draw.text((left, top + _LINE + _SIDE + 2), caption, fill=_INK, font=small)
        if rest > 0:
            draw.text((_GAP, size[1] - _LINE), f"labels that are not shown: {rest}", fill=_INK, font=small)
        packed = io.BytesIO()
        sheet.save(packed, "PNG")
        write_atomically(path, packed.getvalue())


def _caption(row: Row) -> str:
    """Where it is listed: "line 7", or "row 7" of an npz."""
    _, colon, line = row.where.rpartition(":")
    place = f"line {line}" if colon and line.isdigit() else f"row {row.where.rpartition(' ')[2]}"
    return f"{place}, {row.split}"


def _small(row: Row) -> Image.Image:
    picture = Image.fromarray(row.pixels).convert("RGB")
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if row.mask is None:
        return picture
    mask = np.pad(np.asarray(Image.fromarray(row.mask).resize(picture.size, Image.Resampling.NEAREST)) > 0, 1)
    inside = mask[1:-1, :-2] & mask[1:-1, 2:] & mask[:-2, 1:-1] & mask[2:, 1:-1]
    pixels = np.array(picture)
    pixels[mask[1:-1, 1:-1] & ~inside] = _OUTLINE
    return Image.fromarray(pixels)
