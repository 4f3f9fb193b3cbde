"""Records as bytes: safetensors for the arrays, JSON in its header for the rest. Nothing in it can be executed.

The same bytes cross the wall between a hospital's node and its worker, and travel in Flower's messages: there as one
array, since Flower stores, sends and fetches each array of a message by calls of its own.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
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
_FIELDS, _MESSAGE = "record", "message"

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


def encode(record: Record) -> RecordDict:
    """A record as the content of a Flower message."""
    return RecordDict({_MESSAGE: ArrayRecord({_FIELDS: Array(np.frombuffer(pack(record), np.uint8))})})


def decode(content: RecordDict, kind: type[R]) -> R:
    """The record of type `kind` in a Flower message's content.

    Raises MalformedRecord if there is anything but such a record.
    """
    try:
        data = content.array_records[_MESSAGE][_FIELDS].numpy()
    except Exception:  # Flower and NumPy raise what they like
        raise MalformedRecord("the message carries no record") from None
    if data.dtype != np.uint8:
        raise MalformedRecord("the message carries no bytes")
    return unpack(data.tobytes(), kind)


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
