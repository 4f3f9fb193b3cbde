"""What the lab saw of each hospital's ledger, in all studies: LAB/ledgers/SITE.jsonl, a line for every row count.

The newest goes back to the hospital with each instruction: its worker refuses, before it charges anything, if its own
ledger does not hold that row. So a ledger that was put back to an older copy, or went another way since, is noticed
however many rows it has by then, and in whatever study.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

from server.replies import Ledger


class LedgerCopies:
    """Of all sites; kept in `folder` for every study, or without one for a single run in this process."""

    def __init__(self, folder: Path | None, *, study: str) -> None:
        self._folder, self._study = folder, study
        self._of_this_run: dict[str, dict[int, str]] = {}

    def seen(self, site: str) -> dict[int, str]:
        """Row count -> hash of the last row; a line that a crash tore says nothing."""
        if self._folder is None:
            return self._of_this_run.get(site, {})
        try:
            lines = (self._folder / f"{site}.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        return dict(filter(None, map(_parse, lines)))

    def newest(self, site: str) -> Ledger:
        """(row count, hash of the last row) that the site showed last; (0, "") if it showed none."""
        return max(self.seen(site).items(), default=(0, ""))

    def objection(self, site: str, ledger: Ledger) -> str | None:
        """A ledger had one hash at each length, in whatever study it was shown."""
        rows, head = ledger
        if self.seen(site).get(rows, head) == head:
            return None
        return f"the site's ledger has {rows} rows, and not those that it had in an earlier study"

    def take(self, site: str, ledger: Ledger) -> None:
        """Keep what the site showed, once it was charged at all; on disk when this returns."""
        rows, head = ledger
        if rows == 0 or rows in self.seen(site):
            return
        if self._folder is None:
            self._of_this_run.setdefault(site, {})[rows] = head
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"rows": rows, "head": head, "study": self._study, "time": time.time()})
        with (self._folder / f"{site}.jsonl").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another study's process may be writing
            file.write(f"\n{line}\n".encode())  # a line of its own, also after one that a crash tore
            file.flush()
            os.fsync(file.fileno())


def _parse(line: bytes) -> Ledger | None:
    try:
        fields = json.loads(line)
        return int(fields["rows"]), str(fields["head"])
    except (ValueError, KeyError, TypeError):
        return None
