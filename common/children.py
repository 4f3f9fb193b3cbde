"""Programs that a service starts and keeps running: their environment, restarts, and an orderly end."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_QUIET = {  # beside what common.quiet_flower says
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "INFO",
    "PYTHONSAFEPATH": "1",
}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_LOG_BYTES = 10_000_000  # then a program's output begins anew, with the old one beside it
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


def flower_environment(home: Path) -> dict[str, str]:
    """This process's environment, for a Flower program with a home of its own; its programs are found beside Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    exempt = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), *_LOOPBACK)))
    proxy = {"NO_PROXY": exempt, "no_proxy": exempt}  # its own programs speak on loopback
    return {**os.environ, **_QUIET, **proxy, "FLWR_HOME": str(home), "PATH": path}


@dataclass
class Child:
    """One program, started again `restart_s` after it ended."""

    name: str
    command: Sequence[str]
    folder: Path  # where it runs, and where NAME.log is written
    environment: Mapping[str, str]
    restart_s: float = 2.0
    starts: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _ended: float | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.running else None

    def tend(self, log: logging.Logger) -> None:
        """Start it if it does not run and its pause is over."""
        if self.running:
            return
        if self._process is not None and self._ended is None:
            self._ended = time.monotonic()
            log.warning("%s ended with %s; again in %g s", self.name, self._process.returncode, self.restart_s)
            _kill_group(self._process, signal.SIGKILL)  # what it left behind
        if self._ended is not None and time.monotonic() - self._ended < self.restart_s:
            return
        self._start(log)

    def stop(self, *, patience_s: float = 5.0) -> None:
        """Ask it and its children to end, then make them."""
        if self._process is None:
            return
        _kill_group(self._process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        _kill_group(self._process, signal.SIGKILL)
        self._process.wait()
        self._process, self._ended = None, None

    def _start(self, log: logging.Logger) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log_file = self.folder / f"{self.name}.log"
        if log_file.exists() and log_file.stat().st_size > _LOG_BYTES:
            log_file.replace(log_file.with_suffix(".log.1"))
        with log_file.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._ended = None
        self.starts += 1
        log.info("%s started, process %d", self.name, self._process.pid)


def stop_all(children: Sequence[Child]) -> None:
    """Stop them, the last one first."""
    for child in reversed(children):
        child.stop()


def _kill_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """For a child to call: a service killed by force leaves no program behind that nobody tends."""
    _libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
