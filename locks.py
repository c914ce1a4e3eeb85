"""A lock on a directory for one process, which the kernel releases when that process ends, however it ends.

It is a `flock` on a file that stays. What network file systems make of it, and of a node that died with a lock, is in
docs/clusters.md.
"""

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

from utils import printable

HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # the file system has none


class Held(Exception):
    """Another process has the lock; the text says which, as far as its file tells."""


def acquire(path: Path) -> TextIO | None:
    """Lock a file and say in it by whom: close what is returned to unlock. None where the file system has no locks.

    Held if another process has it, unless that was an earlier start of this SLURM job: SLURM starts a job again only
    where it has ended or its node is dead, and a server of files may learn of that late. OSError where it cannot be
    written.
    """
    while True:
        file = path.open("a+")
        try:
            if not _try_lock(file):
                file.close()
                return None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # nobody deleted it meanwhile
                    _sign(file)
                    return file
        except BlockingIOError:
            holder = _holder(file)
            if not _is_earlier_start(holder):
                file.close()
                raise Held(_described(holder)) from None
            path.unlink(missing_ok=True)
        except BaseException:
            file.close()
            raise
        file.close()


def _try_lock(file: TextIO) -> bool:
    """Whether the file is locked now; False where there are no locks. BlockingIOError if another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(2**30)  # Windows lets nobody read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno in HELD:
            raise BlockingIOError(*error.args) from None
        raise
    return True


def _sign(file: TextIO) -> None:
    """Say in the file whose lock it is. A full disk is no reason against a lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), json.dumps(_own()).encode())
        os.fsync(file.fileno())


def _own() -> dict[str, str]:
    """This process and, in a SLURM job, that job and how often it was started before."""
    own = {"host": socket.gethostname(), "process": str(os.getpid())}
    if job := os.environ.get("SLURM_JOB_ID"):
        cluster, starts = (os.environ.get(f"SLURM_{name}", "") for name in ("CLUSTER_NAME", "RESTART_COUNT"))
        own |= {"job": f"{cluster}/{job}", "restarts": starts or "0"}
    return own


def _holder(file: TextIO) -> dict[str, str]:
    """What the lock's file says of its holder; nothing where an earlier version wrote it."""
    try:
        file.seek(0)
        found = json.loads(file.read(1000))
        return {name: str(found[name]) for name in found}
    except (ValueError, TypeError, OSError, RecursionError):
        return {}


def _is_earlier_start(holder: dict[str, str]) -> bool:
    own = _own()
    return "job" in own and holder.get("job") == own["job"] and holder.get("restarts") != own["restarts"]


def _described(holder: dict[str, str]) -> str:
    return printable(f"process {holder['process']} on {holder['host']}") if {"host", "process"} <= set(holder) else ""
