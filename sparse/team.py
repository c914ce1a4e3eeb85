"""Threads that work beside the one that calls."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

try:
    processor_here = ctypes.CDLL(None).sched_getcpu
except (AttributeError, OSError, TypeError):  # not Linux

    def processor_here() -> int:
        return -1


def usable_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Team:
    """`threads` threads, of which the calling one is the first."""

    def __init__(self, threads: int):
        self.threads = threads
        self.pool, self.process = None, None
        # Now: later PyTorch may have bound the calling thread to one processor.
        self.usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self.thread = threading.local()

    def start(self, work: Callable[[int], None]) -> list[Future]:
        """Call `work` with the number of each thread, in that thread; it is done in this one on return."""
        if self.process != os.getpid():  # threads do not come along into a forked process
            self.pool, self.process = ThreadPoolExecutor(self.threads), os.getpid()
        here = processor_here()
        others = [self.pool.submit(self.elsewhere, work, thread, here) for thread in range(1, self.threads)]
        work(0)
        return others

    def elsewhere(self, work: Callable[[int], None], thread: int, here: int) -> None:
        """Work on another processor than `here`. A thread that is woken is often put where the one that woke it runs,
        and stays there for hundreds of calls, in which the two take turns: twice the time."""
        if getattr(self.thread, "avoided", -1) != here and self.usable - {here}:
            self.thread.avoided = here
            with contextlib.suppress(OSError):  # fewer processors than there were
                os.sched_setaffinity(0, self.usable - {here})
        work(thread)
