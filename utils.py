"""Small helpers: the command line, seeds, device and precision, stopping on a signal."""

import argparse
import contextlib
import ctypes
import hashlib
import io
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

import torch

import memory

CPUINFO = Path("/proc/cpuinfo")


class Failure(Exception):
    """One line for the user. `code` is the exit code: 2 for bad input, 1 for everything else."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(printable(" ".join(message.split())))
        self.code = code


def counted(number: int, what: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def printable(text: str) -> str:
    """Text from a file, safe to print: control characters could otherwise command the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class Interrupted(Exception):
    """A signal asked the program to stop. The work so far is saved."""


class Output:
    """Standard output or error, whose reader may leave as `| head -1` does, or which may be closed as by `>&-`.

    Lost while there is work to save, it counts as a signal to stop; lost at other times it raises BrokenPipeError.
    A stream that is not `needed` loses only its text.
    """

    def __init__(self, stream: TextIO | None, needed: bool = True):
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.needed = needed
        if isinstance(stream, io.TextIOWrapper):  # lines of progress should reach a file at once
            stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """What was not written yet, and all that follows, goes to the null device."""
        global _signal
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
        if self.needed and not _stopping:
            if isinstance(error, BrokenPipeError):
                raise error
            raise Failure(f"standard output cannot be written: {error.strerror}", code=1)
        if self.needed:
            _signal = _signal or SIGPIPE


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def __init__(self, **options):
        # An abbreviation that works today is ambiguous when the next flag is added.
        super().__init__(allow_abbrev=False, formatter_class=Help, **options)

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        if bool(getattr(found, "mean", None)) != bool(getattr(found, "std", None)):
            self.error("--mean and --std go together: each channel's mean and standard deviation")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(' '.join(message.split()))}\n")


def number(kind: type, accept: Callable[[float], bool], what: str) -> Callable[[str], float]:
    """An argparse type for the numbers of `kind` that `accept` accepts; `what` describes them in the error."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


count = number(int, lambda value: 0 < value <= 10**6, "a whole number from 1 to 1,000,000")
positive_float = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
fraction = number(float, lambda value: 0 < value < 1, "a number between 0 and 1")
fraction_or_zero = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")
image_sizes = range(16, 1025)
seed = number(int, lambda value: 0 <= value < 2**63, "a whole number from 0")
image_size = number(int, lambda value: value in image_sizes, "a whole number from 16 to 1024")


def in_file_name(most: float) -> Callable[[float], bool]:
    """Whether a number from 0.0001 to below `most` has no more digits than a file name carries."""
    return lambda value: 1e-4 <= value < most and math.isclose(float(f"{value:g}"), value, rel_tol=1e-9)


milliseconds = number(
    float, in_file_name(1e6), "a time in milliseconds from 0.0001 to below 1,000,000, with at most six digits"
)
share = number(
    float, lambda value: value == 1 or in_file_name(1)(value), "a share from 0.0001 to 1, with at most six digits"
)


def directory(text: str) -> Path:
    """An argparse type: the path of a directory; an empty one would silently be the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name is not a directory")
    return Path(text)


def sparsity(text: str) -> float:
    """An argparse type: a fraction between 0 and 1, with as many digits as a file name can carry."""
    what = "a sparsity between 0 and 1 (--control retrains without pruning)"
    value = number(float, lambda value: 0 < value < 1, what)(text)
    name = f"{100 * value:g}"
    if "e" in name or not math.isclose(float(name), 100 * value, rel_tol=1e-9):
        raise argparse.ArgumentTypeError(f"{text!r} in percent has more than the six digits that a file name carries")
    return value


def add_data_arguments(
    parser: argparse.ArgumentParser, dataset: str | None, size: int | None
) -> argparse._ArgumentGroup:
    """The flags that select the images; a default of None means those of the checkpoint."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--dataset",
        default=dataset,
        metavar="NAME",
        help="cifar10, cifar100, digits, or a folder with train/<class>/ and test/<class>/ images",
    )
    group.add_argument(
        "--data-dir", type=directory, default=Path("data"), metavar="DIR", help="where CIFAR lies or is downloaded to"
    )
    group.add_argument(
        "--image-size",
        type=image_size,
        default=size,
        metavar="PIXELS",
        help="images are resized to this height and width",
    )
    group.add_argument(
        "--val-fraction",
        type=fraction_or_zero,
        default=None if size is None else 0.0,
        metavar="FRACTION",
        help="hold out this fraction of the training images and measure on them, never on the test images"
        + ("; 0 measures the test images after all" if size is None else ""),
    )
    default = "default: those of the training images" if size else "only for files that have none of their own"
    group.add_argument(
        "--mean",
        nargs=3,
        type=number(float, lambda value: 0 <= value <= 1, "a fraction from 0 to 1"),
        metavar=("R", "G", "B"),
        help=f"images are normalized by this mean of each channel, a fraction of full scale ({default})",
    )
    group.add_argument(
        "--std",
        nargs=3,
        type=number(float, lambda value: 1e-6 <= value <= 1, "a fraction above 0, up to 1"),
        metavar=("R", "G", "B"),
        help="the standard deviation that goes with --mean",
    )
    return group


def add_device_arguments(parser: argparse.ArgumentParser, precision: str) -> None:
    """The flags that select the device and the arithmetic."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="make two runs on a GPU equal bit for bit, which is slower; on a CPU they always are",
    )


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process as a command should: one line and an exit code in place of a traceback."""
    program = os.path.basename(sys.argv[0])
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr, needed=False)
    try:
        sys.exit(main())
    except Failure as failure:
        line, code = str(failure), failure.code
    except BrokenPipeError:
        sys.exit(128 + SIGPIPE)  # nobody reads any more, so there is nobody to tell
    except Interrupted as stop:
        line, code = str(stop), 128 + _signal
    except torch.OutOfMemoryError:
        line, code = "the GPU has too little memory: try a smaller --batch-size or --image-size", 1
    except Exception as error:
        if memory.is_exhausted(error):
            line, code = "too little memory: try a smaller --batch-size or --image-size", 1
        elif isinstance(error, OSError):
            line, code = printable(f"{error.filename or 'a file'}: {error.strerror or error}"), 2
        else:
            raise
    print(f"{program}: {line}", file=sys.stderr)
    sys.exit(code)


def derive_seed(*key: object) -> int:
    """A seed that depends on every part of `key` and on nothing else, from 0 to 2**63 - 1.

    A random choice made from (seed, stage, epoch) is the same whatever ran before it.
    """
    name = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def difference(saved: dict, asked: dict) -> str:
    """The settings in which two runs differ, for a person to read; empty when they agree."""
    names = [name for name in saved | asked if saved.get(name) != asked.get(name)]
    return ", ".join(f"{name} {saved.get(name)} there, {asked.get(name)} asked" for name in names)


def choose_device(name: str) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; Failure when the machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name)
    if not match:
        raise Failure(f"argument --device: {name!r:.40} is not auto, cpu, cuda or cuda:N")
    if int(match[1] or 0) >= torch.cuda.device_count():
        raise Failure(f"argument --device: no {name} here: this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type in which training computes convolutions and matrix products; weights are always fp32.

    `auto` is bfloat16 where the processor is known to multiply it faster than fp32.
    """
    if precision == "auto":
        cuda = device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else _bf16_is_fast_on_cpu()
        precision = "bf16" if fast else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def _bf16_is_fast_on_cpu() -> bool:
    try:
        words = CPUINFO.read_text().split()
    except OSError:
        return False
    # Intel's AVX-512 multiplies bfloat16 at half the rate of fp32 (docs/speed.md), AMD's at twice that rate.
    return "amx_bf16" in words or ("avx512_bf16" in words and "AuthenticAMD" in words)


def set_up(device: torch.device, deterministic: bool = False) -> None:
    """Configure the device once, before any work on it.

    `deterministic` makes a GPU compute the same bits in every run; without it cuDNN may sum in another order.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # none is read
    if device.type == "cuda":
        if device.index is not None:  # CUDA graphs and streams belong to the current device
            torch.cuda.set_device(device)
        # cuDNN times its algorithms, and takes the fastest. fp32 means fp32: TF32 would round its inputs to 10 bits.
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        with warnings.catch_warnings(action="ignore"):  # some versions announce a new name for the setting
            torch.backends.cudnn.allow_tf32 = False
    else:
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Take large tensors from a heap that never shrinks.

    By default glibc maps every activation anew, and the kernel clears its pages in every step. That costs 5 % of the
    time of a ResNet18 in bf16 and 20 % in fp32.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


_signal = 0
_stopping = False
SIGPIPE = 13  # Windows has no name for it


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and Ctrl-C let the current step finish; a second signal ends the process at once."""
    global _signal, _stopping
    _signal, _stopping = 0, True
    before = {number: signal.signal(number, _remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _stopping = False
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_requested() -> bool:
    """Whether a signal has arrived."""
    return _signal != 0


def _remember(number: int, _frame: object) -> None:
    global _signal
    if _signal:
        os._exit(128 + number)
    _signal = number
