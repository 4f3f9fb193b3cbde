"""The ledger as a page for the data protection officer: it stands alone, and prints on A4."""

from __future__ import annotations

import datetime
import functools
import time
from pathlib import Path
from typing import Any

from client.spending import Spending, day_and_time
from common.files import write_atomically
from common.pages import INK, render, svg
from common.records import software_version

_TEMPLATES = Path(__file__).parent / "templates"
_SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#b8a200")  # Okabe-Ito


def write_page(path: Path, spending: Spending) -> None:
    """The page; whole or absent. Raises OSError."""
    write_atomically(path, page(spending).encode())


def page(spending: Spending) -> str:
    """The whole page, HTML."""
    return render(
        _TEMPLATES / "privacy.html",
        spending=spending,
        share=spending.spent / spending.terms.epsilon,
        sentences=tuple(spending.sentences()),
        figure=_figure(spending) if spending.charges else "",
        written=day_and_time(time.time()),
        version=software_version(),
    )


@functools.lru_cache(maxsize=4)  # forty compositions
def _figure(spending: Spending) -> str:
    """Epsilon over time as an SVG element: a step for each charge, in the colour of its study, under the budget."""
    import matplotlib.dates

    dates: Any = matplotlib.dates  # not annotated
    curve = [(datetime.datetime.fromtimestamp(at), spent) for at, spent in spending.curve()]
    when, spent = [at for at, _ in curve], [value for _, value in curve]
    study_at = {datetime.datetime.fromtimestamp(charge.time): charge.study for charge in spending.charges}

    def draw(figure: Any, axes: Any) -> None:  # they take dates, and their annotations do not say so
        axes.plot(when, spent, drawstyle="steps-post", color=INK, linewidth=1, alpha=0.6)
        for place, study in enumerate(spending.studies):
            own = [(at, value) for at, value in curve if study_at[at] == study.digest]
            axes.plot(
                [at for at, _ in own],
                [value for _, value in own],
                "o",
                color=_SERIES[place % len(_SERIES)],
                markersize=4,
                label=study.title,
            )
        axes.axhline(spending.terms.epsilon, color="#b3261e", linestyle="--", linewidth=1.2, label="budget")
        axes.set_ylim(0, 1.12 * spending.terms.epsilon)
        if len(set(when)) > 1:
            locator = dates.AutoDateLocator(minticks=3, maxticks=7)
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        axes.set_ylabel("epsilon of a patient")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)

    return svg(draw, name="privacy", width=7.2, height=3.4)
