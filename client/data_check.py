"""`data check` behind the site's own page: begun by a person, kept while the page runs, written nowhere."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from client.data.checks import SiteReport, check_site
from client.data.rows import Row
from client.data.suspicions import Suspicions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checked:
    """How far a check is; `begun` and `ended` are seconds since 1970."""

    number: int = 0  # of this check, from 1; 0: none was begun
    begun: float = 0.0
    ended: float | None = None
    seen: int = 0  # images so far
    report: SiteReport | None = None  # None at the end: it failed

    @property
    def running(self) -> bool:
        return self.number > 0 and self.ended is None


class DataCheck:
    """One check at a time of the site in `folder`, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._now = Checked()

    @property
    def now(self) -> Checked:
        return self._now

    def begin(self, number: int) -> None:
        """Begin the check of this number if it is the next one: asked for again, as by a reload, it is not repeated."""
        with self._lock:
            if self._now.running or number != self._now.number + 1:
                return
            self._now = Checked(number, begun=time.time())
        threading.Thread(target=self._check, name="data check", daemon=True).start()

    def _check(self) -> None:
        suspicions, report = Suspicions(), None
        try:
            report = check_site(self._folder, look=[suspicions.look, self._count])
            report = dataclasses.replace(report, suspicions=suspicions.all())
        except Exception:
            report = None
            _log.exception("the data check failed")
        self._now = dataclasses.replace(self._now, ended=time.time(), report=report)

    def _count(self, _: Row) -> None:
        self._now = dataclasses.replace(self._now, seen=self._now.seen + 1)
