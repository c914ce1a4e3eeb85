"""Reload every checkpoint of a directory, count and measure it anew, compare.

    python test.py                          the table, results.csv and results.png of checkpoint/
    python test.py --layers                 also sparsity and multiply-adds of each layer
    python test.py --checkpoint-dir a b c   of each, and mean and deviation over them: a directory a seed

Nothing in a file is believed: zeros are counted and the accuracy is measured on the whole test set. A file
that cannot be read, or that says something else than is found, is named, and the exit code is 1.
"""

import signal

if __name__ == "__main__":  # until there is something to save, Ctrl-C just ends it: imports take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import io
import itertools
import math
import re
import statistics
import sys
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import tabulate
import torch
from tqdm import tqdm

import data
import engine
import pruning
import store
import utils

DENSE = "ckpt.pth"
PRUNED_NAME = re.compile(
    r"(?P<percent>\d+(?:\.\d+)?)percent_(?P<mode>single|iter)(_(?P<allocation>uniform|erk|lamp))?"
    r"(_(?P<retrain>distilled|adaptive|plain))?(_rewind\d+)?_ckpt"
    r"(\.pth|(\.bf16|\.fp16)?\.packed)"
)
MODES = {"single": ("one-shot", "-o"), "iter": ("iterative", ":s")}


def parse_args() -> argparse.Namespace:
    parser = utils.Parser(description="Reload every checkpoint of a directory and report sparsity and accuracy.")
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        nargs="+",
        default=[Path("checkpoint")],
        metavar="DIR",
        help="what to report; of several, runs with other seeds, also mean and standard deviation",
    )
    parser.add_argument("--layers", action="store_true", help="also print sparsity and multiply-adds of each layer")
    utils.add_data_arguments(parser, None, None)
    utils.add_device_arguments(parser, "of the measurement; auto is fp32, in which main.py measures too")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    utils.set_up(device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    directories = list({path.resolve(): path for path in args.checkpoint_dir}.values())
    found = [read_all(directory) for directory in directories]
    everything = {path: checkpoint for checkpoints, _ in found for path, checkpoint in checkpoints.items()}
    if not everything:
        return complain([problem for _, problems in found for problem in problems])
    images = data.of_checkpoints(args, everything)
    batches = data.TestBatches(images, device)
    tables, problems = [], []
    for directory, (checkpoints, unreadable) in zip(directories, found):
        if len(directories) > 1:
            print(f"{directory}:")
        wrong = list(unreadable)
        try:
            tables.append(report_directory(directory, checkpoints, images, batches, dtype, args.layers, wrong))
        finally:
            complain(wrong)
        problems += wrong
    if len(directories) > 1 and any(tables):
        report_seeds(tables, directories[0])
        print_mixed([checkpoints for checkpoints, _ in found])
    return 1 if problems else 0


def report_directory(
    directory: Path,
    checkpoints: dict[Path, dict],
    images: data.Dataset,
    batches: data.TestBatches,
    dtype: torch.dtype,
    with_layers: bool,
    problems: list[str],
) -> list["Row"]:
    """Measure the checkpoints of a directory, print and write their table, add to `problems`; a row for each."""
    rows, layers, counts, dense, dense_digest = [], {}, {}, None, ""
    for path, checkpoint in tqdm(checkpoints.items(), "measuring", leave=False, disable=None):
        try:
            data.check(path, checkpoint, images)
        except utils.Failure as failure:
            problems.append(str(failure))
            continue
        if images.unseen:  # what the file says is of other images
            checkpoint = {name: checkpoint[name] for name in checkpoint.keys() - {"acc", "dense_acc", "pruned_acc"}}
        device = batches.images.device
        network = store.network_of(checkpoint).to(device, memory_format=torch.channels_last)
        zeros = pruning.count(network)
        multiply_adds = pruning.multiply_adds(network, images.test.images.shape[1])
        if path.suffix == ".pth" or zeros not in layers.values():  # a packed file has the zeros of the other
            layers[path.name], counts[path.name] = zeros, multiply_adds
        score = engine.evaluate(network, batches, dtype)
        parent = dense
        if dense and checkpoint.get("settings", {}).get("parent", dense_digest) != dense_digest:
            problems.append(f"{path} was pruned from another network than {DENSE}: main.py --force makes it again")
            parent = None
        rows.append(Row.of(path, images.name, checkpoint, zeros, multiply_adds, score, parent))
        problems += contradictions(path, checkpoint, rows[-1], score, parent)
        if path.name == DENSE:
            dense, dense_digest = score, store.digest(checkpoint["net"])
    if rows:
        report(rows, directory)
    if rows and with_layers:
        print("\n" + layer_tables(layers, counts))
    return rows


def report_seeds(tables: list[list["Row"]], directory: Path) -> None:
    """Print and write mean and standard deviation over directories of what has the same name in each: seeds.csv and
    seeds.png in `directory`."""
    names = dict.fromkeys((row.file, row.arch) for rows in tables for row in rows)
    lines = []
    for name, arch in names:
        same = [row for rows in tables for row in rows if (row.file, row.arch) == (name, arch)]
        seeds = " ".join("-" if row.seed is None else str(row.seed) for row in same)
        line = {"model": name, "arch": arch, "seeds": seeds, "found %": statistics.mean(row.sparsity for row in same)}
        for head, field in (("acc. after %", "accuracy"), ("drop pts", "drop"), ("acc. pruned %", "accuracy_pruned")):
            values = [getattr(row, field) for row in same if getattr(row, field) is not None]
            line[head] = statistics.mean(values) if values else None
            line[f"{head} std"] = statistics.stdev(values) if len(values) > 1 else None
        lines.append(line)
    headers = {name: name.replace(" ", "\n") for name in lines[0]} if lines else {}
    print(f"\nover {len(tables)} directories:\n" + tabulate.tabulate(lines, headers, floatfmt=".2f", missingval="-"))
    text = io.StringIO()
    writer = csv.DictWriter(text, headers, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    store.write(directory / "seeds.csv", text.getvalue().encode(errors="backslashreplace"))
    shown = []
    for rows in tables:  # a packed file beside its network is not another seed
        files = {row.file for row in rows}
        shown += [row for row in rows if row.file.endswith(".pth") or row.file.replace(".packed", ".pth") not in files]
    store.write(directory / "seeds.png", picture(shown, "drop"))


def print_mixed(directories: list[dict[Path, dict]]) -> None:
    """Print which files were made with other settings than the first of their name, beside another seed: a mean over
    them says little."""
    first = {}
    for path, checkpoint in itertools.chain.from_iterable(directory.items() for directory in directories):
        if "settings" not in checkpoint:
            continue
        settings = utils.OLDER | checkpoint["settings"] | {"seed": None, "parent": None}
        model, wanted = first.setdefault((path.name, checkpoint["arch"]), (path, settings))
        names = [name for name in wanted | settings if wanted.get(name) != settings.get(name)]
        if names:
            print(f"{path} and {model} differ in more than the seed: {', '.join(names)}")


def complain(problems: list[str]) -> int:
    """A line for each problem; the exit code."""
    for problem in problems:
        print(f"test.py: {problem}", file=sys.stderr)
    return 1


def read_all(directory: Path) -> tuple[dict[Path, dict], list[str]]:
    """Every readable checkpoint, the dense one first, then by mode and sparsity; and a line for each of the others."""
    if not directory.is_dir():
        raise utils.Failure(f"--checkpoint-dir {directory} is not a directory")

    def position(path: Path) -> tuple:
        name = PRUNED_NAME.fullmatch(path.name)
        return (
            path.name != DENSE,
            path.name.partition(".")[0] != "ckpt",
            name["mode"] != "single" if name else 2,
            float(name["percent"]) if name else 0,
            path.suffix != ".pth",
            path.name,
        )

    checkpoints, problems = {}, []
    for path in sorted((path for path in directory.iterdir() if path.suffix in (".pth", ".packed")), key=position):
        try:
            checkpoints[path] = store.load_checkpoint(path)
        except utils.Failure as failure:
            problems.append(str(failure))
    if not (checkpoints or problems):
        raise utils.Failure(f"{directory} holds no checkpoint (*.pth, *.packed): python main.py makes them")
    return checkpoints, problems


@dataclass
class Row:
    """One checkpoint. Sparsities and accuracies in percent, drop in points; `epochs` are of its training or, if it
    was pruned, of all retraining since, `values` is the type that the weights were rounded to for packing, else fp32,
    `sparsity` is over the pruned layers, `compression` all parameters over those that are not zero, multiply-adds in
    millions for an image, `accuracy_before` that of the dense network it was pruned from, `accuracy_pruned` what
    pruning left before retraining, as the file says, `accuracy_margin` half the width of the 95 % interval of
    `accuracy`."""

    file: str
    arch: str
    dataset: str
    mode: str
    allocation: str
    retrain: str
    rewind: int
    seed: int | None
    epochs: int | None
    values: str
    sparsity_asked: float | None
    sparsity: float
    sparsity_all_parameters: float
    accuracy_before: float | None
    accuracy_pruned: float | None
    accuracy: float
    accuracy_margin: float
    drop: float | None
    loss: float
    zeros: int
    nonzero_weights: int
    compression: float | None
    multiply_adds_dense: float
    multiply_adds: float
    theoretical_speed_up: float | None
    file_bytes: int

    @classmethod
    def of(
        cls,
        path: Path,
        dataset: str,
        checkpoint: dict,
        layers: dict,
        counts: dict,
        score: engine.Score,
        dense: engine.Score | None,
    ) -> "Row":
        name = PRUNED_NAME.fullmatch(path.name)
        settings = checkpoint.get("settings", {})
        asked = 100 * settings["sparsity"] if "sparsity" in settings else float(name["percent"]) if name else None
        zeros, weights = (sum(column) for column in zip(*layers.values()))
        dense_count, nonzero_count = (sum(column) for column in zip(*counts.values()))
        parameters = sum(v.numel() for k, v in checkpoint["net"].items() if k.endswith((".weight", ".bias")))
        history = checkpoint.get("history")
        before = (
            dense.accuracy if dense else checkpoint.get("dense_acc")
        )  # a file whose parent is gone must be believed
        return cls(
            file=path.name,
            arch=checkpoint["arch"],
            dataset=dataset,
            mode=settings.get("mode", name["mode"] if name else "dense"),
            allocation=settings.get("allocation", (name and name["allocation"]) or "global"),
            retrain=settings.get("retrain", (name and name["retrain"]) or ("plain" if name else "")),
            rewind=settings.get("rewind", 0),
            seed=settings.get("seed"),
            epochs=len(history) if isinstance(history, list) else None,
            values=checkpoint.get("values", "fp32"),
            sparsity_asked=asked,
            sparsity=100 * zeros / weights,
            sparsity_all_parameters=100 * zeros / parameters,
            accuracy_before=before,
            accuracy_pruned=checkpoint.get("pruned_acc"),
            accuracy=score.accuracy,
            accuracy_margin=100 * margin(score.correct, score.images),
            drop=None if before is None else before - score.accuracy,
            loss=score.loss,
            zeros=zeros,
            nonzero_weights=weights - zeros,
            compression=parameters / (parameters - zeros) if zeros < parameters else None,
            multiply_adds_dense=dense_count / 1e6,
            multiply_adds=nonzero_count / 1e6,
            theoretical_speed_up=dense_count / nonzero_count if nonzero_count else None,
            file_bytes=path.stat().st_size,
        )


def margin(correct: int, images: int) -> float:
    """Half the width of the 95 % interval of an accuracy, a fraction (Wilson 1927): of how many images there are, and
    nothing of seeds."""
    z, share = 1.96, correct / images
    return z * math.sqrt(share * (1 - share) / images + (z / images / 2) ** 2) / (1 + z**2 / images)


def contradictions(
    path: Path, checkpoint: dict, row: Row, score: engine.Score, dense: engine.Score | None
) -> list[str]:
    """Where a file says something else than was found, beyond what the rounding of another device explains."""
    found = []
    ours = "settings" in checkpoint
    if ours and checkpoint.get("zeros") != row.zeros:
        found.append(f"says {checkpoint.get('zeros')} weights are zero, {row.zeros} are")
    if not math.isfinite(score.loss):
        found.append("gives outputs that are not finite")
    if row.sparsity_asked is not None and abs(row.sparsity_asked - row.sparsity) > 0.05:
        found.append(f"should be {row.sparsity_asked:g} % zero, and is {row.sparsity:.2f} %")
    name = PRUNED_NAME.fullmatch(path.name)
    if name and f"{float(name['percent']):g}" != f"{row.sparsity_asked:g}":
        found.append(f"was made for {row.sparsity_asked:g} %, not for what its name says")
    # Another program normalised the images in its own way, which moves its accuracy a little: one point.
    slack = score.close if ours else score.images / 100
    if "acc" in checkpoint and not abs(checkpoint["acc"] / 100 * score.images - score.correct) <= slack + 0.5:
        found.append(f"says its accuracy is {checkpoint['acc']:.2f} %, measured {score.accuracy:.2f} %")
    says = checkpoint.get("dense_acc")
    if dense and says is not None and not abs(says / 100 * dense.images - dense.correct) <= dense.close + 0.5:
        found.append(f"says the dense accuracy is {says:.2f} %, measured {dense.accuracy:.2f} %")
    return [f"{path} {problem}" for problem in found]


def report(rows: list[Row], directory: Path) -> None:
    """Print the table; write it as results.csv and its picture as results.png."""
    table = [
        {
            "model": row.file if len(row.file) < 27 else row.file.replace("_ckpt", "_\nckpt"),
            "asked %": row.sparsity_asked,
            "found %": f"{row.sparsity:.4f}",
            "of all %": row.sparsity_all_parameters,
            "nonzero weights": f"{row.nonzero_weights:,}",
            "all / nonz.": row.compression,
            "mult- adds M": row.multiply_adds,
            "times fewer": row.theoretical_speed_up,
            "acc. before %": row.accuracy_before,
            "acc. pruned %": row.accuracy_pruned,
            "acc. after %": f"{row.accuracy:.2f} ±{row.accuracy_margin:.1f}",
            "drop pts": row.drop,
            "file MB": row.file_bytes / 1e6,
        }
        for row in rows
    ]
    headers = {name: name.replace(" ", "\n") for name in table[0]}
    tabulate.MIN_PADDING = 0  # so that 120 characters are enough
    print(
        tabulate.tabulate(table, headers, floatfmt=".2f", missingval="-", disable_numparse=[2, 4, 10], stralign="right")
    )
    lines = io.StringIO()
    writer = csv.DictWriter(lines, asdict(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    store.write(directory / "results.csv", lines.getvalue().encode(errors="backslashreplace"))
    store.write(directory / "results.png", picture(rows))


def picture(rows: list[Row], y: str = "accuracy") -> bytes:
    """Accuracy or drop against sparsity and against multiply-adds, a line a mode and way to prune and retrain, and one
    across for the dense network. Of several seeds the mean, with the standard deviation as a bar. A PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    dense = [row.accuracy for row in rows if row.file == DENSE]
    if dense:
        level = statistics.mean(dense)
        for axes in panels:
            axes.axhline(0 if y == "drop" else level, color="0.4", linestyle="--", label=f"dense, {level:.2f} %")
    # A rounded network is another one, and has its row in the table.
    shown = [row for row in rows if row.mode in MODES and row.values == "fp32" and getattr(row, y) is not None]
    kinds = sorted({(row.arch, row.allocation, row.retrain, row.rewind) for row in shown})
    for axes, x in zip(panels, ("sparsity", "multiply_adds")):
        for (mode, (name, style)), (color, kind) in itertools.product(MODES.items(), enumerate(kinds)):
            points = defaultdict(list)  # by sparsity, one a seed
            for row in shown:
                if (row.mode, row.arch, row.allocation, row.retrain, row.rewind) == (mode, *kind):
                    points[row.sparsity].append((getattr(row, x), getattr(row, y)))
            if points:
                columns = [tuple(zip(*same)) for _, same in sorted(points.items())]
                means = [[statistics.mean(values) for values in column] for column in columns]
                bars = [statistics.stdev(ys) if len(ys) > 1 else 0.0 for _, ys in columns]
                look = {"fmt": style, "color": f"C{color}", "capsize": 3, "label": label(name, kind, kinds)}
                axes.errorbar(*zip(*means), bars if any(bars) else None, **look)
        axes.grid(alpha=0.3)
    panels[0].set(xlabel="zeros among the weights of the pruned layers (%)")
    panels[0].set(ylabel="drop (points)" if y == "drop" else "accuracy (%)")
    panels[1].set(xlabel="multiply-adds with nonzero weights, of an image (millions)", xscale="log")
    panels[1].invert_xaxis()
    for axis in panels[1].xaxis.set_major_formatter, panels[1].xaxis.set_minor_formatter:
        axis("{x:g}")
    figure.suptitle(f"{rows[0].arch} on {rows[0].dataset}", parse_math=False)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    image = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters in the name of a folder that the font does not have
        figure.savefig(image, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return image.getvalue()


def label(mode: str, kind: tuple[str, str, str, int], kinds: list[tuple[str, str, str, int]]) -> str:
    """A name for one of `kinds` (network, allocation, way to retrain, epoch rewound to) that sets it apart."""
    arch, allocation, retrain, rewind = kind
    parts = [arch] if len({other[0] for other in kinds}) > 1 else []
    parts += [mode] if allocation == "global" else [mode, allocation]
    parts += [retrain] if retrain and len({other[2:] for other in kinds}) > 1 else []
    return ", ".join(parts + ([f"rewound to {rewind}"] if rewind else []))


def layer_tables(layers: dict[str, dict[str, tuple[int, int]]], counts: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Two tables, a row a layer and a column a checkpoint: sparsity in percent, and millions of multiply-adds with
    nonzero weights, of which the first column has all."""
    files = [file.removesuffix("_ckpt.pth").replace("percent_", "%\n") for file in layers]
    names = dict.fromkeys(name for columns in layers.values() for name in columns)
    rows, count_rows = [], []
    for name in names:
        shares = [100 * zeros[name][0] / zeros[name][1] if name in zeros else None for zeros in layers.values()]
        rows.append([name, *shares])
        found = [columns.get(name, (None, None)) for columns in counts.values()]
        dense = next(dense for dense, _ in found if dense is not None)
        count_rows.append([name, *((None if n is None else n / 1e6) for n in (dense, *(n for _, n in found)))])
    tables = (["zeros % of layer", *files], rows), (["multiply-adds (millions)", "all", *files], count_rows)
    return "\n\n".join(tabulate.tabulate(rows, header, floatfmt=".2f", missingval="-") for header, rows in tables)


if __name__ == "__main__":
    utils.run(main)
