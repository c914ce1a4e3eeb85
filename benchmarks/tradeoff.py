"""Accuracy against multiply-adds and against the time of the engine, for every way to distribute the zeros.

    python main.py -pr 0.9 0.95 -shot single --allocation lamp     # and others, and --macs, --ms; one directory a seed
    python test.py --checkpoint-dir checkpoint/0 checkpoint/1      # accuracies: results.csv in each directory
    python benchmarks/tradeoff.py checkpoint/0 checkpoint/1 --out tradeoff      # tradeoff.csv, tradeoff.png

Measured: docs/allocations.md has a table and the figure, with commands and hardware.

A round times one image in every network of all directories, in the opposite order of the round before. Figures are
medians over the rounds, then means over the directories, with the standard deviation as bars. Over one directory bars
are the 95 % interval of the accuracy, which says nothing about other seeds.
"""

import argparse
import csv
import io
import re
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import tabulate
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoints
import report
import utils
from deployment import tables
from deployment.engine import Engine, lanes_of_this_cpu, usable_processors

SECONDS = 0.02  # of calls of one network in one round
AXES = {"macs_left": "MACs with nonzero weights (%)", "ms": "ms of one image in the engine"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Accuracy against multiply-adds and time, for ways to distribute the zeros.")
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="with results.csv; one for each seed")
    parser.add_argument("--threads", type=utils.count, default=1, metavar="N", help="threads of the engine")
    parser.add_argument("--rounds", type=utils.count, default=11, metavar="N", help="how often each is measured")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="NAME.csv and NAME.png are written")
    args = parser.parse_args(argv)
    if args.threads > usable_processors():
        raise utils.Failure(f"argument --threads: {args.threads} on {usable_processors()} processors")
    if args.out.name in ("", "..") or not args.out.parent.is_dir():
        parser.error(f"argument --out: {args.out} is not the name of a file in a directory")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    rows = [row for directory in args.directories for row in read(directory)]
    torch.set_num_threads(args.threads)
    print(f"{tables.processor()}, vectors of {lanes_of_this_cpu()} floats, {args.threads} threads")
    measure(rows, args.threads, args.rounds)
    lines = summarize(rows)
    report.write_csv(args.out.with_name(f"{args.out.name}.csv"), lines)
    checkpoints.write(args.out.with_name(f"{args.out.name}.png"), figure(lines))
    print(tabulate.tabulate(lines, "keys", floatfmt=".3f"))


def read(directory: Path) -> list[dict]:
    """The dense network, the one-shot ones and their controls, from the report of test.py."""
    path = directory / "results.csv"
    if not path.is_file():
        raise utils.Failure(f"{path} is missing: python test.py --checkpoint-dir {directory} writes it")
    with open(path, newline="") as file:
        rows = [row | {"path": directory / row["file"]} for row in csv.DictReader(file)]
    rows = [row for row in rows if row["mode"] in ("dense", "single")]
    rows = [row for row in rows if row["file"].endswith(".pth")]  # packed files are copies
    if not rows:
        raise utils.Failure(f"{path} has no dense and no one-shot network")
    return rows


def measure(rows: list[dict], threads: int, rounds: int) -> None:
    """Fill in `ms`, for one image."""
    engines, times = [], defaultdict(list)
    for row in tqdm(rows, "preparing", leave=False, disable=None):
        checkpoint = checkpoints.load_checkpoint(row["path"])
        size = checkpoint.get("settings", {}).get("image_size", 32)
        engine = Engine(checkpoints.build_network(checkpoint).eval(), size, threads)
        engines.append((engine, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))))
    for turn in tqdm(range(rounds), "measuring", unit="round", leave=False, disable=None):
        for i in range(len(rows))[:: -1 if turn % 2 else 1]:
            engine, image = engines[i]
            engine(image)  # the network before left its own data in the caches
            calls, begin = 0, time.perf_counter()
            while time.perf_counter() - begin < SECONDS:
                engine(image)
                calls += 1
            times[i].append(1e3 * (time.perf_counter() - begin) / calls)
    for i, row in enumerate(rows):
        row["ms"] = statistics.median(times[i])


def summarize(rows: list[dict]) -> list[dict]:
    """A line for each way and sparsity: means over the seeds, and standard deviations where there are several."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["file"]].append(row)
    lines = []
    for same in groups.values():
        if same[0]["mode"] == "dense":
            way = "dense"
        elif same[0]["control"] == "True":
            way = "control"
        else:
            way = re.sub(r"[\d.]+$", "", same[0]["allocation"])
        way += ", plain" * (same[0]["retrain"] == "plain")
        line = {"file": same[0]["file"], "way": way, "seeds": len(same)}
        line["accuracy margin"] = statistics.mean(float(row["accuracy_margin"]) for row in same)
        for column in ("sparsity", "accuracy", "drop", *AXES):
            values = [float(row[column]) for row in same if row[column] != ""]
            line[column] = statistics.mean(values) if values else None
            if column != "sparsity":
                line[f"{column} std"] = statistics.stdev(values) if len(values) > 1 else None
        lines.append(line)
    return lines


def figure(lines: list[dict]) -> bytes:
    """A panel for multiply-adds and one for time, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    baselines = [line for line in lines if line["way"].startswith(("dense", "control"))]
    pruned = [line for line in lines if line not in baselines]
    ways = list(dict.fromkeys(line["way"] for line in pruned))
    for axes, (x, title) in zip(panels, AXES.items()):
        for line, style in zip(baselines, ("--", ":", "-.")):
            label = f"{line['way']}, {line['accuracy']:.2f} %"
            axes.axhline(line["accuracy"], color="0.4", linestyle=style, label=label)
        for color, way in enumerate(ways):
            mine = sorted((line for line in pruned if line["way"] == way), key=lambda line: line[x])
            xs, ys, bars = zip(
                *((line[x], line["accuracy"], line["accuracy std"] or line["accuracy margin"]) for line in mine)
            )
            label = {"macs": "--macs", "ms": "--ms"}.get(way, way)
            axes.errorbar(xs, ys, bars, fmt="-o", color=f"C{color}", capsize=3, label=label)
            for line in mine:
                text, point = f"{line['sparsity']:.0f} %", (line[x], line["accuracy"])
                axes.annotate(text, point, (4, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel=title)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="accuracy (%)")
    canvas.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=len(ways) + len(baselines),
        frameon=False,
    )
    image = io.BytesIO()
    canvas.savefig(image, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(canvas)
    return image.getvalue()


if __name__ == "__main__":
    utils.run(main)
