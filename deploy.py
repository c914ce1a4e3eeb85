"""Turn pruned checkpoints into what one would ship, check it, and measure it: smaller files, faster networks.

python deploy.py checkpoint                              every checkpoint of a directory
python deploy.py checkpoint/90percent_iter_ckpt.pth      one
python deploy.py checkpoint --values bf16 --onnx         also smaller values, and ONNX files

Each checkpoint is packed: a file without its zeros, which test.py and deploy.py read like any checkpoint. The
networks are then computed by PyTorch, with dead channels removed, and by the sparse engine, each in turn in every
round, beside what else one could do with the dense network on this processor. deploy.csv and deploy.png keep the
result. Nothing is measured on a GPU: for it, zeros do not pay.
"""

import signal

if __name__ == "__main__":  # until there is something to save, Ctrl-C just ends it: imports take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import csv
import gzip
import importlib.util
import io
import itertools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import data
import engine
import packed
import pruning
import sparse
import store
import utils
from forms import BATCH, CALLS, Form, export_onnx, in_pytorch, make_forms, measure_accuracy, time_forms

REPORTS = ("deploy.csv", "deploy.png")


def parse_args() -> argparse.Namespace:
    parser = utils.Parser(description="Pack pruned checkpoints, check and measure them on the CPU.")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="files, or directories of main.py"
    )
    parser.add_argument(
        "--values",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="type of the values in a second packed file; fp32 is lossless, the others are not",
    )
    parser.add_argument("--onnx", action="store_true", help="also write an ONNX file, BatchNorm folded in")
    parser.add_argument(
        "--rounds", type=utils.positive_int, default=11, metavar="N", help="times that every form is measured"
    )
    parser.add_argument("--threads", type=utils.positive_int, metavar="N", help="threads beside one (default: all)")
    utils.add_data_arguments(parser, None, None)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    threads = args.threads or torch.get_num_threads()
    if threads > sparse.usable_processors():
        raise utils.Failure(
            f"argument --threads: {threads} is more than the {sparse.usable_processors()} processors here"
        )
    if args.onnx and not importlib.util.find_spec("onnx"):
        raise utils.Failure("argument --onnx: the package onnx is not installed")
    checkpoints = {path: store.load_checkpoint(path) for path in find(args.checkpoints)}
    images = data.of_checkpoints(args, checkpoints)
    for path, checkpoint in checkpoints.items():
        data.check(path, checkpoint, images)
    batches, size = data.TestBatches(images, torch.device("cpu")), images.test.images.shape[1]
    teams = sorted({1, threads})
    torch.set_num_threads(threads)
    print(environment(threads, args.rounds))
    directory = next(iter(checkpoints)).parent
    if any((directory / name).is_dir() for name in REPORTS) or not os.access(directory, os.W_OK):
        raise utils.Failure(f"{directory} cannot take {' and '.join(REPORTS)}")
    networks = {path: store.network_of(checkpoint).eval() for path, checkpoint in checkpoints.items()}
    for path, network in networks.items():
        check_logits(path, network, size)
    densest = min(networks, key=lambda path: pruning.sparsity(networks[path]))
    files, forms = [], []
    for path, network in tqdm(networks.items(), "preparing", leave=False, disable=None):
        files += make_files(path, checkpoints[path], network, size, args, batches)
        forms += make_forms(path, network, size, threads, baselines=path == densest)
    print("\n" + files_table(files))
    time_forms(forms, size, teams, args.rounds)
    measure_accuracy(forms, batches, threads)
    print("\n" + forms_table(forms, teams))
    report(files, forms, teams, directory)


def find(asked: list[Path]) -> list[Path]:
    """The checkpoints to work on, the dense one of a directory first; its packed files only if it has no others."""
    paths = []
    for path in asked:
        if path.is_dir():
            found = sorted(path.glob("*ckpt.pth")) or sorted(path.glob("*.packed"))
            if not found:
                raise utils.Failure(f"{path} holds no checkpoint")
            paths += sorted(found, key=lambda file: file.name != "ckpt.pth")
        else:
            paths.append(path)
    paths = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]
    targets = [packed.name(path) for path in paths]
    for path, target in zip(paths, targets):
        if targets.count(target) > 1:
            raise utils.Failure(f"{target} would be the packed file of {path} and of another checkpoint")
    return paths


def check_logits(path: Path, network: nn.Module, size: int) -> None:
    """Failure when a network computes something that is not finite: nothing can be compared with it."""
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    if not in_pytorch(network)(images).isfinite().all():
        raise utils.Failure(f"{path} computes logits that are not finite")


# --- Files ---------------------------------------------------------------------------------------------------------


@dataclass
class File:
    """One file that holds a network. Accuracy in percent, where the file does not hold the exact weights."""

    checkpoint: str
    form: str
    bytes: int
    times_smaller: float  # than the plain file of the same network
    entropy: float | None = None  # bytes that no coder of independent symbols can go below
    accuracy: float | None = None


def make_files(
    path: Path, checkpoint: dict, network: nn.Module, size: int, args: argparse.Namespace, batches: data.TestBatches
) -> list[File]:
    """Write the packed file, or files, and the ONNX file of a checkpoint; compare with general compressors."""
    content = path.read_bytes()
    plain = len(plain_bytes(checkpoint))

    def row(form: str, count: int, **more) -> File:
        return File(str(path), form, count, plain / count, **more)

    files = [row("as saved", len(content)), row("gzip -9", len(gzip.compress(content, 9)))]
    try:
        import zstandard

        files.append(row("zstd -19", len(zstandard.compress(content, 19))))
    except ImportError:
        pass  # nothing here needs it
    for values in dict.fromkeys(("fp32", args.values)) if path.suffix != ".packed" else ():
        target = packed.name(path, values)
        store.write(target, packed.pack(checkpoint, values))
        again = store.load_checkpoint(target)
        if values == "fp32" and store.digest(again["net"]) != store.digest(checkpoint["net"]):
            raise utils.Failure(f"{target} does not hold the weights of {path}", code=1)
        accuracy = None if values == "fp32" else engine.evaluate(store.network_of(again), batches).accuracy
        entropy = sum(packed.entropy(checkpoint["net"], values).values())
        label = f"packed, {values}" + ("" if values == "fp32" else " (lossy)")
        files.append(row(label, target.stat().st_size, entropy=entropy, accuracy=accuracy))
    if args.onnx:
        target = path.with_suffix(".onnx")
        store.write(target, export_onnx(network, size))
        files.append(row("ONNX", target.stat().st_size))
    return files


def plain_bytes(checkpoint: dict) -> bytes:
    """The file of the weights alone, as PyTorch writes it."""
    buffer = io.BytesIO()
    torch.save(checkpoint["net"], buffer)
    return buffer.getvalue()


# --- What is printed and kept --------------------------------------------------------------------------------------


def environment(threads: int, rounds: int) -> str:
    """One line: on what the figures were measured."""
    vectors = f"vectors of {sparse.lanes_of_this_cpu()} floats"
    return f"{processor()}, {vectors}, {threads} threads, PyTorch {torch.__version__}, {rounds} rounds"


def processor() -> str:
    """The processor as its maker calls it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def short(checkpoint: str, rows: list) -> str:
    """The name of a checkpoint's file, with its directory where two have the same name."""
    names = [Path(name).name for name in {row.checkpoint for row in rows}]
    return checkpoint if names.count(Path(checkpoint).name) > 1 else Path(checkpoint).name


def files_table(files: list[File]) -> str:
    rows = [
        [
            short(file.checkpoint, files),
            file.form,
            f"{file.bytes:,}",
            f"{file.times_smaller:.1f}",
            "" if not file.entropy else f"{100 * (file.bytes / file.entropy - 1):+.1f} %",
            "" if file.accuracy is None else f"{file.accuracy:.2f} %",
        ]
        for file in files
    ]
    headers = ["checkpoint", "file", "bytes", "times smaller", "over entropy", "accuracy"]
    return tabulate(rows, headers, colalign=("left", "left", *["right"] * 4), disable_numparse=True)


def forms_table(forms: list[Form], teams: list[int]) -> str:
    rows = []
    for form in forms:
        dense = f", {form.dense_layers} dense layers" if form.dense_layers else ""
        row = [
            short(form.checkpoint, forms),
            form.form + dense,
            f"{form.nonzeros / 1e6:.3f} M",
            f"{form.multiply_adds / 1e6:.1f} M",
        ]
        for batch in CALLS:
            row += [figure(form.spread(batch, threads), batch) for threads in teams]
        row += [f"{form.error:.0e}", "" if form.accuracy is None else f"{form.accuracy:.2f} %"]
        rows.append(row)
    counts = [f"{threads} thread{'s' if threads > 1 else ''}" for threads in teams]
    headers = ["checkpoint", "form", "nonzeros", "multiply-\nadds"]
    headers += [f"ms, batch 1\n{count}" for count in counts] + [f"images/s, batch {BATCH}\n{count}" for count in counts]
    headers += ["largest\ndifference", "accuracy"]
    return tabulate(rows, headers, colalign=("left", "left", *["right"] * (len(headers) - 2)), disable_numparse=True)


def figure(seconds: tuple[float, float, float] | None, batch: int) -> str:
    """Milliseconds of one image, or images a second of a batch: median, and in brackets first and last decile."""
    if not seconds:
        return ""
    low, median, high = (1e3 * time for time in seconds) if batch == 1 else sorted(batch / time for time in seconds)
    digits = 2 if batch == 1 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def report(files: list[File], forms: list[Form], teams: list[int], directory: Path) -> None:
    """deploy.csv, both tables in full, and deploy.png."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["checkpoint", "file", "bytes", "times_smaller", "entropy_bytes", "accuracy"])
    writer.writerows([f.checkpoint, f.form, f.bytes, f.times_smaller, f.entropy, f.accuracy] for f in files)
    writer.writerow([])
    header = ["checkpoint", "form", "sparsity", "nonzeros", "multiply_adds", "largest_difference", "accuracy"]
    header.append("dense_layers")
    columns = [(batch, threads) for batch in CALLS for threads in teams]
    for batch, threads in columns:
        header += [f"{name}_batch{batch}_threads{threads}" for name in ("seconds", "first_decile", "last_decile")]
    writer.writerow(header)
    for form in forms:
        row = [form.checkpoint, form.form, form.sparsity, form.nonzeros, form.multiply_adds, form.error, form.accuracy]
        row.append("" if form.dense_layers is None else form.dense_layers)
        for column in columns:
            low, median, high = form.spread(*column) or ("", "", "")
            row += [median, low, high]
        writer.writerow(row)
    store.write(directory / REPORTS[0], text.getvalue().encode(errors="backslashreplace"))
    store.write(directory / REPORTS[1], picture(files, forms, max(teams)))
    print(f"\n{directory / REPORTS[0]} and {directory / REPORTS[1]} have all figures")


def picture(files: list[File], forms: list[Form], threads: int) -> bytes:
    """Latency, throughput and size against sparsity, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("ms an image, batch 1", f"images/s, batch {BATCH}", "megabytes of the file")
    pruned = {form.checkpoint: form.sparsity for form in forms}
    for axis, title, batch in zip(axes, titles, (1, BATCH, None)):
        colours = iter(f"C{number}" for number in itertools.count())
        for name in dict.fromkeys(row.form for row in (forms if batch else files)):
            if batch:
                points = [(f.sparsity, f.spread(batch, threads)[1]) for f in forms if f.form == name]
                points = [(x, 1e3 * y if batch == 1 else batch / y) for x, y in points]
            else:
                points = [(pruned[f.checkpoint], f.bytes / 1e6) for f in files if f.form == name]
            if len(points) == 1 and len(pruned) > 1:  # what is measured once does not depend on zeros
                axis.axhline(points[0][1], linestyle=":", color=next(colours), label=name)
            elif points:
                axis.plot(*zip(*sorted(points)), marker="o", color=next(colours), label=name)
        axis.set(xlabel="sparsity in %", title=title, ylim=(0, None))
        axis.legend(fontsize=7)
    figure.suptitle(f"{processor()}, {threads} threads")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


if __name__ == "__main__":
    utils.run(main)
