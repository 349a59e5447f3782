"""Worker processes that end as they should."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, resource_tracker
from typing import Any

from .errors import GHNError


@contextlib.contextmanager
def process_pool(
    workers: int, initializer: Callable[..., object], initargs: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that Ctrl-C ends without a word.

    Args:
        workers: How many.
        initializer: Called in each before anything else, with `initargs`.
        initargs: What can be pickled.

    Raises:
        GHNError: If a worker is killed.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (initializer, initargs))
    try:
        _hold_interrupts(True)
        for _ in range(workers):
            pool.submit(int)  # the first tasks start the processes
        _hold_interrupts(False)
        yield pool
    except BrokenProcessPool as error:
        raise GHNError("A worker process was killed, most likely for want of memory: use fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _hold_interrupts(hold: bool) -> None:
    """Keeps Ctrl-C waiting, here and in processes that start now, each until it lets it through itself."""
    if sys.platform != "win32":
        if hold:
            resource_tracker.ensure_running()  # whose start would let it through
        signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, {signal.SIGINT})


def _start_worker(initializer: Callable[..., object], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _hold_interrupts(False)
    initializer(*initargs)
