"""Records as bytes and in Flower's messages: what goes in comes out; anything else is malformed, never an accident."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

import common.wire
from common.records import MalformedRecord, PrepareInstruction, Record, SiteReply, TrainInstruction
from common.wire import decode, encode, pack, unpack

FLOATS = arrays(np.float32, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
NAMES = some.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__" and name.isprintable())
NAMED = some.dictionaries(NAMES, FLOATS, max_size=3)
TEXT, COUNT, NUMBER = some.text(max_size=20), some.integers(-(2**63), 2**63), some.floats()
PREPARE = some.builds(PrepareInstruction, TEXT, TEXT, TEXT, NAMED, COUNT, TEXT)
TRAIN = some.builds(TrainInstruction, TEXT, TEXT, COUNT, NAMED, COUNT, TEXT)
REPLY = some.builds(
    SiteReply, TEXT, TEXT, TEXT, TEXT, TEXT, COUNT, NAMED, NUMBER, COUNT, NUMBER, COUNT, TEXT, NUMBER
)  # fmt: skip
KINDS = (PrepareInstruction, TrainInstruction, SiteReply)
GOOD = TrainInstruction("a" * 64, "b" * 64, 3, {"body.weight": np.arange(6, dtype=np.float32).reshape(2, 3)})


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, nan among them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, np.ndarray):
        return bool(one.shape == other.shape and one.dtype == other.dtype and one.tobytes() == other.tobytes())
    return one == other or (math.isnan(one) and math.isnan(other))


def with_fields(values: object, **tensors: np.ndarray) -> bytes:
    """A well-formed container around `values`."""
    return save(tensors, metadata={"record": json.dumps(values)})


def container(header: object, body: bytes = b"") -> bytes:
    """safetensors by hand: also what its own writer would not write."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@settings(max_examples=60, deadline=None)
@given(PREPARE | TRAIN | REPLY)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    kind: Any = type(record)
    for back in (unpack(pack(record), kind), decode(encode(record), kind)):
        assert type(back) is type(record)
        assert all(same(getattr(record, field.name), getattr(back, field.name)) for field in fields(record))


def message(arrays: object = None, fields: object = None) -> RecordDict:
    """A Flower message's content."""
    content = encode(GOOD)
    if arrays is not None:
        content["arrays"] = ArrayRecord({"arrays": arrays} if isinstance(arrays, Array) else {})
    if fields is not None:
        content["record"] = ConfigRecord({"record": fields})  # type: ignore[dict-item]
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "carries no record"),
        (message(arrays=()), "carries no record"),
        (message(arrays=Array("uint8", (3,), "numpy.ndarray", b"not numpy")), "carries no record"),
        (message(arrays=Array(np.zeros(9, np.float32))), "carries no bytes"),
        (message(arrays=Array(np.zeros((9, 9), np.uint8))), "the arrays cannot be read"),
        (message(fields=b"{}"), "the fields cannot be read"),
        (message(fields="[]"), "the fields cannot be read"),
        (message(fields="[" * 200_000), "the fields cannot be read"),
        (message(fields=json.dumps({"plan_digest": "a"})), "fields differ"),
    ],
    ids=["empty", "no array", "no numpy", "no bytes", "zeros", "bytes", "a list", "deep", "few fields"],
)
def test_a_message_without_a_record_is_malformed(content: RecordDict, reason: str) -> None:
    with pytest.raises(MalformedRecord, match=reason):
        decode(content, TrainInstruction)


def test_a_message_is_one_array_however_many_a_record_has() -> None:
    """Flower pays several calls for each."""
    many = replace(GOOD, shared={str(n): np.zeros(n, np.float32) for n in range(50)})
    (record,) = encode(many).array_records.values()
    assert len(record) == 1


def test_only_a_reply_may_carry_masked_numbers() -> None:
    masked = {"w": np.arange(3, dtype=np.uint32)}
    assert np.array_equal(decode(encode(SiteReply("alder", "ok", update=masked)), SiteReply).update["w"], masked["w"])
    with pytest.raises(MalformedRecord, match="an array is not float32"):
        decode(encode(TrainInstruction("p", "i", 1, masked)), TrainInstruction)


def test_messages_that_differ_in_fields_share_their_arrays() -> None:
    """Flower stores what is equal once: a hundred hospitals are one model there."""
    one = encode(GOOD)
    other = common.wire.with_fields(one, round=4)
    assert other.array_records["arrays"].object_id == one.array_records["arrays"].object_id
    assert decode(other, TrainInstruction).round == 4
    assert decode(one, TrainInstruction).round == 3


def test_an_array_in_another_order_comes_back_in_value() -> None:
    turned = replace(GOOD, shared={"w": GOOD.shared["body.weight"].T, "s": np.arange(9, dtype=np.float32)[::2]})
    back = unpack(pack(turned), TrainInstruction).shared
    assert np.array_equal(back["w"], turned.shared["w"])
    assert np.array_equal(back["s"], turned.shared["s"])


@settings(max_examples=100, deadline=None)
@given(some.binary(max_size=200), some.sampled_from(KINDS))
def test_any_bytes_are_malformed(data: bytes, kind: Any) -> None:
    with pytest.raises(MalformedRecord):
        unpack(data, kind)


@settings(max_examples=150, deadline=None)
@given(some.data())
def test_a_changed_record_is_a_record_or_malformed(data: some.DataObject) -> None:
    """Cut, spliced or with some bytes changed; nothing else is raised."""
    packed = bytearray(pack(GOOD))
    start = data.draw(some.integers(0, len(packed)))
    packed[start : start + data.draw(some.integers(0, 12))] = data.draw(some.binary(max_size=12))
    with contextlib.suppress(MalformedRecord):
        assert isinstance(unpack(bytes(packed), TrainInstruction), TrainInstruction)


@settings(max_examples=60, deadline=None)
@given(
    some.recursive(
        some.none() | some.booleans() | some.integers(0, 2**64) | some.sampled_from(["F32", "F64", "BF16", "I8", "x"]),
        lambda deeper: (
            some.lists(deeper, max_size=3)
            | some.dictionaries(some.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "record"]), deeper)
        ),
    ),
    some.binary(max_size=16),
)
def test_any_header_is_malformed(header: object, body: bytes) -> None:
    with pytest.raises(MalformedRecord):
        unpack(container(header, body), TrainInstruction)


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1])
def test_a_torn_record_is_malformed(keep: int) -> None:
    with pytest.raises(MalformedRecord, match="the arrays cannot be read"):
        unpack(pack(GOOD)[:keep], TrainInstruction)


@pytest.mark.parametrize("kind", [PrepareInstruction, SiteReply])
def test_one_record_is_not_taken_for_another(kind: Any) -> None:
    with pytest.raises(MalformedRecord, match="fields differ"):
        unpack(pack(GOOD), kind)


@pytest.mark.parametrize(
    "values",
    [[], None, 1, "x", {}, {"plan_digest": "a", "initial_digest": "b"},
     {"plan_digest": "a", "initial_digest": "b", "roster": "", "round": 1, "more": 1},
     {"plan_digest": "a", "initial_digest": "b", "roster": "", "round": True},
     {"plan_digest": "a", "initial_digest": "b", "roster": "", "round": 1.0},
     {"plan_digest": None, "initial_digest": "b", "roster": "", "round": 1},
     {"plan_digest": "a", "initial_digest": "b", "roster": "", "round": 1, "shared": {}}],
    ids=str,
)  # fmt: skip
def test_a_field_that_is_missing_unknown_or_of_another_type_is_malformed(values: object) -> None:
    with pytest.raises(MalformedRecord):
        unpack(with_fields(values), TrainInstruction)


@pytest.mark.parametrize("kind", [np.float64, np.float16, np.int32, np.uint8, np.bool_])
def test_only_float32_is_an_array(kind: Any) -> None:
    values = {"plan_digest": "a", "initial_digest": "b", "roster": "", "round": 1, "ledger_rows": 0, "ledger_head": ""}
    assert unpack(with_fields(values, w=np.zeros(2, np.float32)), TrainInstruction).round == 1
    with pytest.raises(MalformedRecord, match="an array is not float32"):
        unpack(with_fields(values, w=np.zeros(2, kind)), TrainInstruction)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}},
        {"__metadata__": {"record": "[" * 200_000}},
        {"__metadata__": {"record": "\ud800"}},
        {"__metadata__": {"record": "1" * 5000}},
        {"__metadata__": {}},
        {},
        b"[" * 200_000,
        b"\xff\xfe",
    ],
    ids=lambda header: str(header)[:50],
)
def test_a_hostile_header_is_malformed(header: object) -> None:
    with pytest.raises(MalformedRecord):
        unpack(container(header, bytes(4)), TrainInstruction)
    with pytest.raises(MalformedRecord):
        unpack(container(header), TrainInstruction)


def test_what_is_too_large_is_not_even_read(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(GOOD)
    monkeypatch.setattr(common.wire, "LARGEST", len(packed))
    assert unpack(packed, TrainInstruction).round == 3
    monkeypatch.setattr(common.wire, "LARGEST", len(packed) - 1)
    with pytest.raises(MalformedRecord, match="the record is too large"):
        unpack(packed, TrainInstruction)
    monkeypatch.undo()
    monkeypatch.setattr(common.wire, "_LARGEST_HEADER", 100)
    with pytest.raises(MalformedRecord, match="the fields cannot be read"):
        unpack(packed, TrainInstruction)
