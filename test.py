"""Reload every checkpoint of a directory, count and measure it anew, compare.

    python test.py                          the table, results.csv and results.png of checkpoint/
    python test.py --layers                 also sparsity and MACs of each layer
    python test.py --checkpoint-dir a b c   of each, and mean and deviation over them: one directory per seed
    python test.py net.pth net.safetensors  of files of any name, for which nothing is written

Nothing in a file is believed: zeros are counted and the accuracy is measured on the whole test set. A file that cannot
be read, or that contradicts what is found, is named, and the exit code is 1. One network is in memory at a time. What
this program measured before, in the same bytes on the same images, is not measured again (--fresh does).
"""

import signal

if __name__ == "__main__":  # imports take seconds; until there is something to save, Ctrl-C just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoints
import data
import engine
import measurements
import models
import pruning
import report
import utils
from measurements import Cache
from report import RESULT_NAME, Row
from stages import DENSE

Facts = dict  # what a file says, and what is found in it without images: a checkpoint without its tensors
MAX_LINES = 20  # about missing and unfinished results
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
        help="directories to report (default: checkpoint); with one for each seed, also mean and standard deviation",
    )
    parser.add_argument("--layers", action="store_true", help="also print sparsity and MACs of each layer")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    utils.add_data_arguments(parser, None, None)
    utils.add_device_arguments(parser, "number format of the measurement; auto is fp32, in which main.py measures too")
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
    cache = Cache(args.fresh)
    directories = list({path.resolve(): path for path in args.checkpoint_dir or [Path("checkpoint")]}.values())
    paths, empty = ({}, []) if args.files else list_files(directories)
    found = [read(files, cache) for files in ([args.files] if args.files else paths.values())]
    everything = {path: facts for networks, _ in found for path, facts in networks.items()}
    if not everything:
        complain([*empty, *(problem for _, problems in found for problem in problems)])
        return 2 if args.files else 1
    if not args.mean:
        checkpoints.adopt_constants(everything)
    images = data.of_checkpoints(args, everything)
    measurer = Measurer(images, device, dtype, cache)
    tables, problems = [], []
    for directory, (networks, unreadable) in zip(paths or directories, found):
        if len(directories) > 1:
            print(f"{utils.printable(str(directory))}:")
        wrong = list(unreadable)
        try:
            tables.append(measure(networks, measurer, args.layers, wrong))
            if tables[-1] and not args.files:
                report.write(tables[-1], directory)
        finally:
            complain(wrong)
        problems += wrong
    if len(directories) > 1 and any(tables):
        print(f"\nover {len(tables)} directories:\n{report.write_seeds(tables, next(iter(paths)))}")
        print_mixed([networks for networks, _ in found])
    print_bounded([*empty, *incomplete({path: networks for path, (networks, _) in zip(paths, found)})])
    return 1 if problems else 0


class Measurer:
    """Measures the networks of files on the same images, one at a time, and none a second time."""

    def __init__(self, images: data.Dataset, device: torch.device, dtype: torch.dtype, cache: Cache):
        self.images, self.device, self.dtype, self.cache = images, device, dtype, cache
        self.name = [measurements.identity_of(images), device.type, str(dtype)]

    def measure(self, path: Path, facts: Facts) -> tuple[dict, dict, engine.Score]:
        """Zeros and weights, dense and nonzero MACs of each layer; the score. Failure where they cannot be measured."""
        constants = [facts["mean"], facts["std"]] if "mean" in facts else list(self.images.mean_and_std())
        key = ["measured", facts["sha256"], *self.name, constants]
        value = self.cache.get(key)
        if value is None:
            value = self.measure_anew(path, facts)
            self.cache.put(key, value)
        zeros, macs = ({layer: tuple(pair) for layer, pair in value[name].items()} for name in ("zeros", "macs"))
        return zeros, macs, engine.Score(**value["score"])

    def measure_anew(self, path: Path, facts: Facts) -> dict:
        content = checkpoints.read(path)
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise utils.Failure(f"{path} changed while it was measured: a run is at work there")
        checkpoint = checkpoints.load_checkpoint(path, content)
        del content
        checkpoint |= {name: facts[name] for name in ("mean", "std") if name in facts}  # they may be adopted
        data.check(path, checkpoint, self.images)
        network = engine.to_device(checkpoints.build_network(checkpoint), self.device)
        score = engine.evaluate(network, data.test_batches(checkpoint, self.images, self.device), self.dtype)
        return {
            "zeros": pruning.count_zeros(network, facts.get("settings", {}).get("exclude", "").split()),
            "macs": pruning.count_macs(network, self.images.test.images.shape[1]),
            "score": asdict(score),
        }


def measure(networks: dict[Path, Facts], measurer: Measurer, with_layers: bool, problems: list[str]) -> list[Row]:
    """Measure the checkpoints of a directory and print their table; a row for each. Adds to `problems`."""
    rows: list[Row] = []
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    macs: dict[str, dict[str, tuple[int, int]]] = {}
    notes: list[str] = []
    dense: engine.Score | None = None
    dense_digest = ""
    for path, facts in tqdm(networks.items(), "measuring", leave=False, disable=None):
        try:
            zeros, counts, score = measurer.measure(path, facts)
        except utils.Failure as failure:
            problems.append(str(failure))
            continue
        if not measurer.images.held_out_scores:  # the file's accuracies are those of the held-out images
            facts = {name: facts[name] for name in facts.keys() - {"acc", "dense_acc", "pruned_acc"}}
        settings = facts.get("settings", {})
        if path.suffix == ".pth" or zeros not in layers.values():  # a packed file has the zeros of its checkpoint
            layers[path.name], macs[path.name] = zeros, counts
        parent = dense
        # Files of earlier versions say `parent` for the dense network.
        if dense and settings.get("dense", settings.get("parent", dense_digest)) != dense_digest:
            problems.append(f"{path} was pruned from another network than {DENSE}: main.py --force makes it again")
            parent = None
        rows.append(Row.of(path, measurer.images.name, facts, zeros, counts, score, parent))
        notes += remarks(path, facts, score)
        problems += contradictions(path, facts, rows[-1], score, parent)
        if path.name == DENSE:
            dense, dense_digest = score, facts["digest"]
    for note in notes:
        print(utils.printable(note))
    if rows:
        print(report.table(rows))
    if rows and with_layers:
        print("\n" + report.layer_tables(layers, macs))
    return rows


def list_files(directories: list[Path]) -> tuple[dict[Path, list[Path]], list[str]]:
    """The checkpoints of each directory that has any, and a line for each other one. Failure if none has any."""
    for directory in directories:
        if not directory.is_dir():
            raise utils.Failure(f"--checkpoint-dir {directory} is not a directory")
    found, empty = {}, []
    for directory in directories:
        try:
            found[directory] = files_of(directory)
        except utils.Failure as failure:
            empty.append(failure)
    if not found:
        raise empty[0]
    return found, list(map(str, empty))


def files_of(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the dense one first, then by mode and sparsity. Failure when it has none."""

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


def read(paths: list[Path], cache: Cache) -> tuple[dict[Path, Facts], list[str]]:
    """The facts of every readable checkpoint, and a line for each other file."""
    networks, problems = {}, []
    for path in tqdm(paths, "reading", leave=False, disable=None):
        try:
            networks[path] = read_facts(path, cache)
        except utils.Failure as failure:
            problems.append(str(failure))
    return networks, problems


def read_facts(path: Path, cache: Cache) -> Facts:
    """What a file says, the file's SHA-256, and what is found in it without images."""
    content = checkpoints.read(path)
    sha = hashlib.sha256(content).hexdigest()
    facts = cache.get(["facts", sha])
    if facts is None:
        checkpoint = checkpoints.load_checkpoint(path, content)
        names = (*checkpoints.NUMBERS, "arch", "dtype", "mean", "std", "settings", "taken")
        net, history = checkpoint["net"], checkpoint.get("history")
        facts = {name: checkpoint[name] for name in names if name in checkpoint}
        facts |= {"test_images": str(checkpoint["test_images"])} if "test_images" in checkpoint else {}
        facts |= {"outputs": models.outputs(checkpoint["arch"], net), "digest": checkpoints.digest(net)}
        facts["parameters"] = sum(v.numel() for k, v in net.items() if k.endswith((".weight", ".bias")))
        facts["epochs"] = len(history) if isinstance(history, list) else None
        cache.put(["facts", sha], facts)
    return facts | {"sha256": sha}


def contradictions(path: Path, facts: Facts, row: Row, score: engine.Score, dense: engine.Score | None) -> list[str]:
    """Where a file contradicts what was found, beyond what another device's rounding explains."""
    found = []
    ours = "settings" in facts
    if ours and facts.get("zeros") != row.zeros:
        found.append(f"says {facts.get('zeros')} weights are zero, {row.zeros} are")
    if not math.isfinite(score.loss):
        found.append("gives outputs that are not finite")
    if row.sparsity_asked is not None and abs(row.sparsity_asked - row.sparsity) > 0.05:
        found.append(f"should be {row.sparsity_asked:g} % zero, and is {row.sparsity:.2f} %")
    if row.macs_asked and row.macs_left > row.macs_asked + 1e-6:
        found.append(f"should have {row.macs_asked:g} % of its MACs, and has {row.macs_left:.4f} %")
    if row.ms_asked and row.ms_predicted is not None and row.ms_predicted > row.ms_asked * (1 + 1e-6):
        found.append(f"should take {row.ms_asked:g} ms, and {row.ms_predicted:.6g} ms are predicted")
    name = RESULT_NAME.fullmatch(path.name)
    named = float(name["percent"]) if name and name["percent"] else row.sparsity_asked
    if row.sparsity_asked is not None and f"{named:g}" != f"{row.sparsity_asked:g}":
        found.append(f"was made for {row.sparsity_asked:g} %, not for what its name says")
    acc = facts.get("acc") if ours else None
    if acc is not None and not abs(acc / 100 * score.images - score.correct) <= score.close + 0.5:
        found.append(f"says its accuracy is {acc:.2f} %, measured {score.accuracy:.2f} %")
    says = facts.get("dense_acc")
    if dense and says is not None and not abs(says / 100 * dense.images - dense.correct) <= dense.close + 0.5:
        found.append(f"says the dense accuracy is {says:.2f} %, measured {dense.accuracy:.2f} %")
    return [f"{path} {problem}" for problem in found]


def remarks(path: Path, facts: Facts, score: engine.Score) -> list[str]:
    """What was taken from a file of another program, and whether its claim is far from what was measured."""
    taken = checkpoints.taken(facts)
    doubt = "" if "settings" in facts else engine.doubt(facts.get("acc"), score)
    return [f"{path}: {taken}"] * bool(taken) + [f"note: {path}: {doubt}"] * bool(doubt)


def print_mixed(directories: list[dict[Path, Facts]]) -> None:
    """Name the files that differ from the first of their name in more than the seed: their mean says little."""
    first: dict[tuple[str, str], tuple[Path, dict]] = {}
    lines = []
    for path, facts in ((path, facts) for directory in directories for path, facts in directory.items()):
        if "settings" not in facts:
            continue
        settings = facts["settings"] | dict.fromkeys(("seed", "parent", "dense", "teacher"))
        model, wanted = first.setdefault((path.name, facts["arch"]), (path, settings))
        names = [name for name in wanted | settings if wanted.get(name) != settings.get(name)]
        if names:
            lines.append(f"{path} and {model} differ in more than the seed: {', '.join(names)}")
    print_bounded(lines)


def incomplete(directories: dict[Path, dict[Path, Facts]]) -> list[str]:
    """A line for each directory that lacks its dense network, or results that others of its network have, or where
    a stage is interrupted."""
    results = {path: {file.name for file in found if file.suffix == ".pth"} for path, found in directories.items()}
    archs = {path: {facts["arch"] for facts in found.values()} for path, found in directories.items()}
    lines = []
    for directory, names in results.items():
        alike = [other for other in results if archs[other] & archs[directory]]
        missing = sorted(set().union(*(results[other] for other in alike)) - names - {DENSE})
        states = sorted(path.stem for path in (directory / "resume").glob("*.pt"))
        said = [f"has no {DENSE}"] if DENSE not in names else []
        said += [f"lacks {shortened(missing)}"] if missing else []
        said += [f"holds the state of an interrupted {shortened(states)}"] if states else []
        lines += [f"{directory} {', '.join(said)}"] if said else []
    return lines


def shortened(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def print_bounded(lines: list[str]) -> None:
    """Print lines, but not hundreds."""
    for line in lines[:MAX_LINES]:
        print(utils.printable(line))
    if len(lines) > MAX_LINES:
        print(f"and {len(lines) - MAX_LINES} more lines like these")


def complain(problems: list[str]) -> None:
    """Print a line for each problem on standard error."""
    for problem in problems:
        print(f"test.py: {utils.printable(problem)}", file=sys.stderr)


if __name__ == "__main__":
    utils.run(main)
