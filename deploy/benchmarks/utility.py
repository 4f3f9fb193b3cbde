"""What every algorithm of a study is worth to new hospitals and new patients, and what privacy takes from it.

    python -m deploy.benchmarks.utility deploy/studies/utility.yaml --sites sites/hospitals --out runs/utility

runs the study and all that it compares with at each epsilon (`inf`: without privacy) and seed, each in a run folder of
its own below OUT, `--jobs` of them at once; stopped, the same command goes on. It prints a table of the lead metric at
the middle number of shots, averaged over the targets that are learnable at all (the ceiling beats guessing), mean and
95 % interval over the seeds, and writes OUT/utility.md, utility.json and utility.png.

A seed changes everything that is drawn: random initializations, splits, support sets and, with privacy, the noise.
Starts that ask no query do not depend on epsilon and are measured once for each seed; the ceiling, which takes long and
only says which targets are learnable, with the first two seeds.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from common.command_line import run
from common.files import write_atomically
from common.metrics import lead_metric
from common.plan import StudyPlan, load_plan, plan_from_json
from common.processes import process_pool
from common.trials import CEILING, RANDOM, Estimate, Trial, interval, mean, split_means
from server.experiment import arms_of, claim, open_experiment, run_experiment, without_privacy
from server.progress import ProgressBars
from server.results import META
from server.simulation import site_folders

EPSILONS = [math.inf, 8.0, 3.0, 1.0]
GROUPS = {"held-out site": "held-out hospitals", "held-out patients": "held-out patients"}
BOTH = "both"

_CEILING_SEEDS = 2
Target = tuple[str, str]  # kind and name

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Setting:
    """One run of the study."""

    epsilon: float  # inf: without privacy
    seed: int
    first: bool  # measures what does not depend on epsilon, too

    @property
    def name(self) -> str:
        return f"epsilon-{self.epsilon:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One figure of the table: over the seeds, the mean over the targets of a group."""

    arm: str
    epsilon: float | None  # None: does not depend on it
    group: str
    value: Estimate
    over_random: Estimate  # paired by seed


@app.command()
def main(
    study: Annotated[Path, typer.Argument(help="The study plan (YAML).")],
    sites: Annotated[Path, typer.Option(help="Folder of the sites' folders.")],
    out: Annotated[Path, typer.Option(help="Where runs and results go.")],
    epsilon: Annotated[list[float], typer.Option(help="Budgets; inf: without privacy.")] = EPSILONS,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each setting.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, one processor each.")] = 1,
) -> None:
    """All algorithms of STUDY at each epsilon and seed: a table, and a plot of utility against epsilon."""
    plan = load_plan(study)
    settings = [Setting(e, seed, first=e == epsilon[0]) for seed in range(seeds) for e in epsilon]
    trials: dict[Setting, Sequence[Trial]] = {}
    with process_pool(jobs, preload=__name__, torch_threads=1) as pool:
        waiting = {pool.submit(run_setting, plan, study.parent, sites, out, s): s for s in settings}
        for done in track(as_completed(waiting), "Runs", total=len(waiting), console=Console(stderr=True)):
            trials[waiting[done]] = done.result()
    cells, left_out = evaluate(plan, trials)
    text = markdown(plan, cells, epsilon, seeds, left_out)
    write_atomically(out / "utility.md", text.encode())
    write_atomically(out / "utility.json", json.dumps([_finite(asdict(cell)) for cell in cells], indent=1).encode())
    draw(out / "utility.png", plan, cells, epsilon)
    Console().print(_table(plan, cells, epsilon, seeds))
    Console().print(f"Written: {out / 'utility.md'}, utility.json, utility.png", soft_wrap=True)


def run_setting(plan: StudyPlan, plan_folder: Path, sites: Path, out: Path, setting: Setting) -> Sequence[Trial]:
    """Run or resume one setting; its trials."""
    changed = plan_of(plan, setting)
    claim(changed, out / setting.name, resume=True)
    experiment = open_experiment(changed, plan_folder, site_folders(sites), out / setting.name, sentences=())
    with ProgressBars(Console(quiet=True)) as bars:
        return run_experiment(experiment, watcher=bars, engine="local", jobs=1).trials


def plan_of(plan: StudyPlan, setting: Setting) -> StudyPlan:
    """The study at this epsilon and seed; what asks nothing is compared with in the first setting only."""
    asking = {arm.name for arm in arms_of(plan) if arm.learns}
    compare = [other for other in plan.evaluation.compare if setting.first or other.arm in asking]
    ceiling = setting.first and setting.seed < _CEILING_SEEDS
    changed = {"compare": compare, "ceiling": ceiling, "without_privacy": False, "curve_points": 0}
    evaluation = plan.evaluation.model_copy(update=changed)
    changes: dict[str, object] = {"evaluation": evaluation, "seed": setting.seed}
    if plan.privacy is not None and math.isfinite(setting.epsilon):
        budget = {"epsilon": setting.epsilon, "noise_multiplier": None}
        changes["privacy"] = plan.privacy.model_copy(update=budget)
        return plan_from_json(plan.model_copy(update=changes).to_json())
    return without_privacy(plan.model_copy(update=changes))


def evaluate(plan: StudyPlan, trials: Mapping[Setting, Sequence[Trial]]) -> tuple[list[Cell], list[str]]:
    """The table's cells, and the targets that are not counted: their ceiling's interval includes guessing."""
    lead, shots = lead_metric(plan.task.kind), plan.evaluation.lead_shots
    ceiling = defaultdict(list)
    chance = defaultdict(list)
    values: dict[tuple[str, float | None], dict[Target, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for setting, measured in trials.items():
        for trial in measured:
            target = (trial.kind, trial.target)
            if trial.arm == CEILING:
                ceiling[target].append((100 * setting.seed + trial.split, trial.metrics[lead]))
                chance[target].append(trial.chance)
            if trial.arm == CEILING or trial.shots == shots:
                epsilon = None if trial.arm in (RANDOM, CEILING) or not _asks(plan, trial.arm) else setting.epsilon
                if epsilon is not None or setting.first:
                    values[trial.arm, epsilon][target][setting.seed].append(trial.metrics[lead])
    unlearnable = {
        target
        for target, pairs in ceiling.items()
        if not interval(list(split_means(pairs).values())).low > mean(chance[target])
    }
    targets = [target for target in values[RANDOM, None] if target not in unlearnable]
    groups = {name: [target for target in targets if target[0] == kind] for kind, name in GROUPS.items()}
    groups[BOTH] = targets
    by_chance = {group: _of_seeds(values[RANDOM, None], members) for group, members in groups.items() if members}
    cells = []
    for (arm, epsilon), measured_at in values.items():
        for group, start in by_chance.items():
            reached = _of_seeds(measured_at, groups[group])
            gains = [value - start[seed] for seed, value in reached.items()]
            cells.append(Cell(arm, epsilon, group, interval(list(reached.values())), interval(gains)))
    return cells, sorted(name for _, name in unlearnable)


def _of_seeds(values: Mapping[Target, Mapping[int, list[float]]], targets: list[Target]) -> dict[int, float]:
    """For each seed the mean over targets of the mean over their trials."""
    seeds = values[targets[0]]
    return {seed: mean([mean([v for v in values[t][seed] if not math.isnan(v)]) for t in targets]) for seed in seeds}


def _asks(plan: StudyPlan, arm: str) -> bool:
    return any(other.name == arm and other.learns for other in arms_of(plan))


def _title(plan: StudyPlan, arm: str) -> str:
    titles = {RANDOM: "random initialization", CEILING: "ceiling", "local_only": "warm start alone"}
    return titles.get(arm) or (f"**{plan.algorithm.name}** (the study)" if arm == META else arm)


def _name(epsilon: float | None) -> str:
    return "no privacy" if epsilon is None or math.isinf(epsilon) else f"epsilon {epsilon:g}"


def _ranked(cells: list[Cell]) -> list[str]:
    """Random and what asks nothing first, then by utility at the smallest epsilon."""

    def order(arm: str) -> tuple[bool, float]:
        own = [cell for cell in cells if cell.arm == arm and cell.group == BOTH]
        strictest = min(own, key=lambda cell: math.inf if cell.epsilon is None else cell.epsilon)
        return strictest.epsilon is not None, strictest.value.mean

    return sorted(dict.fromkeys(cell.arm for cell in cells), key=order)


def _rows(plan: StudyPlan, cells: list[Cell], epsilon: Sequence[float], group: str) -> list[list[str]]:
    found = {(cell.arm, cell.epsilon): cell.value for cell in cells if cell.group == group}
    rows = []
    for arm in _ranked(cells):
        always = found.get((arm, None))
        shown = [always, *[None] * (len(epsilon) - 1)] if always else [found.get((arm, e)) for e in epsilon]
        rows.append([_title(plan, arm), *(f"{v.mean:.3f} ± {v.high - v.mean:.3f}" if v else "" for v in shown)])
    return rows


def markdown(plan: StudyPlan, cells: list[Cell], epsilon: Sequence[float], seeds: int, left_out: list[str]) -> str:
    """A table for each group of targets."""
    lead = lead_metric(plan.task.kind).replace("_", " ")
    parts = []
    for group in dict.fromkeys(cell.group for cell in cells):
        header = [f"{lead}, {group}", *map(_name, epsilon)]
        rows = [header, ["---"] * len(header), *_rows(plan, cells, epsilon, group)]
        parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    note = f"{plan.evaluation.lead_shots} shots, {seeds} seeds, mean and half of the 95 % interval over the seeds."
    parts.append(note + (f" Not learnable here, not counted: {', '.join(left_out)}." if left_out else ""))
    return "\n\n".join(parts) + "\n"


def _table(plan: StudyPlan, cells: list[Cell], epsilon: Sequence[float], seeds: int) -> Table:
    lead = lead_metric(plan.task.kind).replace("_", " ")
    table = Table(title=f"{lead}, mean over held-out hospitals and patients, {seeds} seeds")
    for name in ("", *map(_name, epsilon)):
        table.add_column(name, justify="right" if name else "left")
    for row in _rows(plan, cells, epsilon, BOTH):
        table.add_row(row[0].replace("**", ""), *row[1:])
    return table


def draw(path: Path, plan: StudyPlan, cells: list[Cell], epsilon: Sequence[float]) -> None:
    """Utility against epsilon, a line for each algorithm; those that ask nothing are level lines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    budgets = sorted(epsilon)
    place = {value: number for number, value in enumerate(budgets)}
    figure = Figure(figsize=(8, 4.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    both = [cell for cell in cells if cell.group == BOTH]
    learning = [arm for arm in reversed(_ranked(cells)) if any(c.arm == arm and c.epsilon is not None for c in both)]
    for number, arm in enumerate(learning):
        points = sorted((place[c.epsilon], c.value) for c in both if c.arm == arm and c.epsilon is not None)
        xs = [x + 0.03 * (number - len(learning) / 2) for x, _ in points]
        bars = [value.high - value.mean for _, value in points]
        style: dict[str, Any] = {"linewidth": 2.6 if arm == META else 1.2, "marker": "os^Dv<>P*Xhp"[number % 12]}
        label = _title(plan, arm).replace("**", "")
        axes.errorbar(xs, [value.mean for _, value in points], yerr=bars, label=label, capsize=2, **style)
    for arm, line in zip([a for a in _ranked(cells) if a not in learning], (":", "--", "-.", "-"), strict=False):
        level = next(cell.value.mean for cell in both if cell.arm == arm)
        axes.axhline(level, color="0.35", linestyle=line, linewidth=1, label=_title(plan, arm))
    axes.set_xticks(range(len(budgets)), [_name(value) for value in budgets])
    axes.set_ylabel(lead_metric(plan.task.kind).replace("_", " "))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


if __name__ == "__main__":
    run(app)
