"""Reload every checkpoint of a directory, count and measure it anew, compare.

    python test.py                          the table, results.csv and results.png of checkpoint/
    python test.py --layers                 also the sparsity of each layer

Nothing in a file is believed: zeros are counted and the accuracy is measured on the whole test set. A file
that cannot be read, or that says something else than is found, is named, and the exit code is 1.
"""

import signal

if __name__ == "__main__":  # until there is something to save, Ctrl-C just ends it: imports take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import csv
import io
import math
import re
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

import data
import engine
import pruning
import store
import utils

DENSE = "ckpt.pth"
PRUNED_NAME = re.compile(
    r"(?P<percent>\d+(?:\.\d+)?)percent_(?P<mode>single|iter)_ckpt(\.pth|(\.bf16|\.fp16)?\.packed)"
)


def parse_args() -> argparse.Namespace:
    parser = utils.Parser(description="Reload every checkpoint of a directory and report sparsity and accuracy.")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoint"), metavar="DIR", help="what to report")
    parser.add_argument("--layers", action="store_true", help="also print the sparsity of each layer")
    utils.add_data_arguments(parser, None, None)
    utils.add_device_arguments(parser, "of the measurement; auto is fp32, in which main.py measures too")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    device = utils.choose_device(args.device)
    utils.set_up(device)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    checkpoints, problems = read_all(args.checkpoint_dir)
    if not checkpoints:
        return complain(problems)
    images = load_images(args, checkpoints)
    batches = data.TestBatches(images, device)
    rows, layers, dense, dense_digest = [], {}, None, ""
    for path, checkpoint in tqdm(checkpoints.items(), "measuring", leave=False, disable=None):
        try:
            check_data(path, checkpoint, images)
        except utils.Failure as failure:
            problems.append(str(failure))
            continue
        network = store.network_of(checkpoint).to(device, memory_format=torch.channels_last)
        layers[path.name] = pruning.count(network)
        score = engine.evaluate(network, batches, dtype)
        parent = dense
        if dense and checkpoint.get("settings", {}).get("parent", dense_digest) != dense_digest:
            problems.append(f"{path} was pruned from another network than {DENSE}: main.py --force makes it again")
            parent = None
        rows.append(Row.of(path, images.name, checkpoint, layers[path.name], score, parent))
        problems += contradictions(path, checkpoint, rows[-1], score, parent)
        if path.name == DENSE:
            dense, dense_digest = score, store.digest(checkpoint["net"])
    try:
        if rows:
            report(rows, args.checkpoint_dir)
        if rows and args.layers:
            print("\n" + layer_table(layers))
    finally:
        complain(problems)
    return 1 if problems else 0


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


def load_images(args: argparse.Namespace, checkpoints: dict[Path, dict]) -> data.Dataset:
    """The data set asked for; without a word from the user, the one that the checkpoints were made with."""
    settings = next((c["settings"] for c in checkpoints.values() if "settings" in c), {})
    name = args.dataset or settings.get("dataset", "cifar10")
    if not args.dataset and name.startswith("folder "):
        raise utils.Failure("these checkpoints were made with a folder of images: say where it is with --dataset")
    return data.load(name, args.data_dir, args.image_size or settings.get("image_size", 32))


def check_data(path: Path, checkpoint: dict, images: data.Dataset) -> None:
    """Failure when a network cannot be measured on these images."""
    classes = len(checkpoint["net"]["linear.weight"])
    if classes != len(images.classes):
        raise utils.Failure(f"{path} tells {classes} classes apart, and {images.name} has {len(images.classes)}")
    settings = checkpoint.get("settings", {})
    mine = {"dataset": images.identity, "image_size": images.test.images.shape[1]}
    if settings and (other := store.difference(settings, mine)):
        raise utils.Failure(f"{path} was made with other images: {other}")


@dataclass
class Row:
    """One checkpoint. Sparsities and accuracies in percent, drop in points; `values` is the type that the weights
    were rounded to for packing, else fp32, `sparsity` is over the pruned layers, `accuracy_before` that of the dense
    network it was pruned from."""

    file: str
    arch: str
    dataset: str
    mode: str
    values: str
    sparsity_asked: float | None
    sparsity: float
    sparsity_all_parameters: float
    accuracy_before: float | None
    accuracy: float
    drop: float | None
    loss: float
    zeros: int
    nonzero_weights: int
    file_bytes: int

    @classmethod
    def of(
        cls, path: Path, dataset: str, checkpoint: dict, layers: dict, score: engine.Score, dense: engine.Score | None
    ) -> "Row":
        name = PRUNED_NAME.fullmatch(path.name)
        settings = checkpoint.get("settings", {})
        asked = 100 * settings["sparsity"] if "sparsity" in settings else float(name["percent"]) if name else None
        zeros, weights = (sum(column) for column in zip(*layers.values()))
        parameters = sum(v.numel() for k, v in checkpoint["net"].items() if k.endswith((".weight", ".bias")))
        before = (
            dense.accuracy if dense else checkpoint.get("dense_acc")
        )  # a file whose parent is gone must be believed
        return cls(
            file=path.name,
            arch=checkpoint["arch"],
            dataset=dataset,
            mode=settings.get("mode", name["mode"] if name else "dense"),
            values=checkpoint.get("values", "fp32"),
            sparsity_asked=asked,
            sparsity=100 * zeros / weights,
            sparsity_all_parameters=100 * zeros / parameters,
            accuracy_before=before,
            accuracy=score.accuracy,
            drop=None if before is None else before - score.accuracy,
            loss=score.loss,
            zeros=zeros,
            nonzero_weights=weights - zeros,
            file_bytes=path.stat().st_size,
        )


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
        found.append(f"says its test accuracy is {checkpoint['acc']:.2f} %, measured {score.accuracy:.2f} %")
    says = checkpoint.get("dense_acc")
    if dense and says is not None and not abs(says / 100 * dense.images - dense.correct) <= dense.close + 0.5:
        found.append(f"says the dense accuracy is {says:.2f} %, measured {dense.accuracy:.2f} %")
    return [f"{path} {problem}" for problem in found]


def report(rows: list[Row], directory: Path) -> None:
    """Print the table; write it as results.csv and its picture as results.png."""
    table = [
        {
            "model": row.file,
            "asked %": row.sparsity_asked,
            "found %": f"{row.sparsity:.4f}",
            "of all parameters %": f"{row.sparsity_all_parameters:.4f}",
            "nonzero weights": f"{row.nonzero_weights:,}",
            "accuracy before %": row.accuracy_before,
            "accuracy after %": row.accuracy,
            "drop points": row.drop,
            "loss": f"{row.loss:.4f}",
            "file MB": f"{row.file_bytes / 1e6:.2f}",
        }
        for row in rows
    ]
    headers = {name: name.replace(" ", "\n") for name in table[0]}
    print(tabulate(table, headers, floatfmt=".2f", missingval="-", disable_numparse=[2, 3, 8, 9], stralign="right"))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, asdict(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    store.write(directory / "results.csv", lines.getvalue().encode(errors="backslashreplace"))
    store.write(directory / "results.png", picture(rows))


def picture(rows: list[Row]) -> bytes:
    """Accuracy against sparsity, one-shot and iterative, with the dense network as a line; a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for row in rows:
        if row.file == DENSE:
            axes.axhline(row.accuracy, color="0.4", linestyle="--", label=f"dense, {row.accuracy:.2f} %")
    for mode, label, marker in ("single", "one-shot", "o"), ("iter", "iterative", "s"):
        # A packed file is the same network again; a rounded one is another, and has its row in the table.
        points = sorted({(row.sparsity, row.accuracy) for row in rows if row.mode == mode and row.values == "fp32"})
        if points:
            axes.plot(*zip(*points), marker=marker, label=label)
    axes.set(xlabel="zeros among the weights of the pruned layers (%)", ylabel="test accuracy (%)")
    axes.set_title(f"{rows[0].arch} on {rows[0].dataset}", parse_math=False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    image = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters in the name of a folder that the font does not have
        figure.savefig(image, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)
    return image.getvalue()


def layer_table(layers: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The sparsity of each layer in percent: a row a layer, a column a checkpoint."""
    names = dict.fromkeys(name for counts in layers.values() for name in counts)
    rows = []
    for name in names:
        shares = [100 * counts[name][0] / counts[name][1] if name in counts else None for counts in layers.values()]
        rows.append([name, *shares])
    files = [file.removesuffix("_ckpt.pth") for file in layers]
    return tabulate(rows, ["zeros % of layer", *files], floatfmt=".2f", missingval="-")


if __name__ == "__main__":
    utils.run(main)
