"""The wire format: what goes in comes out; anything else is a MalformedRecord and nothing worse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from common.records import MalformedRecord, PrepareInstruction, SiteReply, TrainInstruction, decode, encode

parameters = st.dictionaries(
    st.text(min_size=1, max_size=20),
    arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=st.floats(width=32, allow_nan=False)),
    max_size=3,
)
replies = st.builds(
    SiteReply,
    site=st.text(max_size=9),
    code=st.sampled_from(["ok", "refused"]),
    round=st.integers(0, 10_000),
    update=parameters,
    accuracy=st.floats(0, 1) | st.just(math.nan),
    epsilon=st.floats(0, 100),
)
instructions = st.builds(
    TrainInstruction, plan_digest=st.text(max_size=9), initial_digest=st.text(max_size=9), round=st.integers(1, 99),
    shared=parameters,
)  # fmt: skip
preparations = st.builds(PrepareInstruction, plan_json=st.text(max_size=99), initial=parameters)


@given(replies | instructions | preparations)
def test_what_goes_in_comes_out(record: SiteReply | TrainInstruction | PrepareInstruction) -> None:
    got = decode(encode(record), type(record))
    for name, value in record.__dict__.items():
        other = getattr(got, name)
        if isinstance(value, dict):
            assert value.keys() == other.keys()
            assert all(np.array_equal(value[key], other[key]) for key in value)
        else:
            assert value == other or (math.isnan(value) and math.isnan(other))


REPLY = SiteReply(site="alder", code="ok", update={"w": np.zeros(3, np.float32)})


def spoiled(**changes: object) -> RecordDict:
    content = encode(REPLY)
    fields = dict(content.config_records["fields"]) | changes
    content["fields"] = ConfigRecord({name: value for name, value in fields.items() if value is not None})  # type: ignore[misc]
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RecordDict(), "a part is missing"),
        (spoiled(site=None), r"fields differ: \['site'\]"),
        (spoiled(patients=3), r"fields differ: \['patients'\]"),
        (spoiled(round="1"), "field round is no int"),
        (spoiled(round=True), "field round is no int"),
        (spoiled(epsilon=1), "field epsilon is no float"),
    ],
)
def test_another_form_is_malformed(content: RecordDict, reason: str) -> None:
    with pytest.raises(MalformedRecord, match=reason):
        decode(content, SiteReply)


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8])
def test_arrays_are_float32_only(dtype: type) -> None:
    content = encode(REPLY)
    content["arrays"] = ArrayRecord({"w": Array(np.zeros(3, dtype))})
    with pytest.raises(MalformedRecord, match="an array is not float32"):
        decode(content, SiteReply)


def test_array_bytes_that_are_no_array_are_malformed() -> None:
    content = encode(REPLY)
    content["arrays"] = ArrayRecord({"w": Array("float32", (3,), "numpy.ndarray", b"not numpy")})
    with pytest.raises(MalformedRecord, match="an array cannot be read"):
        decode(content, SiteReply)


def test_only_a_reply_may_carry_masked_numbers() -> None:
    masked = {"w": np.arange(3, dtype=np.uint32)}
    assert np.array_equal(decode(encode(SiteReply("alder", "ok", update=masked)), SiteReply).update["w"], masked["w"])
    with pytest.raises(MalformedRecord, match="an array is not float32"):
        decode(encode(TrainInstruction("p", "i", 1, masked)), TrainInstruction)
