"""Which plans this site approved. The worker runs its own copy of an approved plan, never the one it was sent.

STATE/pending/DIGEST.json    signed plans that were sent and wait for a person
STATE/approved/DIGEST.json   what a person approved: the signed plan, who, when
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import DataError, NotApproved, Problem, UntrustedDocument
from common.files import write_atomically
from common.keys import STUDY, SignedDocument
from common.plan import StudyPlan, plan_from_json

_PENDING, _APPROVED = "pending", "approved"
_MOST_PENDING = 50  # a lab that sends more is not heard until somebody looked


def signed_plan(document: SignedDocument, *, lab_key: str) -> StudyPlan:
    """The plan in `document`, signed by the lab. Raises UntrustedDocument."""
    body = document.verified(STUDY, signer=lab_key)
    try:
        return plan_from_json(body)
    except (ValueError, RecursionError):
        raise UntrustedDocument("what the lab signed is no plan that this version can read") from None


def submit(state: Path, plan: StudyPlan, document: SignedDocument) -> bool:
    """Keep a verified plan until a person decides; False for one that was decided, is there, or is one too many."""
    if _file(state, _APPROVED, plan.digest).exists() or _file(state, _PENDING, plan.digest).exists():
        return False
    if len(list((state / _PENDING).glob("*.json"))) >= _MOST_PENDING:
        return False
    write_atomically(_file(state, _PENDING, plan.digest), document.to_json().encode())
    return True


def known(state: Path, digest: str) -> bool:
    """Whether a plan of that digest waits here or was approved."""
    try:
        return _file(state, _APPROVED, digest).exists() or _file(state, _PENDING, digest).exists()
    except NotApproved:
        return False


def pending(state: Path) -> Mapping[str, SignedDocument]:
    """The signed plans that wait, by digest; a file that is none is left out."""
    found = {}
    for file in sorted((state / _PENDING).glob("*.json")):
        try:
            found[file.stem] = SignedDocument(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            continue
    return found


def approve(state: Path, plan: StudyPlan, *, by: str, document: SignedDocument | None = None) -> None:
    """Record that `by` approved `plan` at this site; approving it again changes nothing.

    `document` is the plan as the lab signed it; a simulation has none.
    """
    file = _file(state, _APPROVED, plan.digest)
    if not file.exists():
        signed = None if document is None else asdict(document)
        record = {"plan": plan.to_json(), "approved_by": by, "time": time.time(), "signed": signed}
        write_atomically(file, json.dumps(record, indent=1).encode())
    _file(state, _PENDING, plan.digest).unlink(missing_ok=True)


def withdraw(state: Path, digest: str) -> bool:
    """Take an approval back: from now on the study is refused. False if there was none."""
    file = _file(state, _APPROVED, digest)
    if not file.exists():
        return False
    file.rename(file.with_suffix(f".withdrawn-{time.time_ns()}"))
    return True


@dataclass(frozen=True)
class Approval:
    """What a person approved."""

    plan: StudyPlan
    by: str
    time: float  # seconds since 1970


def approved(state: Path) -> Mapping[str, Approval]:
    """Every approval, by digest. Raises DataError for a record that cannot be read."""
    return {file.stem: _approval(file) for file in sorted((state / _APPROVED).glob("*.json"))}


def _approval(file: Path) -> Approval:
    try:
        record = json.loads(file.read_text())
        return Approval(plan_from_json(record["plan"]), str(record["approved_by"]), float(record["time"]))
    except (ValueError, KeyError, TypeError) as error:
        what = f"a record cannot be read ({type(error).__name__})"
        raise DataError(
            Problem(str(file), what, "its study is refused; remove it and approve the study again")
        ) from None


def require(state: Path, plan_digest: str) -> StudyPlan:
    """The site's own copy of the approved plan.

    Raises NotApproved if no plan of that digest was approved here, or its record was changed.
    """
    file = _file(state, _APPROVED, plan_digest)
    try:
        plan = plan_from_json(json.loads(file.read_text())["plan"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotApproved(f"{file}: {type(error).__name__}") from None
    if plan.digest != plan_digest:
        raise NotApproved(f"{file} was changed after the approval")
    return plan


def _file(state: Path, kind: str, digest: str) -> Path:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise NotApproved("the plan digest is no SHA-256")
    return state / kind / f"{digest}.json"
