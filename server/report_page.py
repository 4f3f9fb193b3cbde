"""What report.html's template shows: figures, and tables whose cells are text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from common import pictures
from common.metrics import score_name, segmentation_metrics
from common.trials import CEILING, Kind, mean, shots_unit
from server import plots
from server.history import RoundRecord
from server.results import (
    META,
    UNPROTECTED,
    Federation,
    Picture,
    StudyResults,
    federation_title,
    headline,
    show,
    show_gain,
    warnings,
)
from server.summary import Row

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
        "shots_titles": {k: results.shots_title(k) for k in results.plan.evaluation.shots},
        "lead_shots": f"{results.lead_shots} labelled {shots_unit(results.kind, count=results.lead_shots)}",
        "shots_unit": shots_unit(results.kind),
        "score": score_name(results.kind),
        "metrics": results.metrics,
        "lead_metric": results.lead,
        "lead_name": results.lead_name,
        "at_hospitals": results.at_hospitals,
        "kinds": [kind for kind in _KINDS if any(trial.kind == kind for trial in results.trials)],
        "tables": {kind: {metric: _groups(results, kind, metric) for metric in results.metrics} for kind in _KINDS},
        "shots_figures": {kind: _shots_figure(results, kind) for kind in _KINDS},
        "targets_figures": {kind: _targets_figure(results, kind) for kind in _KINDS},
        "curve_figure": _curve_figure(results),
        "federations": [_federation(results, f, number) for number, f in enumerate(results.federations)],
        "symbols": _SYMBOLS,
        "examples": _examples(results),
        "pictures": _pictures(results),
        "colours": {name: "rgb({}, {}, {})".format(*colour) for name, colour in pictures.COLOURS.items()},
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


def _styles(results: StudyResults) -> dict[str, plots.Style]:
    arms = [trial.arm for trial in results.trials] + [point.arm for point in results.curve]
    return plots.arm_styles(arm for arm in arms if arm != CEILING)


def _shots_figure(results: StudyResults, kind: Kind) -> str:
    mean_rows = (r for r in results.rows if (r.kind, r.target, r.metric) == (kind, None, results.lead))
    rows, styles = sorted(mean_rows, key=lambda row: row.shots), _styles(results)
    if not rows:
        return ""
    lines = [
        plots.Line(results.short_title(arm), sorted((r.shots, r.value) for r in rows if r.arm == arm), styles[arm])
        for arm in dict.fromkeys(row.arm for row in rows if row.arm != CEILING)
    ]
    return plots.shots_figure(
        _name("shots", kind),
        lines,
        metric=results.lead_name,
        unit=shots_unit(results.kind),
        ceiling=next((row.value for row in rows if row.arm == CEILING), None),
        chance=rows[0].chance,
    )


def _targets_figure(results: StudyResults, kind: Kind) -> str:
    of_target: dict[str, list[Row]] = defaultdict(list)
    for row in results.rows:
        if row.target and (row.kind, row.metric) == (kind, results.lead):
            of_target[row.target].append(row)
    if not of_target:
        return ""
    return plots.targets_figure(
        _name("targets", kind),
        [_dot_row(results, target, rows) for target, rows in of_target.items()],
        metric=results.lead_name,
        titles={trial.arm: results.short_title(trial.arm) for trial in results.trials},
        styles=_styles(results),
    )


def _dot_row(results: StudyResults, target: str, rows: list[Row]) -> plots.DotRow:
    dots = {row.arm: row.value for row in rows if row.shots == results.lead_shots}
    ceiling = next((row.value for row in rows if row.arm == CEILING), None)
    return plots.DotRow(target, dots, ceiling, rows[0].chance, rows[0].learnable)


def _curve_figure(results: StudyResults) -> str:
    """The lead metric of held-out targets at checkpoints, averaged over the targets that count."""
    unlearnable = {row.target for row in results.rows if not row.learnable}
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for point in results.curve:
        if point.target not in unlearnable and not math.isnan(point.value):
            values[point.arm][point.round].append(point.value)
    if not values:
        return ""
    styles = _styles(results)
    return plots.rounds_figure(
        "curve",
        {results.short_title(arm): [(r, mean(v)) for r, v in sorted(points.items())] for arm, points in values.items()},
        ylabel=results.lead_name,
        styles={results.short_title(arm): styles[arm] for arm in values},
    )


def _federation(results: StudyResults, federation: Federation, number: int) -> dict[str, Any]:
    rounds = [record for record in federation.records if record.round > 0]
    accuracy, epsilon = _series(rounds, "accuracy"), _series(rounds, "epsilon")
    budget = results.plan.privacy.epsilon if results.plan.privacy else None
    spent = any(value > 0 for points in epsilon.values() for _, value in points)
    accuracy_name, epsilon_name, score = f"accuracy{number}", f"epsilon{number}", score_name(results.kind)
    return {
        "title": federation_title(results, federation),
        "accuracy": plots.rounds_figure(accuracy_name, accuracy, ylabel=f"{score} at the site") if accuracy else "",
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
        shown = example.image if example.mask is None else pictures.outlined(example.image, example.mask)
        of_site[example.site].append({"label": example.label, "png": pictures.png_address(shown)})
    return dict(of_site)


def _pictures(results: StudyResults) -> dict[str, list[list[dict[str, str]]]]:
    """For each target and each of its images: the image itself, then what every arm found in it."""
    of_target: dict[str, dict[bytes, list[Picture]]] = defaultdict(lambda: defaultdict(list))
    for picture in results.pictures:
        of_target[picture.target][picture.image.tobytes()].append(picture)
    return {target: [_strip(results, same) for same in images.values()] for target, images in of_target.items()}


def _strip(results: StudyResults, same_image: list[Picture]) -> list[dict[str, str]]:
    first = same_image[0]
    hospital = "the image" if first.truth is None else "the image, outlined by the hospital"
    shown = pictures.png_address(pictures.outlined(first.image, first.truth))
    itself = {"png": shown, "title": hospital, "caption": "", "alt": f"{first.target}: {hospital}"}
    return [itself, *(_answer(results, picture) for picture in same_image)]


def _answer(results: StudyResults, picture: Picture) -> dict[str, str]:
    """An arm's mask held against the truth, or its heat map, or its words alone."""
    title = f"{results.short_title(picture.arm)}, {results.shots_title(picture.shots)}"
    image, caption = None, picture.caption
    if picture.found is not None and picture.found.dtype.kind == "f":
        image = pictures.heated(picture.image, picture.found, picture.truth)
    elif picture.found is not None and picture.truth is not None:
        image = pictures.agreement(picture.image, picture.truth, picture.found)
        caption = ", ".join(filter(None, (f"Dice {_dice(picture.found, picture.truth):.2f}", caption)))
    elif picture.found is not None:
        image = pictures.outlined(picture.image, picture.found)
    png = "" if image is None else pictures.png_address(image)
    alt = ", ".join(filter(None, (f"{picture.target}: found by {title}", caption)))
    return {"png": png, "title": title, "caption": caption, "alt": alt}


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    ways = max(2, int(found.max()) + 1, int(truth.max()) + 1)
    one, other = (torch.from_numpy(mask)[None].long() for mask in (found, truth))
    return segmentation_metrics(one, other, ways)["dice"]


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
