"""The benchmark of rounds: its plan is one, its bundle is what Flower takes, its table says what was measured."""

from __future__ import annotations

import io
import tomllib

from flwr.cli.config_utils import validate_config
from rich.console import Console

from common.plan import StudyPlan
from deploy.benchmarks.rounds import BUNDLE, PLAN, Rounds, table


def test_the_plan_can_be_run() -> None:
    sites = {"site0": {"labels": "sign", "patients": 60}}
    assert StudyPlan.model_validate(PLAN | {"sites": sites, "rounds": 7, "quorum": 1}).privacy


def test_flower_takes_the_bundle() -> None:
    valid, errors, _ = validate_config(tomllib.loads(BUNDLE), check_module=False)
    assert valid, errors  # names what is wrong


def test_the_table_has_medians_after_the_first_round() -> None:
    ours = Rounds("Consilium", [30.0, 4.0, 5.0, 6.0], [1.0, 0.5, 0.5, 0.5])
    plain = Rounds("plain Flower", [40.0, 9.0, 9.5, 11.0], [1.0, 0.5, 0.5, 0.5])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([ours, plain]))
    rows = [
        line.split("│")[1:-1] for line in console.export_text().splitlines() if "Flower │" in line or "Cons" in line
    ]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["Consilium", "5.00", "0.50", "4.50", "0.50", "30.00"],
        ["plain Flower", "9.50", "0.50", "9.00", "1.00", "40.00"],
    ]
