"""From trials to the rows of the result table.

A target whose ceiling cannot be told from guessing teaches nothing about starts: its rows are kept and marked,
and the mean over targets leaves it out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from common.trials import CEILING, RANDOM, Estimate, Kind, Trial, interval, mean, split_means

AVERAGING = "fedavg"  # arm
WITHOUT_PRIVACY = " without privacy"  # suffix of an arm

_Target = tuple[Kind, str]
_Column = tuple[str, int, str]  # arm, shots, metric
_Splits = dict[int, float]  # a split's mean over its draws


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of the result table with its 95 % interval, and what it gains over the two baselines."""

    kind: Kind
    target: str | None  # None: the mean over the targets that count
    arm: str
    shots: int  # as in the trials; 0 for the ceiling
    metric: str
    value: Estimate
    over_random: Estimate | None  # paired difference: same splits, same support sets; None without such a pair
    over_averaging: Estimate | None
    trials: int
    targets: int  # 1, or how many the mean is over
    chance: float  # the lead metric by guessing, a mean like the value
    learnable: bool  # False: the target's ceiling includes chance


class _Table:
    """Trials by target and column."""

    def __init__(self, trials: Sequence[Trial], lead: str) -> None:
        values: dict[tuple[_Target, _Column], list[tuple[int, float]]] = defaultdict(list)
        chances: dict[_Target, list[float]] = defaultdict(list)
        for trial in trials:
            target = (trial.kind, trial.target)
            chances[target].append(trial.chance)
            for metric, value in trial.metrics.items():
                values[target, (trial.arm, trial.shots, metric)].append((trial.split, value))
        self.lead = lead
        self.chance = {target: mean(every) for target, every in chances.items()}
        self.splits = {key: split_means(pairs) for key, pairs in values.items()}
        self.counts = {key: len(pairs) for key, pairs in values.items()}

    def columns(self, targets: Sequence[_Target]) -> list[_Column]:
        """Those that all of `targets` have."""
        every = dict.fromkeys(column for _, column in self.splits)
        return [column for column in every if all((target, column) in self.splits for target in targets)]

    def over(self, targets: Sequence[_Target], column: _Column) -> _Splits | None:
        """The mean over targets, split by split: splits of different targets are independent of each other."""
        of_target = [self.splits.get((target, column)) for target in targets]
        if not all(of_target):
            return None
        present = [splits for splits in of_target if splits]
        shared = sorted(set.intersection(*map(set, present)))
        return {split: mean([splits[split] for splits in present]) for split in shared}

    def learnable(self, target: _Target) -> bool:
        """Whether the interval of the target's ceiling lies above chance; True where none was measured."""
        ceiling = self.splits.get((target, (CEILING, 0, self.lead)))
        return ceiling is None or interval(list(ceiling.values())).low > self.chance[target]


def summarise(trials: Sequence[Trial], *, lead: str) -> list[Row]:
    """Rows per target, arm, shots and metric; then, for each kind, the means over the targets that count.

    `lead` is the metric by which a target's ceiling is held against guessing.
    """
    table = _Table(trials, lead)
    rows = [_row(table, [target], column, target[1]) for target in table.chance for column in table.columns([target])]
    for kind in dict.fromkeys(kind for kind, _ in table.chance):
        counted = [target for target in table.chance if target[0] == kind and table.learnable(target)]
        rows += [_row(table, counted, column, None) for column in table.columns(counted) if counted]
    return rows


def _row(table: _Table, targets: list[_Target], column: _Column, name: str | None) -> Row:
    arm, shots, metric = column
    suffix = WITHOUT_PRIVACY if arm.endswith(WITHOUT_PRIVACY) else ""
    return Row(
        kind=targets[0][0],
        target=name,
        arm=arm,
        shots=shots,
        metric=metric,
        value=interval(list((table.over(targets, column) or {}).values())),
        over_random=_difference(table, targets, column, RANDOM),
        over_averaging=_difference(table, targets, column, AVERAGING + suffix),
        trials=sum(table.counts[target, column] for target in targets),
        targets=len(targets),
        chance=mean([table.chance[target] for target in targets]),
        learnable=all(map(table.learnable, targets)),
    )


def _difference(table: _Table, targets: list[_Target], column: _Column, baseline: str) -> Estimate | None:
    mine, other = table.over(targets, column), table.over(targets, (baseline, *column[1:]))
    if column[0] == baseline or not mine or not other:
        return None
    return interval([mine[split] - other[split] for split in mine if split in other])
