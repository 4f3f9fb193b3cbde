"""Which plans this site approved. The worker runs its own copy of an approved plan, never the one it was sent."""

from __future__ import annotations

import json
import time
from pathlib import Path

from common.errors import NotApproved
from common.files import write_atomically
from common.plan import StudyPlan, plan_from_json

_FOLDER = "approved"


def approve(state: Path, plan: StudyPlan, *, by: str) -> None:
    """Record that `by` approved `plan` at this site; approving it again changes nothing."""
    file = _file(state, plan.digest)
    if file.exists():
        return
    record = {"plan": plan.to_json(), "approved_by": by, "time": time.time()}
    write_atomically(file, json.dumps(record, indent=1).encode())


def require(state: Path, plan_digest: str) -> StudyPlan:
    """The site's own copy of the approved plan.

    Raises NotApproved if no plan of that digest was approved here, or its record was changed.
    """
    file = _file(state, plan_digest)
    try:
        plan = plan_from_json(json.loads(file.read_text())["plan"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotApproved(f"{file}: {type(error).__name__}") from None
    if plan.digest != plan_digest:
        raise NotApproved(f"{file} was changed after the approval")
    return plan


def _file(state: Path, digest: str) -> Path:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise NotApproved("the plan digest is no SHA-256")
    return state / _FOLDER / f"{digest}.json"
