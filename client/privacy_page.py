"""The ledger as a page for the data protection officer: it stands alone, and prints on A4."""

from __future__ import annotations

import datetime
import io
import re
import time
from pathlib import Path
from typing import Any

from client.spending import Spending, day_and_time
from common.files import write_atomically
from common.records import software_version

_TEMPLATES = Path(__file__).parent / "templates"
_SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#b8a200")  # Okabe-Ito
_INK = "#1d2733"


def write_page(path: Path, spending: Spending) -> None:
    """The page; whole or absent. Raises OSError."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("privacy.html").render(
        spending=spending,
        share=spending.spent / spending.terms.epsilon,
        sentences=tuple(spending.sentences()),
        figure=_figure(spending) if spending.charges else "",
        written=day_and_time(time.time()),
        version=software_version(),
    )
    write_atomically(path, page.encode())


def _figure(spending: Spending) -> str:
    """Epsilon over time as an SVG element: a step for each charge, in the colour of its study, under the budget."""
    import matplotlib.dates
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dates: Any = matplotlib.dates  # not annotated
    curve = [(datetime.datetime.fromtimestamp(at), spent) for at, spent in spending.curve()]
    when, spent = [at for at, _ in curve], [value for _, value in curve]
    study_at = {datetime.datetime.fromtimestamp(charge.time): charge.study for charge in spending.charges}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "privacy", "font.size": 10, "axes.edgecolor": _INK}):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots()  # it takes dates, and its annotations do not say so
        axes.plot(when, spent, drawstyle="steps-post", color=_INK, linewidth=1, alpha=0.6)
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
        axes.grid(alpha=0.18, color=_INK, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(<svg [^>]*?)\s*width="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(<svg [^>]*?)\s*height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1)
