"""What the data protection officer gets: table, JSON and a page that stands alone, and says what the ledger says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client import approval
from client.cli import app
from client.ledger import FILE, Ledger
from client.site import load_site_config
from client.spending import spending_of
from common.accounting import Event
from common.errors import LedgerDamaged
from tests.conftest import PlanMaker, SiteMaker

OTHER = "b" * 64


@pytest.fixture
def folder(make_site: SiteMaker, make_plan: PlanMaker) -> Path:
    """Two studies, five charges; the ledger is a filter."""
    folder, plan = make_site("alder"), make_plan(study="lungs")
    config = (folder / "site.yaml").read_text().replace("delta: 0.01", "delta: 0.01, mode: filter")
    (folder / "site.yaml").write_text(config)
    approval.approve(folder / "state", plan, by="Dr Example")
    approval.withdraw(folder / "state", plan.digest)  # its name is known all the same
    ledger = Ledger.open(folder / "state", load_site_config(folder).budget.terms())
    for round in (1, 2, 3):
        ledger.charge(study=plan.digest, round=round, event=Event(1.0, 20.0, 4))
    for round in (1, 2):
        ledger.charge(study=OTHER, round=round, event=Event(1.0, 30.0, 5))
    return folder


def consilium_site(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_table_and_the_json(folder: Path) -> None:
    ledger = Ledger.existing(folder / "state")
    said = consilium_site("privacy", folder)
    assert "lungs" in said
    assert "3, 1 to 3" in said
    assert f"epsilon {ledger.spent():.3f} of 10 is spent at delta 0.01; the unit is the patient" in said
    assert f"a Renyi filter of order {ledger.terms.order} counts" in said
    told = json.loads(consilium_site("privacy", folder, "--json"))
    assert (told["spent"], told["rows"], told["head"]) == (ledger.spent(), 5, ledger.head()[1])
    assert [(s["name"], s["rounds"], s["queries"]) for s in told["studies"]] == [("lungs", 3, 12), ("", 2, 10)]
    alone = ledger.terms.spent([Event(1.0, 20.0, 12)])
    assert told["studies"][0]["epsilon"] == alone < told["spent"]
    assert [charge["number"] for charge in told["charges"]] == [1, 2, 3, 4, 5]
    assert json.loads(consilium_site("privacy", folder / "state", "--json"))["spent"] == ledger.spent()


def test_the_curve_rises_to_what_is_spent(folder: Path) -> None:
    spending = spending_of(folder)
    curve = spending.curve()
    assert len(curve) == 5
    assert [epsilon for _, epsilon in curve] == sorted(epsilon for _, epsilon in curve)
    assert curve[-1] == (spending.charges[-1].time, spending.spent)


def test_the_page_stands_alone_and_says_what_the_ledger_says(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "privacy.html"
    assert f"Page: {page}" in consilium_site("privacy", folder, "--page", page)
    text, ledger = page.read_text(), Ledger.existing(folder / "state")
    assert not re.search(r"<script|<link|@import|url\(\s*['\"]?(?!#)|(?:src|href)=['\"](?!#)", text)
    assert "@page { size: A4;" in text
    assert f"<strong>{ledger.spent():.3f}</strong> of 10 is spent" in text
    assert f"width: {10 * ledger.spent():.1f}%" in text
    assert ledger.head()[1] in text
    assert f"Renyi filter of order {ledger.terms.order}" in text.replace("\n", " ")
    assert text.count("<svg") == 1
    for word in ("lungs", OTHER[:12], "budget", "epsilon of a patient"):
        assert word in text[text.index("<svg") : text.index("</svg>")], word
    table = re.findall(r"<td>([^<]*)</td>", text)
    assert (table[0], table[1]) == ("3, 1 to 3", "12")


def test_a_site_that_spent_nothing_has_a_page_too(make_site: SiteMaker, tmp_path: Path) -> None:
    folder = make_site("birch")
    Ledger.open(folder / "state", load_site_config(folder).budget.terms())
    consilium_site("privacy", folder, "--page", tmp_path / "p.html")
    assert "Nothing was charged yet." in (tmp_path / "p.html").read_text()


def test_a_ledger_that_was_changed_has_none(folder: Path, tmp_path: Path) -> None:
    (folder / "state" / FILE).write_bytes(b"")
    with pytest.raises(LedgerDamaged):
        consilium_site("privacy", folder, "--page", tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()
