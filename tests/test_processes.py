"""Pools of processes, killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import soon

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, signal
from common.processes import process_pool

with process_pool(2, preload="json") as pool:
    print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_process_outlives_a_parent_that_was_killed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert done.returncode == -9
    processes = [int(word) for word in done.stdout.split()]
    assert processes
    assert soon(lambda: not any(alive(process) for process in processes))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
