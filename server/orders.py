"""A study that the lab runs with real hospitals: LAB/runs/STUDY/ holds the order beside the run itself.

study.signed.json   the plan, signed
start.safetensors   the whole starting point
order.json          how long to wait for hospitals; Flower's run
outcome.json        how the ServerApp ended, if it ended on purpose; a killed one leaves none
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from common.files import write_atomically
from common.keys import STUDY, SignedDocument, read_signed, sign
from common.plan import StudyPlan, plan_from_json
from server.lab import Lab

SIGNED, START = "study.signed.json", "start.safetensors"
_ORDER, _OUTCOME = "order.json", "outcome.json"


@dataclass(frozen=True)
class Order:
    """What `consilium-lab run` asked for."""

    wait_s: float
    flower_run: int | None = None


def ledgers_of(folder: Path) -> Path:
    """Where the lab of the ordered study in `folder` keeps what it saw of the hospitals' ledgers."""
    return folder.parents[1] / "ledgers"


def sign_study(lab: Lab, plan: StudyPlan) -> SignedDocument:
    """The plan, signed with the lab's key."""
    return sign(STUDY, plan.to_json(), lab.signing_key())


def ordered_plan(folder: Path) -> StudyPlan:
    """The plan that was ordered in `folder`. Raises UsageError or UntrustedDocument if there is none."""
    return plan_from_json(read_signed(folder / SIGNED).verified(STUDY))


def order_of(folder: Path) -> Order | None:
    """The order in `folder`, if there is one."""
    try:
        return Order(**json.loads((folder / _ORDER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_order(folder: Path, order: Order) -> None:
    """Keep the order; whole or as it was."""
    write_atomically(folder / _ORDER, json.dumps(asdict(order)).encode())


def write_outcome(folder: Path, error: str = "") -> None:
    """The ServerApp ended: well, or with an error that a person must read."""
    write_atomically(folder / _OUTCOME, json.dumps({"error": error}).encode())


def outcome_of(folder: Path) -> str | None:
    """The error that the ServerApp ended with, empty if it ended well; None while it has not ended."""
    try:
        return str(json.loads((folder / _OUTCOME).read_text())["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget_outcome(folder: Path) -> None:
    """It runs again."""
    (folder / _OUTCOME).unlink(missing_ok=True)
