"""Pages that stand alone: one HTML file from a template, with its figures in it and nothing to load."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

INK = "#010203"  # in a figure: the page's text colour

Draw = Callable[[Any, Any], None]  # on matplotlib's figure and axes


def render(template: Path, **values: object) -> str:
    """The page that the template makes of `values`; text in them is escaped, and one that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def svg(draw: Draw, *, name: str, width: float, height: float) -> str:
    """A figure as an SVG element, width by the page; `name` sets its ids apart, `width` and `height` are inches."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.edgecolor": INK}):
        figure = Figure(figsize=(width, height), layout="constrained")  # no pyplot: nothing to close
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(figure, axes)
        axes.grid(alpha=0.18, color=INK, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'(<svg [^>]*?)\s*width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\s*height="[^"]*"', r'\1 aria-hidden="true"', text, count=1)
    return re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", text).replace(INK, "currentColor")
