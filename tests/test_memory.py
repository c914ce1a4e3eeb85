"""How much memory is left, by every limit there is; and errors of a lack of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, write_images

import memory

GB = 10**9


def machine(root: Path, files: dict[str, str]) -> Path:
    """A directory with the files by which Linux tells about memory."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:   {64 * GB // 1024} kB\nBuffers: 0 kB\n"}
GROUP_2 = "sys/fs/cgroup/user/job"
GROUP_1 = "sys/fs/cgroup/memory/user/job"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, None),
        ({"proc/meminfo": "nonsense"}, None),
        (MEMINFO, 64 * GB // 1024 * 1024),
        # Version 2: the job may take 8 GB and holds 3, of which 1 is a copy of files.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/user/job\n",
                f"{GROUP_2}/memory.max": f"{8 * GB}\n",
                f"{GROUP_2}/memory.current": f"{3 * GB}\n",
                f"{GROUP_2}/memory.stat": f"anon 5\nactive_file {GB // 2}\ninactive_file {GB // 2}\n",
            },
            6 * GB,
        ),
        # The limit may be that of a group above.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "0::/user/job\n",
                f"{GROUP_2}/memory.max": "max\n",
                f"{GROUP_2}/memory.current": "7\n",
                f"{GROUP_2}/memory.stat": "",
                "sys/fs/cgroup/user/memory.max": f"{2 * GB}\n",
                "sys/fs/cgroup/user/memory.current": f"{GB}\n",
                "sys/fs/cgroup/user/memory.stat": "",
            },
            GB,
        ),
        # Version 1, in a container that sees its own group as the top.
        (
            MEMINFO
            | {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/0123\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {GB}\ntotal_active_file 0\n",
            },
            2 * GB,
        ),
    ],
)
def test_the_least_of_all_limits_counts(tmp_path, monkeypatch, files, left):
    monkeypatch.setattr(memory, "_address_space", lambda _: ())
    assert memory.available(machine(tmp_path, files)) == left


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
import memory
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {more}, resource.RLIM_INFINITY))
"""


def limited(more: int, code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run code in a process that may take `more` bytes of address space than it has after its imports."""
    program = LIMITED.format(root=str(ROOT), more=more) + code
    line = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240)


needs_limits = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v counts on Linux only")


@needs_limits
def test_the_limit_of_a_process_counts():
    done = limited(GB, "print(memory.available())")
    assert 0.98 * GB < int(done.stdout) <= GB, done.stderr


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (MemoryError(), True),
        (np._core._exceptions._ArrayMemoryError((2**40,), np.dtype(np.uint8)), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("a bug"), False),
    ],
)
def test_errors_of_a_lack_of_memory_are_told_from_others(error, exhausted):
    assert memory.is_exhausted(error) == exhausted


GREEDY = """
import contextlib, io, mmap, numpy as np, torch, torchvision
from concurrent.futures import ThreadPoolExecutor
import main, utils
torch.set_num_threads(1)
limit = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
arguments, sys.argv = sys.argv[1:], ["main.py"]
for work in (
    lambda: np.zeros(2**40),
    lambda: torch.empty(2**40),
    lambda: torch.zeros(2**24, 3) @ torch.zeros(3, 2**24),
    lambda: list(ThreadPoolExecutor(2).map(lambda _: torch.empty(2**40), range(2))),
    lambda: torch.nn.functional.conv2d(torch.zeros(1, 1, 4000, 4000), torch.zeros(64, 1, 3, 3)),
    lambda: mmap.mmap(-1, 2**40),
    lambda: bytearray(2**40),
    lambda: main.main([*arguments, "--image-size", "1024"]),
    lambda: main.main([*arguments, "--image-size", "64", "--batch-size", "100000"]),
):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        utils.run(work)
"""


@needs_limits
@pytest.mark.slow
def test_too_little_memory_is_one_line_on_the_cpu(tmp_path):
    folder = write_images(tmp_path / "x", train=600, test=2)
    done = limited(2**46, GREEDY, *SMALL, "--dataset", folder, "--checkpoint-dir", tmp_path / "new")
    refused = "main.py: 1,204 images of --image-size 1024 need 7,621,542,912 bytes of "
    lines = done.stderr.splitlines()
    too_little = "main.py: too little memory: try a smaller --batch-size or --image-size"
    assert [line for line in lines if not line.startswith(refused)] == [too_little] * 8
    assert len(lines) == 9
