"""A study's results as metrics.json for machines, a table for the terminal, and report.html for people.

The page stands alone: no script, no request, every figure inside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_atomically
from common.pages import render
from common.trials import shots_unit
from server.report_page import page_values
from server.results import META, UNPROTECTED, StudyResults, headline, show_half, to_json
from server.summary import Row

if TYPE_CHECKING:
    from rich.table import Table

_TEMPLATES = Path(__file__).parent / "templates"


def write_metrics(path: Path, results: StudyResults) -> None:
    """Everything but the images, as JSON; whole or absent. Raises OSError."""
    text = json.dumps(to_json(results), allow_nan=False)
    write_atomically(path, text.encode())


def write_report(path: Path, results: StudyResults) -> None:
    """The page; whole or absent. Raises OSError."""
    page = render(_TEMPLATES / "report.html", **page_values(results))
    write_atomically(path, page.encode())


def text_table(results: StudyResults) -> Table:
    """The lead metric for a terminal of 80 columns: the means over targets, and every held-out site."""
    from rich.table import Table
    from rich.text import Text

    shots = sorted(results.plan.evaluation.shots)
    what = f"{results.metrics[results.lead][0]} by {shots_unit(results.kind)}"
    title = f"{what}, mean ± half of the 95 % interval" + ("" if results.private else f"\n{UNPROTECTED}")
    table = Table(title=Text(title), caption=Text(headline(results)[1]))
    table.add_column("target", overflow="fold")
    table.add_column("start", overflow="fold")
    for k in shots:
        table.add_column(str(k), justify="right", no_wrap=True)
    lead = [row for row in results.rows if row.metric == results.lead]
    shown = [row for row in lead if row.target is None or row.kind == "held-out site"]
    groups = dict.fromkeys((row.kind, row.target) for row in shown)
    for kind, target in sorted(groups, key=lambda group: (group[0] != "held-out site", group[1] is not None)):
        group = [row for row in shown if (row.kind, row.target) == (kind, target)]
        arms = list(dict.fromkeys(row.arm for row in group))
        for arm in arms:
            name = _group_name(group[0]) if arm == arms[0] else ""
            cells = [show_half(row.value) for row in sorted(group, key=lambda row: row.shots) if row.arm == arm]
            style = "bold" if arm == META else None
            table.add_row(
                *map(Text, (name, results.short_title(arm), *cells)), style=style, end_section=arm == arms[-1]
            )
    return table


def _group_name(row: Row) -> str:
    if row.target is None:
        return f"mean of {row.targets}, {row.kind}" + ("s" if row.kind == "held-out site" else "")
    return row.target + ("" if row.learnable else " (not learnable here)")
