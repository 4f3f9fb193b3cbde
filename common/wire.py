"""Records as bytes: safetensors for the arrays, JSON in its header for the rest. Nothing in it can be executed.

Both crossings take it: the wall between a hospital's node and its worker, and Flower's messages.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.records import (
    Arrays,
    MalformedRecord,
    PrepareInstruction,
    Record,
    SiteReply,
    TrainInstruction,
    fields_and_arrays,
    record_of,
)
from common.timing import timed

LARGEST = 512 * 2**20  # bytes of a record
_LARGEST_HEADER = 2**22
_FIELDS, _ARRAYS, _CHANGES = "record", "arrays", "changes"

R = TypeVar("R", PrepareInstruction, TrainInstruction, SiteReply)


@timed("serialise")
def pack(record: Record) -> bytes:
    """A record as bytes."""
    fields, arrays = fields_and_arrays(record)
    return _save(arrays, metadata={_FIELDS: json.dumps(fields)})


@timed("serialise")
def unpack(data: bytes, kind: type[R]) -> R:
    """The record of type `kind` in `data`.

    Raises MalformedRecord if it is too large, torn, or anything but such a record.
    """
    arrays = _load(data)
    return record_of(_parse(_metadata(data)), arrays, kind)


@timed("serialise")
def encode(record: Record) -> RecordDict:
    """A record as the content of a Flower message.

    All arrays are one there, for Flower stores, sends and fetches each by calls of its own; the fields stand beside it,
    and what differs from node to node beside them, so that messages share what is the same, also where Flower stores.
    """
    fields, arrays = fields_and_arrays(record)
    packed = ArrayRecord({_ARRAYS: Array(np.frombuffer(_save(arrays), np.uint8))})
    return RecordDict({_ARRAYS: packed, _FIELDS: ConfigRecord({_FIELDS: json.dumps(fields)})})


def with_fields(content: RecordDict, **changes: int | str) -> RecordDict:
    """An encoded record with other fields, beside the very same ones and the very same arrays."""
    arrays, same = content.array_records[_ARRAYS], content.config_records[_FIELDS]
    return RecordDict({_ARRAYS: arrays, _FIELDS: same, _CHANGES: ConfigRecord({_FIELDS: json.dumps(changes)})})


@timed("serialise")
def decode(content: RecordDict, kind: type[R]) -> R:
    """The record of type `kind` in a Flower message's content.

    Raises MalformedRecord if there is anything but such a record.
    """
    try:
        data, fields = content.array_records[_ARRAYS][_ARRAYS].numpy(), content.config_records[_FIELDS][_FIELDS]
        changes = content.config_records.get(_CHANGES, {_FIELDS: "{}"})[_FIELDS]
    except Exception:  # Flower and NumPy raise what they like
        raise MalformedRecord("the message carries no record") from None
    if data.dtype != np.uint8:
        raise MalformedRecord("the message carries no bytes")
    return record_of(_parse(fields) | _parse(changes), _load(data.tobytes()), kind)


def _save(arrays: Arrays, metadata: dict[str, str] | None = None) -> bytes:
    plain = {name: np.asarray(value, order="C") for name, value in arrays.items()}  # save mixes up any other order
    packed: bytes = save(plain, metadata=metadata)
    return packed


def _load(data: bytes) -> Arrays:
    if len(data) > LARGEST:
        raise MalformedRecord("the record is too large")
    try:
        arrays: Arrays = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError):
        raise MalformedRecord("the arrays cannot be read") from None
    return arrays


def _metadata(data: bytes) -> object:
    """The fields in the header's metadata; safetensors puts 8 bytes of length before it."""
    length = int.from_bytes(data[:8], "little")
    if length > _LARGEST_HEADER:
        raise MalformedRecord("the fields cannot be read")
    try:
        return json.loads(data[8 : 8 + length])["__metadata__"][_FIELDS]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise MalformedRecord("the fields cannot be read") from None


def _parse(text: object) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > _LARGEST_HEADER:
        raise MalformedRecord("the fields cannot be read")
    return _parsed(text)


@lru_cache(maxsize=8)  # an instruction is the same for all nodes of a process, and holds a plan of all sites
def _parsed(text: str) -> dict[str, Any]:
    """Not to be changed."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedRecord("the fields cannot be read") from None
    if not isinstance(fields, dict):
        raise MalformedRecord("the fields cannot be read")
    return fields
