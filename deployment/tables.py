"""The tables, CSV files and plot of deploy.py."""

import contextlib
import csv
import io
import itertools
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from deployment.runtimes import BATCH, CALLS, ENGINE, Runtime
from utils import counted, printable


@dataclass
class File:
    """One file that holds a network."""

    checkpoint: str
    name: str
    bytes: int
    plain_bytes: int  # of the same weights in PyTorch's format
    accuracy: float | None = None  # percent; measured only if the file does not hold the exact weights

    @property
    def times_smaller(self) -> float:
        return self.plain_bytes / self.bytes


def processor() -> str:
    """The name that the processor's maker gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def files_table(files: list[File]) -> str:
    rows = [
        [
            short_name(file.checkpoint, files),
            file.name,
            f"{file.bytes:,}",
            f"{file.times_smaller:.1f}",
            "" if file.accuracy is None else f"{file.accuracy:.2f} %",
        ]
        for file in files
    ]
    headers = ["checkpoint", "file", "bytes", "times smaller", "accuracy"]
    return tabulate(rows, headers, colalign=("left", "left", "right", "right", "right"), disable_numparse=True)


def runtimes_table(runtimes: list[Runtime], thread_counts: list[int]) -> str:
    rows = []
    for runtime in runtimes:
        dense = f", {runtime.dense_layers} dense layers" if runtime.dense_layers else ""
        row = [
            short_name(runtime.checkpoint, runtimes),
            runtime.name + dense,
            f"{runtime.nonzeros / 1e6:.3f} M",
            f"{runtime.macs / 1e6:.1f} M",
        ]
        for batch in CALLS:
            row += [figure(runtime.spread(batch, threads), batch) for threads in thread_counts]
        row += [f"{runtime.error:.0e}", "" if runtime.accuracy is None else f"{runtime.accuracy:.2f} %"]
        rows.append(row)
    counts = [counted(threads, "thread") for threads in thread_counts]
    headers = ["checkpoint", "runtime", "nonzeros", "MACs"]
    headers += [f"ms, batch 1\n{count}" for count in counts] + [f"images/s, batch {BATCH}\n{count}" for count in counts]
    headers += ["largest\ndifference", "accuracy"]
    return tabulate(rows, headers, colalign=("left", "left", *["right"] * (len(headers) - 2)), disable_numparse=True)


def predictions(found: dict[Path, dict], runtimes: list[Runtime]) -> list[str]:
    """A line for each network that was pruned to a time: what was predicted for one image, and what was measured."""
    lines = []
    for runtime in runtimes:
        checkpoint = found[Path(runtime.checkpoint)]
        if runtime.name == ENGINE and "predicted_ms" in checkpoint:
            measured = ", ".join(
                f"{1e3 * statistics.median(seconds):.3g} ms ({counted(threads, 'thread')})"
                for (batch, threads), seconds in runtime.seconds.items()
                if batch == 1
            )
            name = short_name(runtime.checkpoint, runtimes)
            device = f" for {printable(checkpoint['predicted_for'])}" if "predicted_for" in checkpoint else ""
            lines.append(f"{name}: {checkpoint['predicted_ms']:.3g} ms predicted{device}; measured {measured}")
    return lines


def short_name(checkpoint: str, rows: list[File] | list[Runtime]) -> str:
    """The file name of a checkpoint; its path if two checkpoints have the same file name."""
    names = [Path(name).name for name in {row.checkpoint for row in rows}]
    return checkpoint if names.count(Path(checkpoint).name) > 1 else Path(checkpoint).name


def figure(seconds: tuple[float, float, float] | None, batch: int) -> str:
    """Median and, in brackets, first and last decile: milliseconds for one image, or images per second of a batch."""
    if not seconds:
        return ""
    low, median, high = (1e3 * time for time in seconds) if batch == 1 else sorted(batch / time for time in seconds)
    digits = 2 if batch == 1 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def files_csv(files: list[File]) -> bytes:
    rows = [
        {
            "checkpoint": file.checkpoint,
            "file": file.name,
            "bytes": file.bytes,
            "times_smaller": file.times_smaller,
            "accuracy": file.accuracy,
        }
        for file in files
    ]
    return to_csv(rows)


def runtimes_csv(runtimes: list[Runtime], thread_counts: list[int]) -> bytes:
    """All measurements; times are seconds per call."""
    rows = []
    for runtime in runtimes:
        row = {
            "checkpoint": runtime.checkpoint,
            "runtime": runtime.name,
            "sparsity": runtime.sparsity,
            "nonzeros": runtime.nonzeros,
            "macs": runtime.macs,
            "largest_difference": runtime.error,
            "accuracy": runtime.accuracy,
            "dense_layers": runtime.dense_layers,
        }
        for batch, threads in itertools.product(CALLS, thread_counts):
            low, median, high = runtime.spread(batch, threads) or (None, None, None)
            column = f"batch{batch}_threads{threads}"
            row |= {f"seconds_{column}": median, f"first_decile_{column}": low, f"last_decile_{column}": high}
        rows.append(row)
    return to_csv(rows)


def to_csv(rows: list[dict]) -> bytes:
    """Rows with the same keys as a CSV file with one header line; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(errors="backslashreplace")  # paths may contain bytes that are no text


def plot(files: list[File], runtimes: list[Runtime], threads: int) -> bytes:
    """Latency, throughput and file size against sparsity, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    latency, throughput, size = figure.subplots(1, 3)
    sparsity = {runtime.checkpoint: runtime.sparsity for runtime in runtimes}

    def points(axis, title: str, series: dict[str, list[tuple[float, float]]]) -> None:
        for number, (name, values) in enumerate(series.items()):
            # Measured for the densest network only: a baseline, whose speed does not depend on zeros.
            if len(values) == 1 < len(sparsity) and values[0][0] == min(sparsity.values()):
                axis.axhline(values[0][1], linestyle=":", color=f"C{number}", label=name)
            else:
                axis.plot(*zip(*sorted(values)), marker="o", color=f"C{number}", label=name)
        axis.set(xlabel="sparsity in %", title=title, ylim=(0, None))
        axis.legend(fontsize=7)

    by_name: tuple[dict, dict, dict] = {}, {}, {}
    for runtime in runtimes:
        for series, batch in zip(by_name, (1, BATCH)):
            if times := runtime.spread(batch, threads):
                value = 1e3 * times[1] if batch == 1 else batch / times[1]
                series.setdefault(runtime.name, []).append((runtime.sparsity, value))
    for file in files:
        by_name[2].setdefault(file.name, []).append((sparsity[file.checkpoint], file.bytes / 1e6))
    points(latency, "ms per image, batch 1", by_name[0])
    points(throughput, f"images/s, batch {BATCH}", by_name[1])
    points(size, "file size in MB", by_name[2])
    figure.suptitle(f"{processor()}, {threads} threads")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
