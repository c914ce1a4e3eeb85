"""How much memory a process may still take, and which errors say that it took too much."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

# What PyTorch (CPU, Windows and Linux), oneDNN, C++ and other libraries write when an allocation fails.
PHRASES = (
    "defaultcpuallocator",
    "not enough memory",
    "out of memory",
    "allocate memory",
    "memory allocation",
    "create a memory",
    "bad_alloc",
    "bad allocation",
    "start new thread",
)
STATISTICS = ("total_active_file", "total_inactive_file"), ("active_file", "inactive_file")  # of cgroup v1 and v2


def is_exhausted(error: Exception) -> bool:
    """Whether an error says that there was too little memory."""
    if isinstance(error, (MemoryError, OSError)):
        return isinstance(error, MemoryError) or error.errno == errno.ENOMEM
    return any(phrase in str(error).lower() for phrase in PHRASES)


def available(root: Path = Path("/")) -> int | None:
    """Bytes: the least of what the machine, the control groups (containers, batch systems) and `ulimit -v` leave.

    None where nothing is known, as outside Linux. `root` is where the system's files are.
    """
    return min((*_machine(root), *_control_groups(root), *_address_space(root)), default=None)


def _machine(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text()
        yield 1024 * int(text.split("MemAvailable:")[1].split()[0])


def _control_groups(root: Path) -> Iterator[int]:
    """What each group above this process leaves, in version 1 (its own tree for memory) or 2 (one tree for all)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / ("sys/fs/cgroup/memory" if controllers else "sys/fs/cgroup")
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        # In a container the path may be that outside it, which does not exist here; its own group is then the top.
        for group in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            if not group.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                most, used = (int((group / f"memory.{name}").read_text()) for name in (limit, usage))
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                # Copies of files are counted as used, and given up when memory is needed.
                copies = sum(int(stat.get(name, 0)) for name in STATISTICS[0 if controllers else 1])
                yield most - used + copies


def _address_space(root: Path) -> Iterator[int]:
    """What `ulimit -v` leaves."""
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - int((root / "proc/self/statm").read_text().split()[0]) * resource.getpagesize()
