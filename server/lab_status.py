"""What stands at the lab, told at once: nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import RunError
from common.service import running_instance
from server.certificates import days_left, read_certificate
from server.enrolment import enrolled_sites
from server.flower import Control
from server.history import last_round
from server.lab import Lab
from server.orders import order_of, ordered_plan, outcome_of
from server.serving import SERVICE


def lab_status(lab: Lab) -> dict[str, Any]:
    """What stands at the lab: the service, the hospitals, the studies."""
    serving = running_instance(lab.folder, SERVICE)
    online: dict[str, bool] = {}
    answers = False
    if serving:
        try:
            with Control(lab) as control:
                online = {node.name: node.online for node in control.nodes()}
            answers = True
        except RunError:
            answers = False
    return {
        "lab": lab.config.name,
        "address": lab.config.address,
        "serving": serving is not None,
        "superlink": answers,
        "certificate_days": round(days_left(read_certificate(lab.server_certificate)), 1),
        "sites": [
            {"site": name, "enrolled": site.active, "online": site.active and online.get(name, False)}
            for name, site in enrolled_sites(lab).items()
            if name == site.site  # the other files bar its old keys
        ],
        "studies": [_study_status(folder) for folder in sorted(lab.runs.glob("*")) if order_of(folder)],
    }


def _study_status(folder: Path) -> dict[str, Any]:
    plan, done, error = ordered_plan(folder), last_round(folder) or 0, outcome_of(folder)
    state = "running" if error is None else f"stopped: {error}" if error else "done"
    return {"study": plan.study, "digest": plan.digest, "rounds": plan.rounds, "committed": done, "state": state}
