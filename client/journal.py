"""The hospital's journal, STATE/journal.jsonl: what was asked by whom, approved or withdrawn by whom, charged, released
and refused, signed with the site's key.

Charges and releases are written up from the ledger and the release store, so that what a crash left out is written the
next time. A journal that cannot be trusted or written stops a round before it is charged: a hospital that cannot say
what it released releases nothing, and has lost nothing. After a charge it stops nothing: the patients have paid.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.ledger import FILE as LEDGER
from client.ledger import Chain, Charge, Ledger, rolled_back
from client.membership import SITE_KEY
from common.errors import JournalDamaged, Refusal
from common.journal import Entry, Found, Journal
from common.keys import SignedDocument, fingerprint, load_signing_key
from common.plan import StudyPlan

if TYPE_CHECKING:
    from client.release_store import ReleaseStore  # torch

FILE = "journal.jsonl"
ASKED, APPROVED, WITHDRAWN = "asked", "approved", "withdrawn"
CHARGED, RELEASED, REFUSED = "charged", "released", "refused"
RESTORED, REOPENED = "ledger restored", "journal reopened"

REMEDY = "restore it from its backup, or `consilium-site journal reopen` and say why to whom it concerns"

_LONGEST = 300  # characters of a reason
_DAY_S = 86_400


@dataclass(frozen=True)
class SiteJournal:
    """A site's journal; a simulated site keeps none."""

    journal: Journal | None

    @staticmethod
    def of(state: Path) -> SiteJournal:
        """The journal in a site's state folder. Raises UsageError if the site has no key."""
        return SiteJournal(Journal(state / FILE, load_signing_key(state / SITE_KEY)))

    def asked(self, plan: StudyPlan, document: SignedDocument) -> None:
        """A lab sent a plan that it signed."""
        self._add(ASKED, study=plan.digest, name=plan.study, lab=fingerprint(document.signer))

    def approved(self, plan: StudyPlan, *, by: str) -> None:
        """A person approves a plan."""
        self._add(APPROVED, study=plan.digest, name=plan.study, by=by)

    def withdrawn(self, digest: str, *, by: str) -> None:
        """A person takes an approval back."""
        self._add(WITHDRAWN, study=digest, by=by)

    def restored(self, *, by: str, rows: int, replayed: int) -> None:
        """A ledger of `rows` charges was put in place, the last `replayed` of them from this journal."""
        self._add(RESTORED, by=by, rows=rows, replayed=replayed)

    def refused(self, refusal: Refusal, *, study: str) -> None:
        """The site said no; what is refused again on the same day, for the same reason, is told once."""
        today = time.time() // _DAY_S

        def lacking(entries: list[Entry]) -> Iterator[Found]:
            recent = (entry for entry in entries if entry.what == REFUSED and entry.time // _DAY_S == today)
            if all((e.text("study"), e.text("code")) != (study, refusal.code) for e in recent):
                yield REFUSED, {"study": study, "code": refusal.code, "why": str(refusal)[:_LONGEST]}

        self._write(lacking)

    def entries(self) -> list[Entry]:
        """All of them, each as it was signed. Raises JournalDamaged."""
        return self.journal.entries() if self.journal else []

    def write_up(self, study: str, ledger: Ledger | None, releases: ReleaseStore) -> str:
        """Every charge of the ledger and every release of the study that is not there yet. Returns "LINE HASH" of the
        last line, for the next charge: so the ledger, of which the lab keeps the head, holds the journal too.

        Raises JournalDamaged, or LedgerRolledBack if the ledger lacks what was charged.
        """
        if self.journal is None:
            return ""
        path, chain = self.journal.path, ledger.chain() if ledger else None

        def lacking(entries: list[Entry]) -> Iterator[Found]:
            if chain:
                _hold(chain, entries, path)
                yield from _unbroken(_missing(chain, entries, path), entries, path)
            told = {e.count("round") for e in entries if e.what == RELEASED and e.text("study") == study}
            for round in sorted(set(releases.rounds()) - told):
                yield RELEASED, {"study": study, "round": round, **_weighed(releases, round)}

        return self._write(lacking)

    def verify(self, ledger: Ledger | None, *, former: Collection[str] = ()) -> list[Entry]:
        """Every entry, if none was changed and none is missing: the ledger's charges say what must be there.

        Raises JournalDamaged with the exact place, LedgerRolledBack, or LedgerDamaged.
        """
        if self.journal is None:
            return []
        entries, path = self.journal.verified(former=former), self.journal.path
        if ledger:
            chain = ledger.chain()
            _hold(chain, entries, path)
            _unbroken(_missing(chain, entries, path), entries, path)
        return entries

    def reopen(self, ledger: Ledger | None, *, by: str) -> Path | None:
        """Begin anew with all that the ledger knows, because a person says so; where the journal before it now is."""
        if self.journal is None:
            return None
        path, aside = self.journal.path, None
        digest = sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        if path.exists():
            aside = path.rename(path.with_name(f"{path.name}.replaced-{time.time_ns()}"))
        charged = _missing(ledger.chain(), [], path) if ledger else []
        begun: list[Found] = [(REOPENED, {"by": by, "before": digest, "rows": len(charged)})]
        self._write(lambda _: iter([*begun, *charged]))
        return aside

    def _add(self, what: str, **fields: str | int) -> None:
        self._write(lambda _: iter([(what, fields)]))

    def _write(self, lacking: Callable[[list[Entry]], Iterator[Found]]) -> str:
        return self.journal.add(lacking) if self.journal else ""


def in_words(entry: Entry) -> str:
    """An entry's fields on a line, digests cut short, nothing that a terminal or a page would obey."""
    short = ("study", "hash", "sha256")
    told = (f"{name} {str(value)[:12] if name in short else value}" for name, value in entry.fields.items())
    return "".join(c if c.isprintable() else "?" for c in ", ".join(told))


def charged_rows(entries: list[Entry]) -> dict[int, Entry]:
    """The ledger's rows as the journal knows them."""
    return {entry.count("row"): entry for entry in entries if entry.what == CHARGED}


def _hold(chain: Chain, entries: list[Entry], path: Path) -> None:
    """Raise JournalDamaged unless every charge still follows the line that it followed; those from before the journal
    was reopened followed lines of the one before."""
    former = max((entry.count("rows") for entry in entries if entry.what == REOPENED), default=0)
    for charge in chain.charges[former:]:
        line, _, digest = charge.journal.partition(" ")
        if line and (len(entries) < int(line) or (int(line) and entries[int(line) - 1].hash != digest)):
            what = f"row {charge.number} of the ledger was charged after line {line}, which is not there as it was"
            raise JournalDamaged(f"{path}:{line}: {what}: lines were cut off or written anew; {REMEDY}")


def _missing(chain: Chain, entries: list[Entry], path: Path) -> list[Found]:
    """The charges that the journal lacks. Raises LedgerRolledBack if the ledger lacks one that the journal has."""
    known = charged_rows(entries)
    for row, entry in known.items():
        if not chain.holds(row, entry.text("hash")):
            raise rolled_back(path.with_name(LEDGER), row, "the journal")
    return [(CHARGED, _told(charge)) for charge in chain.charges if charge.number not in known]


def _unbroken(missing: list[Found], entries: list[Entry], path: Path) -> list[Found]:
    """The newest charge, if its worker was killed before it was written up. Raises JournalDamaged if more are missing:
    each charge is written up before the next."""
    if len(missing) > 1:
        what = f"ends before row {missing[0][1]['row']} of the ledger: what came after was cut off"
        raise JournalDamaged(f"{path}:{len(entries) + 1}: {what}; {REMEDY}")
    return missing


def _told(charge: Charge) -> dict[str, Any]:
    row = {"row": charge.number, "hash": charge.hash, "charged": charge.time, "after": charge.journal}
    return {"study": charge.study, "round": charge.round, **row, **asdict(charge.event)}


def _weighed(releases: ReleaseStore, round: int) -> dict[str, str | int]:
    """Digest and size of a release as it leaves, and that it was."""
    from common.wire import pack

    release = releases.load(round)
    packed = pack(release) if release else b""
    return {"sha256": sha256(packed).hexdigest(), "bytes": len(packed)}
