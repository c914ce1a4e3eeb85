"""Compile engine.c for this processor, once: later processes load the library from a cache.

The compiler is clang, from the package `ziglang`, which brings its own headers and linker. A library is built again
when the source, the flags, the processor or ziglang's version change.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from utils import Failure

SOURCES = [Path(__file__).with_name(name) for name in ("engine.c", "engine.h")]
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
# Sums may be contracted to fused multiply-adds. Other liberties of -ffast-math would lose NaN.
FLAGS = ["-std=c11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fno-sanitize=undefined"]
FLAGS += ["-shared"]
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-mprefer-vector-width=512")  # or clang halves vectors on some processors
if sys.platform != "win32":
    FLAGS += ["-fPIC", "-lpthread"]


@functools.cache
def cache_directory() -> Path:
    """Where libraries are kept: in the user's cache, or for this process only if nothing can be written there.

    The environment variable XDG_CACHE_HOME names another place.
    """
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = base / "pruning-engine"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        print(f"{directory} cannot be written ({error.strerror}): the engine is compiled again", file=sys.stderr)
    temporary = tempfile.TemporaryDirectory(prefix="pruning-engine-", ignore_cleanup_errors=True)
    cache_directory.temporary = temporary  # removed when the process ends
    return Path(temporary.name)


@functools.cache
def build(lanes: int | None = None, extra: tuple[str, ...] = ()) -> Path:
    """The library for vectors of `lanes` floats, by default the processor's width; compiled if it is not in the cache.

    Failure if there is no ziglang or if it fails.
    """
    flags = FLAGS + ([f"-DLANES={lanes}"] if lanes else []) + list(extra)
    try:
        version = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        raise Failure("the engine needs a compiler: pip install ziglang") from None
    content = b"\0".join(path.read_bytes() for path in SOURCES)
    identity = "\0".join([processor(), platform.platform(), version, *flags]).encode()
    name = f"engine-{hashlib.sha256(content + identity).hexdigest()[:16]}{SUFFIX}"
    directory = cache_directory()
    if not (directory / name).exists():
        # ziglang keeps parts of libc in a cache of its own.
        environment = {"ZIG_GLOBAL_CACHE_DIR": str(directory / "zig"), "ZIG_LOCAL_CACHE_DIR": str(directory / "zig")}
        with tempfile.TemporaryDirectory(dir=directory) as temporary:
            target = Path(temporary) / name
            command = [sys.executable, "-m", "ziglang", "cc", *flags, "-o", str(target), str(SOURCES[0])]
            result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
            if result.returncode or not target.exists():
                lines = [line for line in result.stderr.splitlines() if "error" in line] or [result.stderr.strip()]
                raise Failure(f"ziglang cannot compile the engine: {lines[0][:200]}", code=1)
            os.replace(target, directory / name)  # atomic: other processes may build the same
    return directory / name


def processor() -> str:
    """What tells apart processors that run different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "isa", "CPU part", "CPU implementer")
    return "\n".join([platform.machine()] + [line for line in lines if line.startswith(kept)])


@functools.cache
def library(lanes: int | None = None, extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The functions of engine.h. ctypes releases the interpreter's lock while they run."""
    found = ctypes.CDLL(str(build(lanes, extra)))
    pointer, size, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, result, *arguments in (
        ("load", integer, pointer, size, integer, pointer),
        ("run", integer, pointer, pointer, size, integer, integer, pointer),
        ("free", None, pointer),
        ("error", ctypes.c_char_p, integer),
        ("lanes", integer),
        ("classes", integer, pointer),
        ("height", integer, pointer),
        ("width", integer, pointer),
        ("class_name", ctypes.c_char_p, pointer, integer),
        ("mean", ctypes.POINTER(ctypes.c_float), pointer),
        ("std", ctypes.POINTER(ctypes.c_float), pointer),
        ("background", integer, pointer),
        ("seconds", ctypes.c_double, pointer, integer, integer),
    ):
        function = getattr(found, f"engine_{name}")
        function.restype, function.argtypes = result, arguments
    return found


def lanes_of_this_cpu() -> int:
    """Floats in a vector of this processor, as the compiler sees it."""
    return library().engine_lanes()
