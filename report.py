"""What a person reads: names of result files, lines, tables, CSV files and figures."""

import argparse
import csv
import io
import itertools
import re
import statistics
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import tabulate

import checkpoints
import engine
import pruning
from engine import margin
from run import Run
from stages import DENSE, Stage
from utils import printable

# --- File names: written and parsed here only ----------------------------------------------------------------------

RESULT_NAME = re.compile(
    r"(?:(?P<percent>\d+(?:\.\d+)?)percent|control)_(?P<mode>single|iter)(?:_(?P<control>control))?"
    r"(?:_(?P<allocation>uniform|erk|lamp|macs[\d.]+|ms[\d.]+))?(?:_(?P<retrain>distilled|adaptive|plain))?"
    r"(?:_rewind(?P<rewind>\d+))?_ckpt(?P<suffix>\.pth|(?:\.bf16|\.fp16)?\.packed)"
)
MODES = {"single": ("one-shot", "-o"), "iter": ("iterative", ":s")}


def file_name(mode: str, sparsity: float | None, args: argparse.Namespace, control: bool = False) -> str:
    """The file of a result: 90percent_iter_ckpt.pth. What is not the default is part of it: 90percent_iter_erk_plain_.

    The one-shot control, without a sparsity, is control_single_ckpt.pth.
    """
    control = control or sparsity is None
    parts = ["control" if sparsity is None else f"{100 * sparsity:g}percent", mode]
    parts += ["control"] if control and sparsity is not None else []
    parts += [args.allocation] if args.allocation != "global" and not control else []
    parts += [f"macs{args.macs:g}"] if args.macs and not control else []
    parts += [f"ms{args.ms:g}"] if args.ms and not control else []
    parts += [args.retrain] if args.retrain != "distilled" else []
    parts += [f"rewind{args.rewind}"] if args.rewind else []
    return "_".join([*parts, "ckpt.pth"])


# --- Lines and the plan of main.py ---------------------------------------------------------------------------------


def summary(run: Run, stage: Stage, checkpoint: dict) -> str:
    """One line about a stage that was just finished."""
    network = checkpoints.build_network({"arch": run.args.arch, **checkpoint})
    sparsity = 100 * pruning.sparsity(network, stage.settings.get("exclude", "").split())
    line = f"{stage.name}: {run.measured} accuracy {checkpoint['acc']:.2f} %, loss {checkpoint['loss']:.4f}"
    if stage.parent is not None:
        line += f", drop {checkpoint['dense_acc'] - checkpoint['acc']:.2f} points, sparsity {sparsity:.2f} %"
        if (more := checkpoint["zeros"] - stage.zeros) > 0:
            line += f", {more} surviving weights are 0 by chance and stay pruned"
    counts = pruning.count_macs(network, run.args.image_size).values()
    dense, nonzero = (sum(column) / 1e6 for column in zip(*counts))
    line += f", {nonzero:,.1f} of {dense:,.1f} million MACs"
    limits = {} if stage.is_level else stage.settings  # levels have limits of their own
    if asked := limits.get("macs"):
        line += f" ({100 * nonzero / dense:.2f} %, at most {100 * asked:g} % asked)"
    if asked := limits.get("ms"):
        line += f", {checkpoint['predicted_ms']:.3g} ms predicted (at most {asked:g} ms asked)"
    return line


def plan(run: Run, targets: list[Stage]) -> str:
    """A table of the stages that a command would make, in order, with an estimate of the hours from a few steps."""
    directory, seen = run.directory, set()
    rows: list[list] = []
    hours = 0.0
    seconds = {True: 0.0, False: 0.0}
    dense = run.dense if run.args.pr else None  # it is never forced when pruning starts from it
    for stage in [*([dense] if dense else []), *(stage for target in targets for stage in target.ancestors())]:
        needed = run.args.force or any(stage in directory.unfinished(target) for target in targets)
        if stage.identity in seen or (stage.is_level and not needed):
            continue
        seen.add(stage.identity)
        forced = run.args.force and stage is not dense
        if directory.file(stage).exists() and not forced:
            rows.append([stage.name, "finished", 0, None])
            continue
        done = 0 if forced else directory.epochs_done(stage)
        distilled = bool(stage.parent) and run.args.retrain == "distilled"
        seconds[distilled] = seconds[distilled] or run.seconds_per_epoch(distilled)
        rows.append([stage.name, f"resumes after epoch {done}" if done else "to make", stage.epochs - done])
        rows[-1].append((stage.epochs - done) * seconds[distilled] / 3600)
        hours += rows[-1][-1]
    rows.append(["all", "", sum(row[2] for row in rows), hours])
    table = tabulate.tabulate(rows, ["stage", "", "epochs", "hours"], floatfmt=".2f", missingval="-")
    return f"{run.summary()}\n\n{table}\n\nhours are estimated from a few steps on this machine"


# --- The report of test.py -----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One checkpoint. Sparsities and accuracies are percent, the drop is percentage points, MACs are millions.

    epochs             of the training, or of all retraining since, of a pruned network
    dtype              to which the weights were rounded for packing, else fp32
    sparsity           over the pruned layers; sparsity_all_parameters over all parameters
    compression        all parameters over those that are not zero
    ms_predicted       for one image, by the profile of a device; ms_asked is the limit that was asked for
    macs_left          nonzero MACs over dense MACs, percent; macs_asked is the limit that was asked for
    mac_ratio          dense MACs over nonzero MACs, an upper bound on the speed-up
    accuracy_dense     of the dense network that this one was pruned from
    accuracy_pruned    after pruning, before retraining, as the file says
    accuracy_margin    half the 95 % Wilson interval of `accuracy`
    """

    file: str
    arch: str
    dataset: str
    mode: str
    control: bool
    allocation: str
    retrain: str
    rewind: int
    seed: int | None
    epochs: int | None
    dtype: str
    sparsity_asked: float | None
    sparsity: float
    sparsity_all_parameters: float
    accuracy_dense: float | None
    accuracy_pruned: float | None
    accuracy: float
    accuracy_margin: float
    drop: float | None
    loss: float
    zeros: int
    nonzero_weights: int
    compression: float | None
    macs_dense: float
    macs: float
    macs_asked: float | None
    macs_left: float
    ms_asked: float | None
    ms_predicted: float | None
    mac_ratio: float | None
    file_bytes: int

    @classmethod
    def of(
        cls,
        path: Path,
        dataset: str,
        facts: dict,
        layers: dict[str, tuple[int, int]],
        macs: dict[str, tuple[int, int]],
        score: engine.Score,
        dense: engine.Score | None,
    ) -> "Row":
        """`facts` are a checkpoint's without its tensors, with the numbers of its `parameters` and `epochs`; `layers`:
        zeros and weights, `macs`: dense and nonzero MACs of each layer. `dense` is the parent's score."""
        match = RESULT_NAME.fullmatch(path.name)
        name = match.groupdict() if match else {}
        settings = facts.get("settings", {})
        budgets = [f"{flag}{settings[flag]:g}" for flag in ("macs", "ms") if flag in settings]
        allocation = budgets[0] if budgets else settings.get("allocation")
        control = bool(settings.get("control", name.get("control") or (match and not name["percent"])))
        asked = 100 * settings["sparsity"] if "sparsity" in settings else name.get("percent")
        zeros, weights = (sum(column) for column in zip(*layers.values()))
        dense_macs, nonzero_macs = (sum(column) for column in zip(*macs.values()))
        parameters = facts["parameters"]
        # Without the dense network the file must be believed.
        accuracy_dense = dense.accuracy if dense else facts.get("dense_acc")
        return cls(
            file=path.name,
            arch=facts["arch"],
            dataset=dataset,
            mode=settings.get("mode", name.get("mode", "dense")),
            control=control or asked == 0,
            allocation=allocation or name.get("allocation") or "global",
            retrain=settings.get("retrain", name.get("retrain") or ("plain" if match else "")),
            rewind=settings.get("rewind", 0),
            seed=settings.get("seed"),
            epochs=facts["epochs"],
            dtype=facts.get("dtype", "fp32"),
            sparsity_asked=None if asked is None or control else float(asked),
            sparsity=100 * zeros / weights,
            sparsity_all_parameters=100 * zeros / parameters,
            accuracy_dense=accuracy_dense,
            accuracy_pruned=facts.get("pruned_acc"),
            accuracy=score.accuracy,
            accuracy_margin=100 * margin(score.correct, score.images),
            drop=None if accuracy_dense is None else accuracy_dense - score.accuracy,
            loss=score.loss,
            zeros=zeros,
            nonzero_weights=weights - zeros,
            compression=parameters / (parameters - zeros) if zeros < parameters else None,
            macs_dense=dense_macs / 1e6,
            macs=nonzero_macs / 1e6,
            macs_asked=100 * settings["macs"] if "macs" in settings else None,
            macs_left=100 * nonzero_macs / dense_macs,
            ms_asked=settings.get("ms"),
            ms_predicted=facts.get("predicted_ms"),
            mac_ratio=dense_macs / nonzero_macs if nonzero_macs else None,
            file_bytes=path.stat().st_size,
        )


def write(rows: list[Row], directory: Path) -> None:
    """Write results.csv and results.png."""
    write_csv(directory / "results.csv", [asdict(row) for row in rows])
    checkpoints.write(directory / "results.png", figure(rows))


def table(rows: list[Row]) -> str:
    """The table for the terminal, at most 120 characters wide."""
    lines = [
        {
            "model": printable(row.file) if len(row.file) < 27 else printable(row.file).replace("_ckpt", "_\nckpt"),
            "asked %": row.sparsity_asked,
            "found %": f"{row.sparsity:.4f}",
            "of all %": row.sparsity_all_parameters,
            "nonzero weights": f"{row.nonzero_weights:,}",
            "all / nonz.": row.compression,
            "MACs M": row.macs,
            "times fewer": row.mac_ratio,
            "acc. dense %": row.accuracy_dense,
            "acc. pruned %": row.accuracy_pruned,
            "acc. after %": f"{row.accuracy:.2f} ±{row.accuracy_margin:.1f}",
            "drop pts": row.drop,
            "file MB": row.file_bytes / 1e6,
        }
        for row in rows
    ]
    limits = [
        f"{printable(row.file)}: {row.macs_left:.2f} % of the MACs are left, at most {row.macs_asked:g} % asked"
        for row in rows
        if row.macs_asked
    ] + [
        f"{printable(row.file)}: {row.ms_predicted:.3g} ms predicted, at most {row.ms_asked:g} ms asked"
        for row in rows
        if row.ms_asked and row.ms_predicted is not None
    ]
    tabulate.MIN_PADDING = 0
    headers = {name: name.replace(" ", "\n") for name in lines[0]}
    text_columns = [2, 4, 10]
    shown = tabulate.tabulate(
        lines, headers, floatfmt=".2f", missingval="-", disable_numparse=text_columns, stralign="right"
    )
    return "\n".join([shown, *limits])


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    checkpoints.write(path, text.getvalue().encode(errors="backslashreplace"))


def write_seeds(tables: list[list[Row]], directory: Path) -> str:
    """Mean and standard deviation over directories of results with the same name: seeds.csv, seeds.png, a table."""
    lines = []
    for name, arch in dict.fromkeys((row.file, row.arch) for rows in tables for row in rows):
        same = [row for rows in tables for row in rows if (row.file, row.arch) == (name, arch)]
        seeds = " ".join("-" if row.seed is None else str(row.seed) for row in same)
        line = {"model": name, "arch": arch, "seeds": seeds, "found %": statistics.mean(row.sparsity for row in same)}
        for head, column in (("acc. after %", "accuracy"), ("drop pts", "drop"), ("acc. pruned %", "accuracy_pruned")):
            values = [getattr(row, column) for row in same if getattr(row, column) is not None]
            line[head] = statistics.mean(values) if values else None
            line[f"{head} std"] = statistics.stdev(values) if len(values) > 1 else None
        lines.append(line)
    write_csv(directory / "seeds.csv", lines)
    shown = []
    for rows in tables:  # a packed file beside its network is not another seed
        files = {row.file for row in rows}
        shown += [row for row in rows if row.file.endswith(".pth") or row.file.replace(".packed", ".pth") not in files]
    checkpoints.write(directory / "seeds.png", figure(shown, "drop"))
    headers = {name: name.replace(" ", "\n") for name in lines[0]}
    shown_lines = [
        line | {"model": printable(str(line["model"])), "seeds": shortened_seeds(str(line["seeds"]))} for line in lines
    ]
    return tabulate.tabulate(shown_lines, headers, floatfmt=".2f", missingval="-")


def shortened_seeds(seeds: str) -> str:
    """Seeds for a column of a table: "0 1 2 ... (300)"."""
    each = seeds.split()
    return seeds if len(each) <= 8 else f"{' '.join(each[:3])} ... ({len(each)})"


def layer_tables(layers: dict[str, dict[str, tuple[int, int]]], macs: dict[str, dict[str, tuple[int, int]]]) -> str:
    """Two tables with a row for each layer and a column for each checkpoint: sparsity in percent, and millions of
    nonzero MACs, after a column of dense MACs."""
    files = [printable(file).removesuffix("_ckpt.pth").replace("percent_", "%\n") for file in layers]
    names = dict.fromkeys(name for columns in layers.values() for name in columns)
    rows, mac_rows = [], []
    for name in names:
        shares = [100 * zeros[name][0] / zeros[name][1] if name in zeros else None for zeros in layers.values()]
        rows.append([name, *shares])
        found = [columns.get(name, (None, None)) for columns in macs.values()]
        dense = next(dense for dense, _ in found if dense is not None)
        mac_rows.append([name, *((None if n is None else n / 1e6) for n in (dense, *(n for _, n in found)))])
    tables = (["zeros % of layer", *files], rows), (["MACs (millions)", "all", *files], mac_rows)
    return "\n\n".join(tabulate.tabulate(rows, header, floatfmt=".2f", missingval="-") for header, rows in tables)


# --- The figure ----------------------------------------------------------------------------------------------------


def figure(rows: list[Row], y: str = "accuracy") -> bytes:
    """Accuracy or drop against sparsity and against MACs, a PNG: one line for each mode and way to prune and retrain,
    one across for the dense network. Error bars are the table's 95 % interval, or over several seeds the standard
    deviation around the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    dense = [row.accuracy for row in rows if row.file == DENSE]
    if dense:
        level = statistics.mean(dense)
        for axes in panels:
            axes.axhline(0 if y == "drop" else level, color="0.4", linestyle="--", label=f"dense, {level:.2f} %")
    # A rounded network is another one and has its row in the table; a control has no place on the axis of sparsity.
    shown = [
        row
        for row in rows
        if row.mode in MODES and row.dtype == "fp32" and not row.control and getattr(row, y) is not None
    ]
    kinds = sorted({(row.arch, row.allocation, row.retrain, row.rewind) for row in shown})
    for axes, x in zip(panels, ("sparsity", "macs")):
        for (mode, (name, style)), (color, kind) in itertools.product(MODES.items(), enumerate(kinds)):
            mine = [r for r in shown if (r.mode, r.arch, r.allocation, r.retrain, r.rewind) == (mode, *kind)]
            if mine:
                look = {"fmt": style, "color": f"C{color}", "capsize": 3, "label": line_label(name, kind, kinds)}
                axes.errorbar(*curve(mine, x, y), **look)
        axes.grid(alpha=0.3)
    panels[0].set(xlabel="zeros among the weights of the pruned layers (%)")
    panels[0].set(ylabel="drop (points)" if y == "drop" else "accuracy (%)")
    panels[1].set(xlabel="MACs with nonzero weights for one image (millions)", xscale="log")
    panels[1].invert_xaxis()
    for axis in panels[1].xaxis.set_major_formatter, panels[1].xaxis.set_minor_formatter:
        axis("{x:g}")
    title = printable(f"{rows[0].arch} on {rows[0].dataset}")
    canvas.suptitle(title if len(title) <= 90 else f"{title[:89]}…", parse_math=False)  # a folder may have any name
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    image = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # about letters of a folder's name that the font lacks
        canvas.savefig(image, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(canvas)
    return image.getvalue()


def curve(rows: list[Row], x: str, y: str) -> tuple[list[float], list[float], list[float]]:
    """Points and error bars of one line of the figure, by sparsity."""
    points = defaultdict(list)
    for row in rows:
        points[row.sparsity].append(row)
    xs, ys, bars = [], [], []
    for _, same in sorted(points.items()):
        values = [getattr(row, y) for row in same]
        xs.append(statistics.mean(getattr(row, x) for row in same))
        ys.append(statistics.mean(values))
        bars.append(statistics.stdev(values) if len(same) > 1 else same[0].accuracy_margin)
    return xs, ys, bars


def line_label(mode: str, kind: tuple[str, str, str, int], kinds: list[tuple[str, str, str, int]]) -> str:
    """A name for one of `kinds` (network, allocation, recipe, epoch rewound to) that distinguishes it."""
    arch, allocation, retrain, rewind = kind
    parts = [arch] if len({other[0] for other in kinds}) > 1 else []
    parts += [mode] if allocation == "global" else [mode, allocation]
    parts += [retrain] if retrain and len({other[2:] for other in kinds}) > 1 else []
    return ", ".join(parts + ([f"rewound to {rewind}"] if rewind else []))
