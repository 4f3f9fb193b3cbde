"""Progress bars for whoever runs a study on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.history import RoundRecord, SiteOutcome


class ProgressBars:
    """A `server.experiment.Watcher` that draws: rounds over all federations, then evaluations; both with time left.

    On what is no terminal it prints a line a federation, and nothing that moves.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("[bold]{task.fields[what]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._rounds = self._bars.add_task("", total=None, visible=False, what="Rounds     ")
        self._evaluations = self._bars.add_task("", total=None, visible=False, start=False, what="Evaluations")
        self._before = 0  # rounds of the federations that are done

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def remarked(self, remark: str) -> None:
        self._console.print(remark, style="yellow", markup=False)

    def study_started(self, *, rounds: int) -> None:
        self._bars.update(self._rounds, total=rounds, visible=True)

    def federation_started(self, title: str) -> None:
        self._bars.update(self._rounds, description=title)
        if not self._console.is_terminal:
            self._console.print(f"federation: {title}")

    def run_started(self, *, study: str, done: int, rounds: int) -> None:
        self._bars.update(self._rounds, completed=self._before + done)
        self._before += rounds

    def sites_prepared(self, outcomes: tuple[SiteOutcome, ...]) -> None:
        self._say_refusals("start", outcomes)

    def round_started(self, round: int, sites: tuple[str, ...]) -> None:
        return

    def site_answered(self, round: int, outcome: SiteOutcome) -> None:
        return

    def round_committed(self, record: RoundRecord) -> None:
        if record.round:
            self._bars.advance(self._rounds)
            self._say_refusals(f"round {record.round}", record.sites)

    def evaluations_started(self, evaluations: int) -> None:
        self._bars.start_task(self._evaluations)
        self._bars.update(self._evaluations, total=evaluations, visible=True)

    def evaluation_finished(self, title: str) -> None:
        self._bars.update(self._evaluations, description=title, advance=1)

    def _say_refusals(self, when: str, outcomes: tuple[SiteOutcome, ...]) -> None:
        for outcome in outcomes:
            if outcome.status != "ok":
                text = f"{when}: {outcome.site} {outcome.status}: {outcome.reason or outcome.code}"
                self._console.print(text, style="yellow", markup=False)
