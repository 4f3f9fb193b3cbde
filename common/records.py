"""What the lab and a site say to each other; `common.wire` gives it its form.

`SiteReply` is the whole list of what leaves a hospital: every field says which private query it is charged to, or why
it does not depend on the hospital's data. A field that says neither does not import. What a person reads before
approving a study (`common.plan_in_words`) is made from this list.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, TypeVar

import numpy as np

PREPARE = "query.prepare"  # Flower message types
TRAIN = "train.round"

_DISCLOSURE = "disclosure"

Arrays = dict[str, np.ndarray]


@cache  # 2 ms, and every reply says it
def software_version() -> str:
    """The installed version, or 'source' for an uninstalled checkout."""
    try:
        return importlib.metadata.version("consilium")
    except importlib.metadata.PackageNotFoundError:
        return "source"


@dataclass(frozen=True)
class PrepareInstruction:
    """Lab to site, once per run: the plan as the lab signed it, and the parameters from which the run starts."""

    plan_json: str
    signer: str  # the lab's public key, hex; empty in simulation
    signature: str
    initial: Arrays  # the whole body and, if shared, the head
    ledger_rows: int = 0  # what the lab saw of this site's ledger, in whatever study
    ledger_head: str = ""  # empty: nothing yet


@dataclass(frozen=True)
class TrainInstruction:
    """Lab to site: compute the update of one round."""

    plan_digest: str
    initial_digest: str
    round: int  # 1-based
    shared: Arrays  # the trainable shared parameters
    ledger_rows: int = 0  # as in PrepareInstruction
    ledger_head: str = ""
    roster: str = ""  # who takes part in the round's secure sum, with their masking keys; empty without one


@dataclass(frozen=True)
class Disclosure:
    """Why a field of a reply may leave the hospital."""

    words: str  # what it is, for a reader
    why: str  # charged: the private queries it is a function of; else: why it does not depend on data
    charged: bool


def _charged(words: str, why: str) -> dict[str, Disclosure]:
    return {_DISCLOSURE: Disclosure(words, why, charged=True)}


def _public(words: str, why: str) -> dict[str, Disclosure]:
    return {_DISCLOSURE: Disclosure(words, why, charged=False)}


def disclosures(kind: type) -> dict[str, Disclosure]:
    """The declaration of every field of the dataclass `kind`. Raises TypeError if one has none, or an empty one."""
    declared = {spec.name: spec.metadata.get(_DISCLOSURE) for spec in fields(kind)}
    for name, disclosure in declared.items():
        if disclosure is None or not disclosure.words or not disclosure.why:
            raise TypeError(f"{kind.__name__}.{name} would leave the hospital without a charge or a reason: declare it")
    return {name: disclosure for name, disclosure in declared.items() if disclosure is not None}


@dataclass(frozen=True)
class SiteReply:
    """Site to lab. `code` is 'ok' or the code of a Refusal."""

    site: str = field(metadata=_public("the hospital's name", "it is registered with the lab"))
    code: str = field(metadata=_public("ok or the code of a refusal", "of the data it says only who is enrolled"))
    reason: str = field(default="", metadata=_public("a refusal's fixed reason", "it speaks of plan and limits"))
    version: str = field(default="", metadata=_public("the software's version", "it is installed"))
    plan_digest: str = field(default="", metadata=_public("the plan's digest", "the plan is public"))
    round: int = field(default=0, metadata=_public("the round", "the lab asked for it"))
    update: Arrays = field(default_factory=dict, metadata=_charged("the update", "the algorithm's private queries"))
    accuracy: float = field(default=math.nan, metadata=_charged("the score", "one private statistic; nan if none"))
    queries: int = field(default=0, metadata=_public("the number of private queries", "the plan fixes it"))
    epsilon: float = field(default=0.0, metadata=_public("the ledger's epsilon", "a function of what was charged"))
    ledger_rows: int = field(default=0, metadata=_public("the ledger's length", "one row for each charge"))
    ledger_head: str = field(
        default="", metadata=_public("the ledger's last hash", "over charges, their times, and hashes of the journal")
    )
    seconds: float = field(
        default=0.0, metadata=_public("a wall time rounded up to a power of two", "coarse: client.reply_time")
    )
    masking_key: str = field(default="", metadata=_public("a public key for masks", "drawn at random for the study"))
    masked_for: str = field(default="", metadata=_public("the digest of whose masks it has", "the lab named them"))

    @property
    def ok(self) -> bool:
        return self.code == "ok"


Record = PrepareInstruction | TrainInstruction | SiteReply
R = TypeVar("R", PrepareInstruction, TrainInstruction, SiteReply)


class MalformedRecord(ValueError):
    """What came is not of the expected form; the text names the field, never a value."""


def fields_and_arrays(record: Record) -> tuple[dict[str, Any], Arrays]:
    """A record's plain fields, and its arrays."""
    fields = dict(record.__dict__)
    return fields, fields.pop(_ARRAYS_FIELD[type(record)])


def record_of(fields: Mapping[str, Any], arrays: Arrays, kind: type[R]) -> R:
    """The record of type `kind` with these fields.

    Raises MalformedRecord if a field is missing, unknown, of another type, or an array is not float32 (a reply's may be
    uint32: masked).
    """
    expected = {k: v for k, v in kind.__dataclass_fields__.items() if k != _ARRAYS_FIELD[kind]}
    if fields.keys() != expected.keys():
        raise MalformedRecord(f"fields differ: {sorted(fields.keys() ^ expected.keys())}")
    for name, spec in expected.items():
        wanted = {"str": str, "int": int, "float": float}[str(spec.type)]
        if type(fields[name]) is not wanted:
            raise MalformedRecord(f"field {name} is no {spec.type}")
    if any(str(value.dtype) not in _DTYPES[kind] for value in arrays.values()):
        raise MalformedRecord("an array is not float32")
    values: dict[str, Any] = {**fields, _ARRAYS_FIELD[kind]: arrays}
    return kind(**values)


_ARRAYS_FIELD: dict[type, str] = {PrepareInstruction: "initial", TrainInstruction: "shared", SiteReply: "update"}
_DTYPES: dict[type, tuple[str, ...]] = {
    PrepareInstruction: ("float32",),
    TrainInstruction: ("float32",),
    SiteReply: ("float32", "uint32"),
}

DISCLOSURES = disclosures(SiteReply)
