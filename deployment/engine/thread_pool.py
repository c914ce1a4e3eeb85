"""Threads that work beside the calling one."""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

try:
    current_processor = ctypes.CDLL(None).sched_getcpu
except (AttributeError, OSError, TypeError):  # not Linux

    def current_processor() -> int:
        return -1


def usable_processors() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ThreadPool:
    """`threads` threads; the calling one is the first of them."""

    def __init__(self, threads: int):
        self.threads = threads
        self.executor, self.process = None, None
        # Read now, because PyTorch may later bind the calling thread to one processor.
        self.usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self.local = threading.local()

    def start(self, work: Callable[[int], None]) -> list[Future]:
        """Call `work` with the index of each thread in that thread. It returns once the calling thread's part is done,
        and gives the futures of the others."""
        if self.process != os.getpid():  # a forked process does not inherit the threads
            self.executor, self.process = ThreadPoolExecutor(self.threads), os.getpid()
        caller = current_processor()
        others = [self.executor.submit(self.elsewhere, work, thread, caller) for thread in range(1, self.threads)]
        work(0)
        return others

    def elsewhere(self, work: Callable[[int], None], thread: int, caller: int) -> None:
        """Work on another processor than `caller`. Linux often wakes a thread on the processor of the thread that woke
        it and leaves it there for hundreds of calls: the two take turns, and a call takes twice the time."""
        if getattr(self.local, "avoided", -1) != caller and self.usable - {caller}:
            self.local.avoided = caller
            with contextlib.suppress(OSError):  # the process has fewer processors than before
                os.sched_setaffinity(0, self.usable - {caller})
        work(thread)
