"""Worker processes that end as they should."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process, resource_tracker
from typing import Any

from .errors import GHNError


@contextlib.contextmanager
def process_pool(
    workers: int, initializer: Callable[..., object], initargs: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that Ctrl-C ends without a word, and that do not outlive this one.

    Args:
        workers: How many.
        initializer: Called in each before anything else, with `initargs`.
        initargs: What can be pickled.

    Raises:
        GHNError: If a worker is killed.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (initializer, initargs))
    try:
        with _interrupts_held():
            for _ in range(workers):
                pool.submit(int)  # the first tasks start the processes
        yield pool
    except BrokenProcessPool as error:
        raise GHNError("A worker process was killed, most likely for want of memory: use fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keeps Ctrl-C waiting, and in processes that start meanwhile until they let it through themselves."""
    if sys.platform == "win32":
        yield
        return
    resource_tracker.ensure_running()  # whose start would let it through
    noted: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    # A thread that others started before may receive it for all of them, so that a mask alone does not hold it back.
    before: Any = signal.signal(signal.SIGINT, lambda number, _: noted.append(number)) if in_main else None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if in_main:
            signal.signal(signal.SIGINT, before)
    if noted:
        raise KeyboardInterrupt


def _start_worker(initializer: Callable[..., object], initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*initargs)


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would go on, and then wait for ever for more to do."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
