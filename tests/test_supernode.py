"""The SuperNode's process ends with its main thread, however that ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deploy.local_federation import ROOT

PROGRAM = """
import sys, threading, time
import client.supernode
def gives_up():
    threading.Thread(target=time.sleep, args=(60,)).start()  # as the server in it
    {end}
client.supernode.flower_supernode = gives_up
{main}()
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [("raise OSError('certificate has expired')", 1), ("sys.exit(305 - 300)", 5), ("sys.exit()", 0)],
    ids=["error", "exit code", "graceful"],
)
def test_it_ends_with_its_main_thread(end: str, code: int) -> None:
    program = PROGRAM.format(end=end, main="client.supernode.main")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert ("certificate has expired" in done.stderr) == ("OSError" in end)


def test_flowers_own_would_stay() -> None:
    program = PROGRAM.format(end="raise OSError", main="client.supernode.flower_supernode")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=10)
