"""Where time goes: spans that a profile collects. Free where nobody asks for one.

    with timed("noise"): ...                @timed("clip")
                                            def clip(...): ...

Where PROFILE names a folder, each process appends its spans to a file of its own there, a line each, in Chrome's
trace-event format; so processes that it starts take part, whoever starts them. Spans lie inside each other; a span says
a part of the program and nothing of what it worked on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import ContextDecorator
from pathlib import Path
from typing import Any

PROFILE = "CONSILIUM_PROFILE"  # environment variable

_HELD = 10_000  # spans in memory


class _Spans:
    """Those of this process. A thread's spans are written when its outermost one ends."""

    def __init__(self, folder: Path) -> None:
        self._file, self._lock = folder / f"{os.getpid()}.jsonl", threading.Lock()
        self._of_thread = threading.local()

    def begin(self) -> int:
        """The time, in nanoseconds."""
        mine = self._of_thread
        if not hasattr(mine, "depth"):
            mine.depth, mine.ended = 0, []
        mine.depth += 1
        return time.monotonic_ns()

    def end(self, part: str, began_ns: int) -> None:
        mine, now_ns = self._of_thread, time.monotonic_ns()
        mine.depth -= 1
        mine.ended.append({"name": part, "ph": "X", "ts": began_ns / 1e3, "dur": (now_ns - began_ns) / 1e3})
        if mine.depth == 0 or len(mine.ended) >= _HELD:
            self._write(mine.ended)
            mine.ended = []

    def _write(self, spans: list[dict[str, Any]]) -> None:
        who = {"pid": os.getpid(), "tid": threading.get_native_id()}
        text = "".join(json.dumps(span | who) + "\n" for span in spans)
        with self._lock, self._file.open("a") as file:
            file.write(text)


def _spans_here() -> _Spans | None:
    return _Spans(Path(os.environ[PROFILE])) if PROFILE in os.environ else None


_spans = _spans_here()


def profile_to(folder: Path | None) -> None:
    """Collect the spans of this process, and of those that it starts from now on, in `folder`; None: no longer."""
    global _spans
    if folder is None:
        os.environ.pop(PROFILE, None)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[PROFILE] = str(folder.resolve())
    _spans = _spans_here()


class timed(ContextDecorator):  # reads as a statement
    """A span of `part`."""

    def __init__(self, part: str) -> None:
        self._part, self._began_ns, self._spans = part, 0, _spans

    def __enter__(self) -> None:
        self._spans = _spans
        if self._spans is not None:
            self._began_ns = self._spans.begin()

    def __exit__(self, *_: object) -> None:
        if self._spans is not None:
            self._spans.end(self._part, self._began_ns)

    def _recreate_cm(self) -> timed:
        return timed(self._part)  # a decorated function may run in several threads at once
