"""What the lab and a site say to each other; `common.wire` gives it its form.

Every field of a reply is either charged to the site's ledger or independent of the site's data; the comment beside it
says which.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

PREPARE = "query.prepare"  # Flower message types
TRAIN = "train.round"

Arrays = dict[str, np.ndarray]


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


@dataclass(frozen=True)
class SiteReply:
    """Site to lab. `code` is 'ok' or the code of a Refusal."""

    site: str  # data-independent: the registered name
    code: str  # data-independent: a closed list (common.errors)
    reason: str = ""  # data-independent: the Refusal's public_reason
    version: str = ""  # data-independent
    plan_digest: str = ""  # data-independent
    round: int = 0  # data-independent
    update: Arrays = field(default_factory=dict)  # charged: function of private gradient queries
    accuracy: float = math.nan  # charged: private statistic query; nan if the plan asks for none
    queries: int = 0  # data-independent: private queries charged for this round, fixed by the plan
    epsilon: float = 0.0  # data-independent: the ledger's total, a function of charges
    ledger_rows: int = 0  # data-independent
    ledger_head: str = ""  # data-independent: hash over charges
    seconds: float = 0.0  # wall time in a coarse bucket (powers of two)

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

    Raises MalformedRecord if a field is missing, unknown, of another type, or an array is not float32.
    """
    expected = {k: v for k, v in kind.__dataclass_fields__.items() if k != _ARRAYS_FIELD[kind]}
    if fields.keys() != expected.keys():
        raise MalformedRecord(f"fields differ: {sorted(fields.keys() ^ expected.keys())}")
    for name, spec in expected.items():
        wanted = {"str": str, "int": int, "float": float}[str(spec.type)]
        if type(fields[name]) is not wanted:
            raise MalformedRecord(f"field {name} is no {spec.type}")
    if any(value.dtype != np.float32 for value in arrays.values()):
        raise MalformedRecord("an array is not float32")
    values: dict[str, Any] = {**fields, _ARRAYS_FIELD[kind]: arrays}
    return kind(**values)


_ARRAYS_FIELD: dict[type, str] = {PrepareInstruction: "initial", TrainInstruction: "shared", SiteReply: "update"}
