"""What stands at a site, as pages for a browser on the site's own machine (`client.local_server`).

Nothing is counted or judged here: every part asks the code behind the command of the same name, and a part that cannot
be read says why and leaves the others alone. The pages change nothing: a study is approved at the command line, by a
user of this machine whose name is kept; a browser that was left open is nobody.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from client import approval, privacy_page
from client.data.checks import coarsened
from client.data_check import DataCheck
from client.journal import APPROVED, ASKED, RELEASED, SiteJournal, in_words
from client.ledger import Ledger
from client.membership import membership_of
from client.node import site_status
from client.site import SITE_FILE, load_site_config
from client.spending import Spending, day_and_time, spending_of
from common.disclosure import shown
from common.errors import ConsiliumError, Problem, RunError
from common.journal import Entry
from common.keys import SignedDocument
from common.pages import render
from common.plan import StudyPlan
from common.records import DISCLOSURES, software_version

if TYPE_CHECKING:
    from client.adapted_model import Facts
    from client.review import Review

TITLES = {"": "Overview", "studies": "Studies", "privacy": "Privacy", "data": "Data", "models": "Adapted models"}

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_ENTRIES = 200  # of the journal; `journal show` has them all
_MOST_PROBLEMS = 200
T = TypeVar("T")


@dataclass(frozen=True)
class LocalPage:
    """A site, and what of it is shown."""

    folder: Path
    results: tuple[Path, ...]  # each written by `adapt`, or holding folders that were
    exact: bool  # counts; else as `common.disclosure` shows them
    check: DataCheck

    def number(self, count: int) -> str:
        """A count of patients or images."""
        return str(count) if self.exact else shown(count)


@dataclass(frozen=True)
class Part(Generic[T]):
    """One thing that is shown, or why it cannot be."""

    value: T | None
    problem: str = ""


@dataclass(frozen=True)
class Waiting:
    """A study that was sent and waits for a person."""

    digest: str
    plan: Part[StudyPlan]
    review: Part[Review]


@dataclass(frozen=True)
class Approved:
    """A study that may run."""

    digest: str
    name: str
    by: str
    when: str
    rounds: int
    charged: int  # of the rounds


@dataclass(frozen=True)
class Left:
    """What a study released."""

    study: str
    rounds: int
    bytes: int
    first: str
    last: str


@dataclass(frozen=True)
class Model:
    """A folder of `adapt`."""

    key: str  # of its address: never a path
    folder: Path
    facts: Part[Facts]
    report: bool  # whether its page is there


def overview(page: LocalPage) -> str:
    """What runs, and what wants a person."""
    return _render(
        page,
        "",
        status=_part(lambda: site_status(page.folder)),
        spending=_part(lambda: _spending(page.folder)),
        waiting=_part(lambda: len(approval.pending(_state(page.folder)))),
        when=day_and_time,
    )


def studies(page: LocalPage) -> str:
    """Plans that wait, in words and with their cost, and plans that were approved."""
    return _render(
        page,
        "studies",
        lab=_part(lambda: membership_of(page.folder).lab),
        waiting=_part(lambda: list(_waiting(page.folder))),
        approved=_part(lambda: list(_approved(page.folder))),
        at=f"--site {shlex.quote(str(page.folder.resolve()))}",
    )


def privacy(page: LocalPage) -> str:
    """What was spent, what left, and the journal of both."""
    entries = _part(lambda: _journal(page.folder).entries())
    told = entries.value or []
    return _render(
        page,
        "privacy",
        spending=_part(lambda: _spending(page.folder)),
        journal=entries,
        verified=_part(lambda: _journal(page.folder).verify(Ledger.found(_state(page.folder)))),
        left=_part(lambda: list(_left(told))),
        disclosures=DISCLOSURES.values(),
        entries=[(e.number, day_and_time(e.time), e.what, in_words(e)) for e in told[: -_MOST_ENTRIES - 1 : -1]],
    )


def privacy_to_print(page: LocalPage) -> str:
    """The ledger's own page. Raises ConsiliumError if there is no sound ledger."""
    spending = _spending(page.folder)
    if spending is None:
        raise RunError("no ledger was opened here yet: nothing was charged")
    return privacy_page.page(spending)


def data(page: LocalPage) -> str:
    """The last data check."""
    checked = page.check.now
    report = checked.report if page.exact or checked.report is None else coarsened(checked.report)
    return _render(
        page,
        "data",
        checked=checked,
        report=report,
        number=page.number,
        most=_MOST_PROBLEMS,
        when=day_and_time,
    )


def models(page: LocalPage) -> str:
    """What `adapt` found."""
    from client.adapted_model import in_figures, told  # torch
    from client.cross_validation import ARMS
    from common.metrics import lead_metric, metrics_of

    return _render(
        page,
        "models",
        models=_part(lambda: list(_models(page))),
        told=told,
        show=in_figures,
        arms=ARMS,
        metrics_of=metrics_of,
        lead_metric=lead_metric,
        number=page.number,
        when=day_and_time,
        places=page.results,
    )


def report_of(page: LocalPage, key: str) -> bytes | None:
    """The page that `adapt` wrote in the folder of that key; None if there is none to be read, or it lies elsewhere."""
    with contextlib.suppress(OSError):
        for folder in _folders(page.results):
            if _key(folder) == key and (file := _report(folder)) is not None:
                return file.read_bytes()
    return None


def closed(reason: str) -> str:
    """What is shown instead of all that."""
    return render(_TEMPLATES / "local_closed.html", reason=reason)


def _render(page: LocalPage, name: str, **values: object) -> str:
    config = _part(lambda: load_site_config(page.folder))
    return render(
        _TEMPLATES / f"local_{name or 'overview'}.html",
        here=name,
        titles=TITLES,
        site=config.value.name if config.value else page.folder.resolve().name,
        config=config,
        folder=page.folder,
        exact=page.exact,
        written=day_and_time(time.time()),
        version=software_version(),
        **values,
    )


def _part(compute: Callable[[], T]) -> Part[T]:
    try:
        return Part(compute())
    except ConsiliumError as error:
        return Part(None, str(error))
    except OSError as error:
        remedy = "is this user allowed to read it? The worker's user is"
        return Part(None, str(Problem(str(error.filename or "a file"), error.strerror or "cannot be read", remedy)))


def _state(folder: Path) -> Path:
    """The state folder, be it there or not. Raises PermissionError where it would only look empty to this user."""
    state = folder / load_site_config(folder).state
    with contextlib.suppress(FileNotFoundError):
        os.scandir(state).close()
    return state


def _journal(folder: Path) -> SiteJournal:
    return SiteJournal.of(_state(folder))


def _spending(folder: Path) -> Spending | None:
    """None if no ledger was ever opened here."""
    ledger = Ledger.found(_state(folder))
    return None if ledger is None else _spent_at(folder, ledger.head())


@functools.lru_cache(maxsize=4)  # seconds of work
def _spent_at(folder: Path, _head: tuple[int, str]) -> Spending:
    return spending_of(folder)


def _waiting(folder: Path) -> Iterator[Waiting]:
    lab_key = membership_of(folder).lab_key
    for digest, document in approval.pending(_state(folder)).items():
        plan = _part(functools.partial(approval.signed_plan, document, lab_key=lab_key))
        reviewed = _part(functools.partial(_reviewed, folder, document, lab_key)) if plan.value else Part[Any](None)
        yield Waiting(plan.value.digest if plan.value else digest, plan, reviewed)


def _reviewed(folder: Path, document: SignedDocument, lab_key: str) -> Review:
    ledger = Ledger.found(_state(folder))
    return _reviewed_at(folder, document, lab_key, ledger.head() if ledger else None, (folder / SITE_FILE).read_bytes())


@functools.lru_cache(maxsize=64)  # more than can wait
def _reviewed_at(folder: Path, document: SignedDocument, lab_key: str, _head: object, _config: bytes) -> Review:
    from client.review import review  # torch

    return review(folder, approval.signed_plan(document, lab_key=lab_key))


def _approved(folder: Path) -> Iterator[Approved]:
    """Newest first."""
    state = _state(folder)
    ledger = _part(lambda: Ledger.found(state)).value  # damaged: the page says so elsewhere
    charged = [charge.study for charge in ledger.charges()] if ledger else []
    for digest, record in sorted(approval.approved(state).items(), key=lambda item: -item[1].time):
        plan, when = record.plan, day_and_time(record.time)
        yield Approved(digest, plan.study, record.by, when, plan.rounds, charged.count(digest))


def _left(entries: Iterable[Entry]) -> Iterator[Left]:
    names: dict[str, str] = {}
    releases: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.what in (ASKED, APPROVED):
            names[entry.text("study")] = entry.text("name")
        if entry.what == RELEASED:
            releases.setdefault(entry.text("study"), []).append(entry)
    for study, found in releases.items():
        title = f"{names[study]} ({study[:12]})" if study in names else study[:12]
        size = sum(entry.count("bytes") for entry in found)
        yield Left(title, len(found), size, day_and_time(found[0].time), day_and_time(found[-1].time))


def _models(page: LocalPage) -> Iterator[Model]:
    from client.adapted_model import read_facts

    for folder in _folders(page.results):
        facts = _part(functools.partial(read_facts, folder))
        yield Model(_key(folder), folder, facts, _report(folder) is not None)


def _folders(results: Iterable[Path]) -> Iterator[Path]:
    """Folders that `adapt` wrote: those given, and those directly in them."""
    from client.adapted_model import FACTS  # torch

    for place in results:
        if (place / FACTS).exists():
            yield place
        elif place.is_dir():
            yield from (path for path in sorted(place.iterdir()) if (path / FACTS).exists())


def _report(folder: Path) -> Path | None:
    """Its page, if it lies in the folder itself: a link that leads out of it is not followed."""
    from client.adapted_model import PAGE

    file = folder / PAGE
    return file if file.is_file() and file.resolve().parent == folder.resolve() else None


def _key(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
