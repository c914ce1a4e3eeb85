"""Reload every checkpoint of a directory, count and measure it anew, compare.

    python test.py                          the table, results.csv and results.png of checkpoint/
    python test.py --layers                 also sparsity and MACs of each layer
    python test.py --checkpoint-dir a b c   of each, and mean and deviation over them: one directory per seed
    python test.py net.pth net.safetensors  of files of any name, for which nothing is written

Nothing in a file is believed: zeros are counted and the accuracy is measured on the whole test set. A file that cannot
be read, or that contradicts what is found, is named, and the exit code is 1.
"""

import signal

if __name__ == "__main__":  # imports take seconds; until there is something to save, Ctrl-C just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoints
import data
import engine
import pruning
import report
import utils
from report import RESULT_NAME, Row
from stages import DENSE

FOREIGN_SUFFIXES = (".pt", ".tar", ".bin", ".ckpt", ".safetensors")  # of other people's checkpoints


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Reload every checkpoint of a directory and report sparsity and accuracy.")
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="checkpoint files to measure in place of a directory"
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=utils.directory,
        nargs="+",
        metavar="DIR",
        help="what to report (default: checkpoint); over several, runs with other seeds, also mean and deviation",
    )
    parser.add_argument("--layers", action="store_true", help="also print sparsity and MACs of each layer")
    utils.add_data_arguments(parser, None, None)
    utils.add_device_arguments(parser, "of the measurement; auto is fp32, in which main.py measures too")
    args = parser.parse_args(argv)
    if args.files and args.checkpoint_dir:
        parser.error("name files or --checkpoint-dir, not both")
    if directories := [path for path in args.files if path.is_dir()]:
        parser.error(f"{directories[0]} is a directory: --checkpoint-dir {directories[0]}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    device = utils.choose_device(args.device)
    utils.set_up(device, args.deterministic)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    directories = list({path.resolve(): path for path in args.checkpoint_dir or [Path("checkpoint")]}.values())
    found = [read(args.files)] if args.files else [read(files_of(directory)) for directory in directories]
    everything = {path: checkpoint for networks, _ in found for path, checkpoint in networks.items()}
    if not everything:
        complain([problem for _, problems in found for problem in problems])
        return 2 if args.files else 1
    if not args.mean:
        checkpoints.adopt_constants(everything)
    images = data.of_checkpoints(args, everything)
    tables, problems = [], []
    for directory, (networks, unreadable) in zip(directories, found):
        if len(directories) > 1:
            print(f"{utils.printable(str(directory))}:")
        wrong = list(unreadable)
        try:
            tables.append(measure(networks, images, device, dtype, args.layers, wrong))
            if tables[-1] and not args.files:
                report.write(tables[-1], directory)
        finally:
            complain(wrong)
        problems += wrong
    if len(directories) > 1 and any(tables):
        print(f"\nover {len(tables)} directories:\n{report.write_seeds(tables, directories[0])}")
        print_mixed([networks for networks, _ in found])
    return 1 if problems else 0


def measure(
    networks: dict[Path, dict],
    images: data.Dataset,
    device: torch.device,
    dtype: torch.dtype,
    with_layers: bool,
    problems: list[str],
) -> list[Row]:
    """Measure the checkpoints of a directory and print their table; a row for each. Adds to `problems`."""
    rows: list[Row] = []
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    macs: dict[str, dict[str, tuple[int, int]]] = {}
    notes: list[str] = []
    dense: engine.Score | None = None
    dense_digest = ""
    for path, checkpoint in tqdm(networks.items(), "measuring", leave=False, disable=None):
        try:
            data.check(path, checkpoint, images)
        except utils.Failure as failure:
            problems.append(str(failure))
            continue
        if not images.held_out_scores:  # the file's accuracies are those of the held-out images
            checkpoint = {name: checkpoint[name] for name in checkpoint.keys() - {"acc", "dense_acc", "pruned_acc"}}
        network = engine.to_device(checkpoints.build_network(checkpoint), device)
        settings = checkpoint.get("settings", {})
        zeros = pruning.count_zeros(network, settings.get("exclude", "").split())
        counts = pruning.count_macs(network, images.test.images.shape[1])
        if path.suffix == ".pth" or zeros not in layers.values():  # a packed file has the zeros of its checkpoint
            layers[path.name], macs[path.name] = zeros, counts
        score = engine.evaluate(network, data.test_batches(checkpoint, images, device), dtype)
        parent = dense
        # Files of earlier versions say `parent` for the dense network.
        if dense and settings.get("dense", settings.get("parent", dense_digest)) != dense_digest:
            problems.append(f"{path} was pruned from another network than {DENSE}: main.py --force makes it again")
            parent = None
        rows.append(Row.of(path, images.name, checkpoint, zeros, counts, score, parent))
        notes += remarks(path, checkpoint, score)
        problems += contradictions(path, checkpoint, rows[-1], score, parent)
        if path.name == DENSE:
            dense, dense_digest = score, checkpoints.digest(checkpoint["net"])
    for note in notes:
        print(utils.printable(note))
    if rows:
        print(report.table(rows))
    if rows and with_layers:
        print("\n" + report.layer_tables(layers, macs))
    return rows


def files_of(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the dense one first, then by mode and sparsity. Failure when it has none."""
    if not directory.is_dir():
        raise utils.Failure(f"--checkpoint-dir {directory} is not a directory")

    def position(path: Path) -> tuple:
        name = RESULT_NAME.fullmatch(path.name)
        return (
            path.name != DENSE,
            path.name.partition(".")[0] != "ckpt",
            name["mode"] != "single" if name else 2,
            float(name["percent"] or 0) if name else 0,
            path.suffix != ".pth",
            path.name,
        )

    def inside(folder: Path) -> list[Path]:
        return [path for path in folder.iterdir() if path.suffix in (".pth", ".packed")]

    if found := inside(directory):
        return sorted(found, key=position)
    below = sorted({path.parent for path in directory.rglob("*ckpt.pth")})
    others = sorted(path for path in directory.iterdir() if path.suffix in FOREIGN_SUFFIXES)
    if below:
        more = f" and {len(below) - 5} more" if len(below) > 5 else ""
        advice = f"name those below it: --checkpoint-dir {' '.join(map(str, below[:5]))}{more}"
    elif others:
        advice = f"name other files on the command line: python test.py {others[0]}"
    else:
        advice = "python main.py makes them"
    raise utils.Failure(f"{directory} holds no checkpoint (*.pth, *.packed): {advice}")


def read(paths: list[Path]) -> tuple[dict[Path, dict], list[str]]:
    """Every readable checkpoint, and a line for each other file."""
    networks, problems = {}, []
    for path in paths:
        try:
            networks[path] = checkpoints.load_checkpoint(path)
        except utils.Failure as failure:
            problems.append(str(failure))
    return networks, problems


def contradictions(
    path: Path, checkpoint: dict, row: Row, score: engine.Score, dense: engine.Score | None
) -> list[str]:
    """Where a file contradicts what was found, beyond what another device's rounding explains."""
    found = []
    ours = "settings" in checkpoint
    if ours and checkpoint.get("zeros") != row.zeros:
        found.append(f"says {checkpoint.get('zeros')} weights are zero, {row.zeros} are")
    if not math.isfinite(score.loss):
        found.append("gives outputs that are not finite")
    if row.sparsity_asked is not None and abs(row.sparsity_asked - row.sparsity) > 0.05:
        found.append(f"should be {row.sparsity_asked:g} % zero, and is {row.sparsity:.2f} %")
    if row.macs_asked and row.macs_left > row.macs_asked + 1e-6:
        found.append(f"should have {row.macs_asked:g} % of its MACs, and has {row.macs_left:.4f} %")
    name = RESULT_NAME.fullmatch(path.name)
    named = float(name["percent"]) if name and name["percent"] else row.sparsity_asked
    if row.sparsity_asked is not None and f"{named:g}" != f"{row.sparsity_asked:g}":
        found.append(f"was made for {row.sparsity_asked:g} %, not for what its name says")
    acc = checkpoint.get("acc") if ours else None
    if acc is not None and not abs(acc / 100 * score.images - score.correct) <= score.close + 0.5:
        found.append(f"says its accuracy is {acc:.2f} %, measured {score.accuracy:.2f} %")
    says = checkpoint.get("dense_acc")
    if dense and says is not None and not abs(says / 100 * dense.images - dense.correct) <= dense.close + 0.5:
        found.append(f"says the dense accuracy is {says:.2f} %, measured {dense.accuracy:.2f} %")
    return [f"{path} {problem}" for problem in found]


def remarks(path: Path, checkpoint: dict, score: engine.Score) -> list[str]:
    """What was taken from a file of another program, and whether its claim is far from what was measured."""
    taken = checkpoints.taken(checkpoint)
    doubt = "" if "settings" in checkpoint else engine.doubt(checkpoint.get("acc"), score)
    return [f"{path}: {taken}"] * bool(taken) + [f"note: {path}: {doubt}"] * bool(doubt)


def print_mixed(directories: list[dict[Path, dict]]) -> None:
    """Name the files that differ from the first of their name in more than the seed: their mean says little."""
    first: dict[tuple[str, str], tuple[Path, dict]] = {}
    for path, checkpoint in itertools.chain.from_iterable(directory.items() for directory in directories):
        if "settings" not in checkpoint:
            continue
        settings = checkpoint["settings"] | dict.fromkeys(("seed", "parent", "dense", "teacher"))
        model, wanted = first.setdefault((path.name, checkpoint["arch"]), (path, settings))
        names = [name for name in wanted | settings if wanted.get(name) != settings.get(name)]
        if names:
            print(utils.printable(f"{path} and {model} differ in more than the seed: {', '.join(names)}"))


def complain(problems: list[str]) -> int:
    """Print a line for each problem; returns the exit code."""
    for problem in problems:
        print(f"test.py: {utils.printable(problem)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    utils.run(main)
