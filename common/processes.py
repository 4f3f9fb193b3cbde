"""Processes for heavy work beside this one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def process_pool(processes: int, *, preload: str, torch_threads: int | None = None) -> ProcessPoolExecutor:
    """A pool of `processes`, all forked from one clean process that has imported the module `preload`: forks of this
    one would copy its threads in an unknown state. Ctrl-C is for this process alone; when it ends, even by kill -9,
    they end. `torch_threads`: of each, where they compute with torch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(torch_threads,))


def _begin(torch_threads: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if torch_threads is not None:
        import torch

        torch.set_num_threads(torch_threads)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
