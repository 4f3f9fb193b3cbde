"""Who watches a run: a command line's progress bars, a dashboard, nobody."""

from __future__ import annotations

from typing import Protocol

from server.history import RoundRecord, SiteOutcome


class Observer(Protocol):
    """Told of everything as it happens, from the thread that runs the rounds."""

    def run_started(self, *, study: str, done: int, rounds: int) -> None:
        """`done` of `rounds` rounds were committed before (more than 0 when a run goes on)."""
        ...

    def sites_prepared(self, outcomes: tuple[SiteOutcome, ...]) -> None: ...

    def round_started(self, round: int, sites: tuple[str, ...]) -> None:
        """`sites` are asked now."""
        ...

    def site_answered(self, round: int, outcome: SiteOutcome) -> None:
        """One site's answer was judged. Sites that are late come when the time is up; those not asked, never."""
        ...

    def round_committed(self, record: RoundRecord) -> None:
        """The round is on disk, below quorum or not."""
        ...


class Unobserved:
    """Nobody watches."""

    def run_started(self, *, study: str, done: int, rounds: int) -> None:
        return

    def sites_prepared(self, outcomes: tuple[SiteOutcome, ...]) -> None:
        return

    def round_started(self, round: int, sites: tuple[str, ...]) -> None:
        return

    def site_answered(self, round: int, outcome: SiteOutcome) -> None:
        return

    def round_committed(self, record: RoundRecord) -> None:
        return
