"""The benchmark of rounds: its plan is one, its bundle is what Flower takes, its table says what was measured."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path

from flwr.cli.config_utils import validate_config
from rich.console import Console

from client.data.load import load_site
from client.data.phantoms import PROFILES, make_phantom_sites
from common.plan import StudyPlan
from deploy.benchmarks.rounds import BUNDLE, PATIENTS, PHANTOMS, Rounds, plan_of, table


def test_the_phantom_hospitals_fit_the_plan(tmp_path: Path) -> None:
    names = sorted(PROFILES)[:3]
    make_phantom_sites(tmp_path, names=names, **PHANTOMS)
    plan = StudyPlan.model_validate(plan_of(names, rounds=7))
    assert plan.privacy
    for name in names:
        assert len(load_site(tmp_path / name, plan, split="train").patients.unique()) == PATIENTS


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
