"""What the patients' privacy budget was spent on, study by study: for the hospital's data protection officer."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from client.ledger import FILE, Charge, Ledger, Terms
from client.site import SiteConfig, load_site_config

_MOST_POINTS = 40  # of the curve: each is a composition of all charges before it


@dataclass(frozen=True)
class StudySpending:
    """One study."""

    name: str  # empty if nothing here says it
    digest: str
    charges: tuple[Charge, ...]
    epsilon: float  # of this study alone

    @property
    def title(self) -> str:
        return f"{self.name} ({self.digest[:12]})" if self.name else self.digest[:12]

    @property
    def queries(self) -> int:
        """Private queries that were charged."""
        return sum(charge.event.count for charge in self.charges)

    def cells(self) -> tuple[str, ...]:
        """Title, rounds, queries, epsilon, from, to."""
        rounds = [charge.round for charge in self.charges]
        return (
            self.title,
            f"{len(rounds)}, {min(rounds)} to {max(rounds)}",
            str(self.queries),
            f"{self.epsilon:.3f}",
            day_and_time(self.charges[0].time)[:10],
            day_and_time(self.charges[-1].time)[:10],
        )


@dataclass(frozen=True)
class Spending:
    """A site's ledger, read."""

    site: str
    phantom: bool
    terms: Terms
    charges: tuple[Charge, ...]
    head: str
    spent: float
    studies: tuple[StudySpending, ...]  # in the order of their first charges

    def sentences(self) -> Iterator[str]:
        """The sum, and what it means."""
        terms = self.terms
        spent = f"epsilon {self.spent:.3f} of {terms.epsilon:g} is spent"
        yield f"{spent} at delta {terms.delta:.3g}; the unit is the patient"
        if terms.order is not None:
            yield f"a Renyi filter of order {terms.order} counts: studies may be chosen after earlier results"

    def curve(self) -> list[tuple[float, float]]:
        """(seconds since 1970, epsilon of all charges until then), at the ends of studies and evenly in between."""
        count = len(self.charges)
        ends = {study.charges[-1].number for study in self.studies}
        even = {round(1 + i * (count - 1) / (_MOST_POINTS - 1)) for i in range(_MOST_POINTS)}
        chosen = sorted(number for number in ends | even if 1 <= number <= count)
        events = [charge.event for charge in self.charges]
        return [(self.charges[number - 1].time, self.terms.spent(events[:number])) for number in chosen]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "site": self.site,
            "terms": asdict(self.terms),
            "spent": self.spent,
            "rows": len(self.charges),
            "head": self.head,
            "studies": [
                {
                    "name": s.name,
                    "digest": s.digest,
                    "rounds": len(s.charges),
                    "queries": s.queries,
                    "epsilon": s.epsilon,
                }
                for s in self.studies
            ],
            "charges": [asdict(charge) for charge in self.charges],
        }


def spending_of(folder: Path) -> Spending:
    """What was spent at the site in `folder`, or by the ledger that lies in it.

    Raises LedgerDamaged if there is no ledger or it was changed, DataError for site.yaml.
    """
    config: SiteConfig | None = None if (folder / FILE).exists() else load_site_config(folder)
    state = folder / config.state if config else folder
    chain = Ledger.existing(state).chain()
    terms, names = chain.terms, _names(state)
    of_study: dict[str, list[Charge]] = {}
    for charge in chain.charges:
        of_study.setdefault(charge.study, []).append(charge)
    return Spending(
        site=config.name if config else "",
        phantom=config.phantom if config else False,
        terms=terms,
        charges=chain.charges,
        head=chain.head[1],
        spent=terms.spent(charge.event for charge in chain.charges),
        studies=tuple(
            StudySpending(names.get(digest, ""), digest, tuple(charges), terms.spent(c.event for c in charges))
            for digest, charges in of_study.items()
        ),
    )


def day_and_time(seconds: float) -> str:
    """In the hospital's own time."""
    return f"{datetime.datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"


def _names(state: Path) -> dict[str, str]:
    """Of studies that are or were approved, by digest."""
    names = {}
    for file in sorted((state / "approved").glob("*")):
        try:
            names[file.name.split(".")[0]] = str(json.loads(json.loads(file.read_text())["plan"])["study"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return names
