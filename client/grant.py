"""Leave to ask private queries: the ledger gives it, the private data set uses it up."""

from __future__ import annotations

from common.errors import UnchargedQuery


class Grant:
    """Leave to make so many private queries; given by `Ledger.charge`, used up by PrivateDataset."""

    def __init__(self, queries: int) -> None:
        self._left = queries

    @property
    def left(self) -> int:
        return self._left

    def use(self) -> None:
        """Take one query. Raises UnchargedQuery when none is left."""
        if self._left < 1:
            raise UnchargedQuery(f"{self._left} charged queries are left")
        self._left -= 1
