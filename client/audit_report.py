"""The audit as a page that an ethics board can read: one file, printable, with nothing to load."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.keys import SignedDocument, fingerprint
from common.pages import render, svg

if TYPE_CHECKING:
    from client.audit import AuditReport

_TEMPLATES = Path(__file__).parent / "templates"
_CLAIMED, _SHOWN, _WRONG = "#0072b2", "#e69f00", "#b3261e"  # told apart by all forms of colour blindness

VERDICTS = {
    "PASS": "No attack found more than is claimed.",
    "INCONCLUSIVE": "An attack saw too little to judge. Run the audit again; if it stays so, ask Consilium's makers.",
    "FAIL": "An attack found more than is claimed. This site must not take part until the fault is mended.",
}
MEANINGS = {
    "gradient": "A step of learning: the mean over patients of how each would change the model.",
    "class_sums": "Sums of image features by diagnosis.",
    "statistic": "A mean over patients, such as the share of right answers.",
    "episode_gradient": "A step of learning from small tasks, each made of several patients.",
    "episode_gradient, who is with whom": "The same: does one patient's arrival move others between tasks?",
}


def page(report: AuditReport, signed: SignedDocument) -> str:
    """The whole page, HTML."""
    return render(
        _TEMPLATES / "audit.html",
        report=report,
        sentence=VERDICTS[report.verdict],
        meanings=MEANINGS,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.time)),
        signer=fingerprint(signed.signer),
        runs_figure=_figure(_runs(report), "epsilon (the smaller, the more private)"),
        checks_figure=_figure(_checks(report), "mu of one query (the smaller, the more private)"),
    )


def _runs(report: AuditReport) -> list[tuple[str, float, float, bool]]:
    """(name, claimed, shown, failed)."""
    names = ("the study as planned", "the same with strict noise")
    return [
        (name, run.claimed, run.shown, run.verdict == "FAIL") for name, run in zip(names, report.runs, strict=False)
    ]


def _checks(report: AuditReport) -> list[tuple[str, float, float, bool]]:
    return [(c.query.replace(", ", ",\n"), c.claimed, c.shown, c.verdict == "FAIL") for c in report.checks]


def _figure(rows: list[tuple[str, float, float, bool]], xlabel: str) -> str:
    """An SVG: for each row the claim as a line, and what was shown as a bar that begins at 0."""

    def draw(figure: Any, axes: Any) -> None:
        for place, (_, claimed, shown, failed) in enumerate(rows):
            axes.barh(place, shown, height=0.36, color=_WRONG if failed else _SHOWN, label="shown by attack (95 %)")
            axes.plot([claimed] * 2, [place - 0.34, place + 0.34], color=_CLAIMED, linewidth=3, label="claimed")
            axes.annotate(f"{shown:.2f}", (shown, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.15 * max([1.0, *(max(c, s if s == s else 0) for _, c, s, _ in rows)]))
        axes.set_xlabel(xlabel)
        handles, labels = axes.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True))
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, frameon=False)

    return svg(draw, name=xlabel.split()[0], width=6.4, height=1.3 + 0.55 * len(rows))
