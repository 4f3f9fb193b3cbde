"""The report's figures, as SVG that lives inside the page: its colours and letters are the page's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.pages import INK, svg
from common.trials import Estimate
from server.summary import WITHOUT_PRIVACY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito, told apart by all forms of colour blindness; the page maps each to a lighter one on dark ground.
_SERIES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a8a8a", "#b8a200")
_MARKERS, _DASHES = "osD^vPX*1<>pd<>d", ("-", "--", "-.", ":")
_ARM_PLACES = {"meta": 0, "fedavg": 1, "local_only": 3, "random": 6}
_FREE_PLACES = (2, 4, 5, 7, 10, 12, 13, 15, 9, 11, 14)  # from 8 on colours come again, dashed and with other markers

Style = Mapping[str, Any]  # of a line: matplotlib's arguments


@dataclass(frozen=True)
class Line:
    """A curve: `points` are (shots, estimate)."""

    label: str
    points: Sequence[tuple[int, Estimate]]
    style: Style


@dataclass(frozen=True)
class DotRow:
    """One target: an estimate per arm, its ceiling and its chance."""

    label: str
    dots: Mapping[str, Estimate]  # by arm
    ceiling: Estimate | None
    chance: float
    learnable: bool


def arm_styles(arms: Iterable[str]) -> dict[str, Style]:
    """Colour and marker of each arm, hollow and dashed without privacy; no two of up to fifteen bases are alike.

    Some arms look the same in every study; the others take what is left, in the order of their names.
    """
    arms = list(arms)
    others = sorted({arm.removesuffix(WITHOUT_PRIVACY) for arm in arms} - _ARM_PLACES.keys())
    places = _ARM_PLACES | dict(zip(others, itertools.cycle(_FREE_PLACES), strict=False))
    return {arm: _arm_style(places[arm.removesuffix(WITHOUT_PRIVACY)], arm.endswith(WITHOUT_PRIVACY)) for arm in arms}


def shots_figure(
    name: str, lines: Sequence[Line], *, metric: str, unit: str, ceiling: Estimate | None, chance: float | None
) -> str:
    """`metric` against shots, counted in `unit`, one line per arm."""

    def draw(axes: Axes) -> None:
        shots = sorted({x for line in lines for x, _ in line.points})
        place = {x: i for i, x in enumerate(shots)}
        for i, line in enumerate(lines):
            shift = min(0.06, 0.8 / len(lines)) * (i - (len(lines) - 1) / 2)  # or the intervals hide each other
            xs = [place[x] + shift for x, _ in line.points]
            _whiskers(axes, xs, [e for _, e in line.points], vertical=True, label=line.label, **line.style)
        if ceiling is not None:
            _reference(axes, ceiling.mean, "ceiling: every support patient", "--")
        if chance is not None:
            _reference(axes, chance, "guessing", ":")
        axes.set_xticks(range(len(shots)), [str(k) for k in shots])
        axes.set_xlim(-0.4, len(shots) - 0.6)
        axes.set(xlabel=f"labelled {unit}", ylabel=metric)

    return _svg(name, draw, legend=len(lines))


def targets_figure(
    name: str, rows: Sequence[DotRow], *, metric: str, titles: Mapping[str, str], styles: Mapping[str, Style]
) -> str:
    """`metric` of every target, a dot with its interval per arm; titles and styles are by arm."""
    arms = list(dict.fromkeys(arm for row in rows for arm in row.dots))

    def draw(axes: Axes) -> None:
        for i, arm in enumerate(arms):
            shown = [(y, row.dots[arm]) for y, row in enumerate(rows) if arm in row.dots]
            ys = [y + 0.6 * ((i + 0.5) / len(arms) - 0.5) for y, _ in shown]
            style = {**styles[arm], "linestyle": "none"}
            _whiskers(axes, ys, [e for _, e in shown], vertical=False, label=titles[arm], **style)
        for y, row in enumerate(rows):
            axes.plot([row.chance] * 2, [y - 0.36, y + 0.36], ":", color=INK, label="guessing" if y == 0 else None)
            if row.ceiling is not None:
                span = [y - 0.36, y + 0.36]
                axes.plot([row.ceiling.mean] * 2, span, "-", color=INK, label="ceiling" if y == 0 else None)
        axes.set_yticks(
            range(len(rows)), [row.label + ("" if row.learnable else "\n(not learnable here)") for row in rows]
        )
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set(xlabel=metric)

    return _svg(name, draw, height=1.2 + max(0.72, 0.13 * len(arms)) * len(rows), legend=len(arms) + 2)


def rounds_figure(
    name: str,
    series: Mapping[str, Sequence[tuple[int, float]]],
    *,
    ylabel: str,
    limit: float | None = None,
    styles: Mapping[str, Style] | None = None,
) -> str:
    """One line per label in `series` over the rounds, in the style of that label if there are any. `limit` is a dashed
    line (the plan's epsilon)."""

    def draw(axes: Axes) -> None:
        for i, (label, points) in enumerate(series.items()):
            style = styles[label] if styles else _site_style(i)
            every = max(1, len(points) // 6)
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, markevery=every, markersize=4, linewidth=1.3, label=label, **style)
        if limit is not None:
            _reference(axes, limit, "the plan's", "--")
            axes.set_ylim(0, 1.15 * max([limit, *(y for points in series.values() for _, y in points)]))
        axes.set(xlabel="round", ylabel=ylabel)
        axes.locator_params(axis="x", integer=True)

    return _svg(name, draw, legend=len(series))


def _reference(axes: Axes, value: float, label: str, linestyle: str) -> None:
    axes.axhline(value, color=INK, linestyle=linestyle, linewidth=1, label=label)


def _arm_style(place: int, unprotected: bool) -> Style:
    dash = "-" if place < len(_SERIES) else "-."
    style = {"color": _SERIES[place % len(_SERIES)], "marker": _MARKERS[place], "linestyle": dash}
    return style | {"markerfacecolor": "none", "linestyle": "--"} if unprotected else style


def _site_style(number: int) -> Style:
    """The eight colours, then the eight again dashed."""
    count = len(_SERIES)
    dash = _DASHES[number // count % len(_DASHES)]
    return {"color": _SERIES[number % count], "marker": _MARKERS[number % count], "linestyle": dash}


def _whiskers(
    axes: Axes, at: Sequence[float], estimates: Sequence[Estimate], *, vertical: bool, label: str, **style: Any
) -> None:
    means = [e.mean for e in estimates]
    bars = [max(0.0, e.high - e.mean) for e in estimates]  # nan, no interval, becomes 0
    style |= {"label": label, "markersize": 5, "linewidth": 1.4, "elinewidth": 1.1, "capsize": 2.5}
    if vertical:
        axes.errorbar(at, means, yerr=bars, **style)
    else:
        axes.errorbar(means, at, xerr=bars, **style)


def _svg(name: str, draw: Callable[[Axes], None], *, height: float = 3.3, legend: int) -> str:
    """An SVG element 5.4 inches wide; `legend` lines of labels stand under the axes."""

    def whole(figure: Figure, axes: Axes) -> None:
        draw(axes)
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)

    text = svg(whole, name=name, width=5.4, height=height + 0.12 * legend)
    for i, colour in enumerate(_SERIES):
        text = text.replace(colour, f"var(--series-{i})")
    return text
