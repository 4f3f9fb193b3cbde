"""When a reply leaves: at the end of a public span of time, not when the data happened to be done.

How long a round takes depends on who was drawn, how many images they have, and whether a gradient was a number. So a
reply says its time as a span (a power of two, in seconds), and waits for the span's end. A study's span never gets
shorter, so that over all of its rounds nothing shows but in which of them it doubled. What touches no image (a refusal,
a stored release) leaves at once.

    cost: a round takes 1.44 times as long on average, 2 times at most, and a second at least; other studies wait too
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

ROLL_CALL_S = 120.0  # how long a lab waits at least for a hospital to get ready

_SHORTEST_S = 1.0
_LATEST = 0.9  # of the plan's time limit: nothing waits until it is too late


def span_s(seconds: float) -> float:
    """The power of two, 1 at least, that `seconds` fit into."""
    return _SHORTEST_S * 2.0 ** max(0, math.ceil(math.log2(max(seconds, _SHORTEST_S) / _SHORTEST_S)))


class ReplyTimes:
    """The span of each study so far. Not `held`, as in a simulation, replies say their span and leave at once."""

    def __init__(self, *, held: bool) -> None:
        self._held = held
        self._spans: dict[str, float] = {}

    def span(self, study: str, *, since: float) -> float:
        """The span of a reply of `study` (plan digest) that was begun at `since` (monotonic)."""
        self._spans[study] = max(span_s(time.monotonic() - since), self._spans.get(study, 0.0))
        return self._spans[study]

    @contextmanager
    def held(self, study: str, *, limit_s: float) -> Iterator[None]:
        """Whatever is done inside, and however it ends, takes until the end of a span."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.wait(study, since=since, limit_s=limit_s)

    def wait(self, study: str, *, since: float, limit_s: float) -> None:
        """Until the end of the span, and not beyond what the study's time limit leaves."""
        if self._held:
            elapsed = time.monotonic() - since
            end = max(span_s(elapsed), self._spans.get(study, 0.0))
            if study in self._spans:  # others were never opened here
                self._spans[study] = end
            time.sleep(max(0.0, min(end, _LATEST * limit_s) - elapsed))
