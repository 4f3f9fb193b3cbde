"""What report.html's template shows: figures, and tables whose cells are text."""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.metrics import METRICS
from common.trials import CEILING, Kind, mean
from server import plots
from server.history import RoundRecord
from server.results import (
    META,
    UNPROTECTED,
    Federation,
    StudyResults,
    federation_title,
    headline,
    show,
    show_gain,
    warnings,
)
from server.summary import LEAD_METRIC, Row

_KINDS: tuple[Kind, ...] = ("held-out site", "held-out patients")
_MOST_ROUNDS = 200  # columns of a participation table
_SYMBOLS = {"ok": "✓", "refused": "R", "failed": "F", "late": "L", "rejected": "X", "absent": "–"}


def page_values(results: StudyResults) -> dict[str, Any]:
    """The template's variables."""
    title, sentence = headline(results)
    return {
        "plan": results.plan,
        "private": results.private,
        "phantoms": results.phantoms,
        "unprotected": UNPROTECTED,
        "headline": title,
        "sentence": sentence,
        "warnings": warnings(results),
        "shots": sorted(results.plan.evaluation.shots),
        "lead_shots": results.lead_shots,
        "metrics": METRICS,
        "lead_metric": LEAD_METRIC,
        "kinds": [kind for kind in _KINDS if any(trial.kind == kind for trial in results.trials)],
        "tables": {kind: {metric: _groups(results, kind, metric) for metric in METRICS} for kind in _KINDS},
        "shots_figures": {kind: _shots_figure(results, kind) for kind in _KINDS},
        "targets_figures": {kind: _targets_figure(results, kind) for kind in _KINDS},
        "curve_figure": _curve_figure(results),
        "federations": [_federation(results, f, number) for number, f in enumerate(results.federations)],
        "symbols": _SYMBOLS,
        "examples": _examples(results),
        "sentences": results.sentences,
        "settings": _flat(results.plan.model_dump(mode="json", exclude={"study", "description"})),
        "versions": results.versions,
        "seconds": {name: _duration(value) for name, value in results.seconds.items()},
    }


def _groups(results: StudyResults, kind: Kind, metric: str) -> list[dict[str, Any]]:
    """The mean over the targets that count, then each target, with a line per arm."""
    rows = [row for row in results.rows if row.kind == kind and row.metric == metric]
    targets = dict.fromkeys(row.target for row in rows)
    return [_group(results, [r for r in rows if r.target == t]) for t in sorted(targets, key=lambda t: t is not None)]


def _group(results: StudyResults, rows: list[Row]) -> dict[str, Any]:
    first = rows[0]
    arms = dict.fromkeys(row.arm for row in rows)
    return {
        "mean": first.target is None,
        "name": first.target or f"Mean of {first.targets} target{'s' if first.targets > 1 else ''}",
        "trials": max(row.trials for row in rows),
        "note": "" if first.learnable else "not learnable here, not counted",
        "arms": [_arm(results, [row for row in rows if row.arm == arm], arm) for arm in arms],
    }


def _arm(results: StudyResults, rows: list[Row], arm: str) -> dict[str, Any]:
    of_shots = {row.shots: row for row in rows}
    in_order = [of_shots.get(k) for k in sorted(results.plan.evaluation.shots)]
    return {
        "title": results.title(arm),
        "own": arm == META,
        "ceiling": show(of_shots[0].value) if 0 in of_shots else "",
        "values": [show(row.value) if row else "" for row in in_order],
        "over_random": [show_gain(row.over_random) if row and row.over_random else "" for row in in_order],
        "over_averaging": [show_gain(row.over_averaging) if row and row.over_averaging else "" for row in in_order],
    }


def _shots_figure(results: StudyResults, kind: Kind) -> str:
    mean_rows = (r for r in results.rows if (r.kind, r.target, r.metric) == (kind, None, LEAD_METRIC))
    rows = sorted(mean_rows, key=lambda row: row.shots)
    arms = dict.fromkeys(row.arm for row in rows if row.arm != CEILING)
    lines = [
        plots.Line(results.short_title(arm), sorted((r.shots, r.value) for r in rows if r.arm == arm), arm)
        for arm in arms
    ]
    ceiling = next((row.value for row in rows if row.arm == CEILING), None)
    counted = {row.target for row in results.rows if row.kind == kind and row.target and row.learnable}
    ways = {t.target: t.ways for t in results.trials if t.kind == kind and t.target in counted}
    chance = mean([1 / w for w in ways.values()]) if ways else None
    return plots.shots_figure(_name("shots", kind), lines, ceiling=ceiling, chance=chance) if lines else ""


def _targets_figure(results: StudyResults, kind: Kind) -> str:
    ways = {trial.target: trial.ways for trial in results.trials if trial.kind == kind}
    dot_rows = []
    for target in ways:
        rows = [r for r in results.rows if (r.kind, r.target, r.metric) == (kind, target, LEAD_METRIC)]
        dots = {row.arm: row.value for row in rows if row.shots == results.lead_shots}
        ceiling = next((row.value for row in rows if row.arm == CEILING), None)
        dot_rows.append(plots.DotRow(target, dots, ceiling, 1 / ways[target], all(row.learnable for row in rows)))
    titles = {trial.arm: results.short_title(trial.arm) for trial in results.trials}
    return plots.targets_figure(_name("targets", kind), dot_rows, titles) if dot_rows else ""


def _curve_figure(results: StudyResults) -> str:
    """Held-out balanced accuracy at checkpoints, averaged over the targets that count."""
    unlearnable = {row.target for row in results.rows if not row.learnable}
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in results.curve:
        if point.target not in unlearnable and not math.isnan(point.balanced_accuracy):
            values[point.arm][point.round].append(point.balanced_accuracy)
    series = {
        results.short_title(arm): [(r, mean(v)) for r, v in sorted(rounds.items())] for arm, rounds in values.items()
    }
    styles = {results.short_title(arm): arm for arm in values}
    return plots.rounds_figure("curve", series, ylabel="balanced accuracy", arms=styles) if series else ""


def _federation(results: StudyResults, federation: Federation, number: int) -> dict[str, Any]:
    rounds = [record for record in federation.records if record.round > 0]
    accuracy, epsilon = _series(rounds, "accuracy"), _series(rounds, "epsilon")
    budget = results.plan.privacy.epsilon if results.plan.privacy else None
    spent = any(value > 0 for points in epsilon.values() for _, value in points)
    accuracy_name, epsilon_name = f"accuracy{number}", f"epsilon{number}"
    return {
        "title": federation_title(results, federation),
        "accuracy": plots.rounds_figure(accuracy_name, accuracy, ylabel="accuracy at the site") if accuracy else "",
        "epsilon": plots.rounds_figure(epsilon_name, epsilon, ylabel="epsilon spent", limit=budget) if spent else "",
        "spending": _spending(rounds, epsilon) if spent else None,
        **_participation(federation.records),
    }


def _series(rounds: Sequence[RoundRecord], value: str) -> dict[str, list[tuple[int, float]]]:
    """(round, value) of each site, where the site answered with one."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in rounds:
        for site in record.sites:
            number = getattr(site, value)
            if site.status == "ok" and not math.isnan(number):
                series[site.site].append((record.round, number))
    return dict(series)


def _spending(rounds: Sequence[RoundRecord], epsilon: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """Epsilon of each site after up to six rounds, evenly apart, the last among them."""
    step = max(1, math.ceil(len(rounds) / 6))
    shown = [record.round for record in rounds][::-1][::step][::-1]
    sites = []
    for site, points in epsilon.items():
        upto = [[value for r, value in points if r <= round] for round in shown]
        sites.append({"name": site, "cells": [f"{values[-1]:.2f}" if values else "0" for values in upto]})
    return {"rounds": shown, "sites": sites}


def _participation(records: Sequence[RoundRecord]) -> dict[str, Any]:
    amiss = [r for r in records if r.status != "committed" or any(site.status != "ok" for site in r.sites)]
    shown = list(records) if len(records) <= _MOST_ROUNDS else amiss[:_MOST_ROUNDS]
    sites = dict.fromkeys(site.site for record in records for site in record.sites)
    found = {(record.round, site.site): site for record in shown for site in record.sites}
    return {
        "records": shown,
        "left_out_rounds": len(records) - len(shown),
        "sites": [
            {
                "name": name,
                "answered": sum(s.site == name and s.status == "ok" for r in records if r.round for s in r.sites),
                "cells": [found.get((record.round, name)) for record in shown],
            }
            for name in sites
        ],
        "rounds": sum(record.round > 0 for record in records),
        "reasons": _reasons(records),
    }


def _reasons(records: Sequence[RoundRecord]) -> list[tuple[str, str, str]]:
    """(site, what it was, why) of all that was not ok."""
    found: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for record in records:
        for site in record.sites:
            if site.status != "ok":
                found[site.site, site.reason or site.code][site.status] = None
    return [(site, ", ".join(statuses), reason) for (site, reason), statuses in found.items()]


def _examples(results: StudyResults) -> dict[str, list[dict[str, str]]]:
    of_site: dict[str, list[dict[str, str]]] = defaultdict(list)
    for example in results.examples:
        of_site[example.site].append({"label": example.label, "png": _png(example.image)})
    return dict(of_site)


def _png(image: np.ndarray) -> str:
    """uint8 (H, W) or (H, W, 3) as a data address."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The plan's leaves as ('model.name', 'conv4')."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            rows.append((prefix + key, text))
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _name(figure: str, kind: Kind) -> str:
    return f"{figure}-{kind.replace(' ', '-')}"
