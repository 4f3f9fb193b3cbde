"""What a benchmark ran on, and the memory that it needed."""

from __future__ import annotations

import platform
from pathlib import Path

_PEAK = Path("/proc/self/clear_refs")  # Linux alone tells a peak, and lets it begin anew
TELLS_PEAKS = _PEAK.exists()


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def begin_peak() -> int:
    """Bytes that this process has in memory; its peak counts from here."""
    _PEAK.write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Bytes: the most that it had since."""
    return _status("VmHWM")


def _status(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{entry}:")) * 1024
