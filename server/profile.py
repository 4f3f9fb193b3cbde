"""Where the rounds of a simulation spent their time, from the spans that its processes left.

A round is the lab's thread; while that waits, `jobs` sites compute at once, so what a site spends counts 1/jobs. What
the lab waited beyond that is the network: messages between processes, and sites that wait for each other.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from common.timing import profile_to

TRACE = "trace.json"
ROUND, SITE, WAITING, OTHER = "round", "site", "network", "other"
PARTS = (
    "load",
    "forward/backward",
    "clip",
    "noise",
    "accounting",
    "serialise",
    "store",
    WAITING,
    "aggregate",
    OTHER,
)


@dataclass(frozen=True)
class Profile:
    """Seconds of each of PARTS over all rounds together."""

    rounds: int
    seconds: dict[str, float]

    @property
    def whole(self) -> float:
        return sum(self.seconds.values())

    def table(self) -> Table:
        """A line a part."""
        shown = Table("where a round's time went", "seconds", "share")
        for part, seconds in self.seconds.items():
            share = seconds / self.whole if self.whole else 0.0
            shown.add_row(part, f"{seconds / max(1, self.rounds):.4f}", f"{share:.1%}")
        shown.add_row(f"a round (mean of {self.rounds})", f"{self.whole / max(1, self.rounds):.4f}", "100.0%")
        return shown


@dataclass(frozen=True)
class Recording:
    """The spans of a run that is over."""

    spans: list[dict[str, Any]]
    jobs: int

    def write(self, trace: Path) -> Profile:
        """Leave them in `trace`, which Perfetto and Chrome open."""
        trace.write_text(json.dumps({"traceEvents": self.spans, "displayTimeUnit": "ms"}))
        return profile_of(self.spans, jobs=self.jobs)


@contextmanager
def profiled(wanted: bool, *, jobs: int) -> Iterator[Recording]:
    """Record what runs inside, in this process and those that it starts; the recording is complete afterwards."""
    recording = Recording([], jobs)
    if not wanted:
        yield recording
        return
    with tempfile.TemporaryDirectory(prefix="consilium-profile-") as folder:
        profile_to(Path(folder))
        try:
            yield recording
        finally:
            profile_to(None)
            for part in sorted(Path(folder).glob("*.jsonl")):
                recording.spans.extend(map(json.loads, part.read_text().splitlines()))


def profile_of(spans: Iterable[dict[str, Any]], *, jobs: int) -> Profile:
    """The rounds' time by part; spans outside of a round do not count."""
    lab: Counter[str] = Counter()
    sites: Counter[str] = Counter()
    roots = list(_by_root(spans))
    times = sorted((root["ts"], root["ts"] + root["dur"]) for root, _ in roots if root["name"] == ROUND)
    for root, own in roots:
        if root["name"] == ROUND:
            lab.update(own)
        elif root["name"] == SITE and any(begin <= root["ts"] <= end for begin, end in times):
            sites.update(own)
    seconds = {part: (lab[part] + sites[part] / jobs) / 1e6 for part in PARTS}
    seconds[WAITING] = max(0.0, lab[WAITING] - sites.total() / jobs) / 1e6
    seconds[OTHER] = (lab[ROUND] + lab[OTHER] + (sites[SITE] + sites[OTHER]) / jobs) / 1e6
    return Profile(len(times), seconds)


def _by_root(spans: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Counter[str]]]:
    """(outermost span, microseconds by part inside it without what lies deeper), thread by thread."""
    of_thread: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for span in spans:
        of_thread.setdefault((span["pid"], span["tid"]), []).append(span)
    for mine in of_thread.values():
        mine.sort(key=lambda span: (span["ts"], -span["dur"]))
        open_spans: list[dict[str, Any]] = []
        own: Counter[str] = Counter()
        for span in mine:
            while open_spans and open_spans[-1]["ts"] + open_spans[-1]["dur"] <= span["ts"]:
                open_spans.pop()
            if not open_spans:
                own = Counter()
                yield span, own  # filled before the next one is asked for
            else:
                own[_part(open_spans[-1])] -= span["dur"]
            own[_part(span)] += span["dur"]
            open_spans.append(span)


def _part(span: dict[str, Any]) -> str:
    return span["name"] if span["name"] in (*PARTS, ROUND, SITE) else OTHER
