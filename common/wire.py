"""Records as bytes: safetensors for the arrays, JSON in its header for the rest. Nothing in it can be executed.

What crosses the wall between a hospital's node and its worker has this form.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.records import (
    MalformedRecord,
    PrepareInstruction,
    Record,
    SiteReply,
    TrainInstruction,
    fields_and_arrays,
    record_of,
)

LARGEST = 512 * 2**20  # bytes of a record
_LARGEST_HEADER = 2**22
_FIELDS = "record"

R = TypeVar("R", PrepareInstruction, TrainInstruction, SiteReply)


def pack(record: Record) -> bytes:
    """A record as bytes."""
    fields, arrays = fields_and_arrays(record)
    plain = {name: np.asarray(value, order="C") for name, value in arrays.items()}  # save mixes up any other order
    packed: bytes = save(plain, metadata={_FIELDS: json.dumps(fields)})
    return packed


def unpack(data: bytes, kind: type[R]) -> R:
    """The record of type `kind` in `data`.

    Raises MalformedRecord if it is too large, torn, or anything but such a record.
    """
    if len(data) > LARGEST:
        raise MalformedRecord("the record is too large")
    try:
        arrays = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError):
        raise MalformedRecord("the arrays cannot be read") from None
    return record_of(_fields(data), arrays, kind)


def _fields(data: bytes) -> dict[str, Any]:
    """The header's metadata; safetensors puts 8 bytes of length before it."""
    length = int.from_bytes(data[:8], "little")
    try:
        if length > _LARGEST_HEADER:
            raise ValueError
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_FIELDS])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MalformedRecord("the fields cannot be read") from None
    if not isinstance(fields, dict):
        raise MalformedRecord("the fields cannot be read")
    return fields
