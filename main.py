"""Train a ResNet on CIFAR-10, zero most of its weights by magnitude, retrain what is left.

python main.py                                        train the dense network
python main.py -pr 0.9 -shot iter                     prune it to 90 % in steps
python main.py -pr 0.5 0.75 0.9 -shot single iter     the whole experiment
python test.py                                        reload every checkpoint, report
"""

import signal

if __name__ == "__main__":  # imports take seconds; until there is something to save, Ctrl-C just ends them
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import checkpoints
import data
import engine
import models
import profiles
import pruning
import report
import utils
from engine import Recipe
from run import Run
from stages import Stage

STEP_LR = 0.5  # of --lr, between the steps of iterative pruning
RETRAIN_LR = 0.65  # of --lr, at the peak of the retraining that ends every schedule
EMA = 0.05  # of the steps of that retraining: its weights are averaged over so many


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.Parser(description="Train, prune by magnitude, retrain.")
    add = parser.add_argument_group("pruning").add_argument
    add(
        "-pr",
        nargs="+",
        action="extend",
        type=utils.sparsity,
        default=[],
        metavar="SPARSITY",
        help="target sparsities, 0.9 for 90 %% (default: train the dense network)",
    )
    add(
        "-shot",
        nargs="+",
        action="extend",
        choices=("single", "iter"),
        default=[],
        help="prune at once, or in steps with retraining between them",
    )
    add("--control", action="store_true", help="also retrain the dense network by the same schedule, nothing pruned")
    add(
        "--allocation",
        choices=pruning.ALLOCATIONS,
        default="global",
        help="which weights: one threshold on the magnitude; the same sparsity in every layer but the first and last; "
        "by the layer's shape (Evci et al. 2020); one threshold on LAMP scores (Lee et al. 2021)",
    )
    add(
        "--macs",
        type=utils.share,
        metavar="SHARE",
        help="prune the weights that are multiplied often more than others, until at most this share of the dense "
        "network's multiply-adds is left",
    )
    add(
        "--ms",
        type=utils.milliseconds,
        metavar="MS",
        help="prune the weights that take the most time, until one image takes at most this by the profile of a device",
    )
    add(
        "--profile",
        type=Path,
        metavar="FILE",
        help=f"the file of deploy.py --profile for that device (default: {profiles.NAME} in the checkpoint directory)",
    )
    add("--exclude", nargs="+", action="extend", default=[], metavar="NAME", help="layers that stay dense")
    epochs = partial(add, type=utils.count, metavar="N")
    epochs("--retrain-epochs", default=20, help="single: epochs after pruning")
    add(
        "--step",
        type=utils.fraction,
        default=0.11,
        metavar="FRACTION",
        help="iter: fraction of the weights left that each step prunes",
    )
    epochs("--step-epochs", default=5, help="iter: epochs after each step")
    epochs("--final-epochs", default=100, help="iter: epochs of the final training, after the last step")
    add(
        "--retrain",
        choices=("distilled", "plain"),
        default="distilled",
        help="distilled: high linear learning rate, averaged weights, the dense network as teacher; plain: as dense",
    )
    add(
        "--rewind",
        type=utils.count,
        metavar="EPOCH",
        help="iter: after each step reset the weights that are left to those after this epoch of the dense training, "
        "which needs the flag too (lottery tickets, Frankle et al. 2020)",
    )
    add = parser.add_argument_group("training").add_argument
    add(
        "--arch",
        type=models.arch,
        default="resnet18",
        metavar="NAME",
        help=f"network: {', '.join(models.NAMES)}, or torchvision:NAME",
    )
    add("--epochs", type=utils.count, default=200, metavar="N", help="epochs of the dense network")
    add("--lr", type=utils.positive_float, default=0.1, help="highest learning rate")
    add("--batch-size", type=utils.count, default=128, metavar="N", help="images per optimizer step")
    add("--seed", type=utils.seed, default=0, help="seed of initial weights, image order and augmentation")
    images = utils.add_data_arguments(parser, "cifar10", 32)
    images.add_argument("--no-flip", action="store_true", help="never mirror training images: for letters and digits")
    utils.add_device_arguments(parser, "number format of training; auto is bf16 where it is faster, else fp32")
    add = parser.add_argument_group("files").add_argument
    add("--checkpoint-dir", type=utils.directory, default=Path("checkpoint"), metavar="DIR", help="where results go")
    add("-r", "--resume", action="store_true", help="accepted and not needed: the same command always resumes")
    add("--force", action="store_true", help="make these results again; the old ones become NAME.bak")
    add("--dry-run", action="store_true", help="print what would be done, with an estimate of the time")
    args = parser.parse_args(argv)
    if bool(args.pr) != bool(args.shot):
        parser.error("-pr and -shot go together: how sparse, and how to get there")
    if args.control and not args.pr:
        parser.error("--control needs -pr and -shot: it repeats their schedule")
    if args.macs and not args.pr:
        parser.error("--macs needs -pr and -shot: it limits the multiply-adds at an exact sparsity")
    if args.ms and not args.pr:
        parser.error("--ms needs -pr and -shot: it limits the time at an exact sparsity")
    if args.profile and not args.ms:
        parser.error("--profile needs --ms: it says how long the layers take")
    ways = ["--macs"] * bool(args.macs) + ["--ms"] * bool(args.ms) + ["--allocation"] * (args.allocation != "global")
    if len(ways) > 1:
        parser.error(f"{' and '.join(ways[:2])} exclude each other: both distribute the zeros over the layers")
    if args.rewind and "single" in args.shot:
        parser.error("argument --rewind: only -shot iter rewinds")
    if args.rewind and args.rewind >= args.epochs:
        parser.error(f"argument --rewind: {args.rewind} is not before the last of {args.epochs} epochs")
    for flag, values in ("-pr", [f"{value:.8g}" for value in args.pr]), ("-shot", args.shot):
        if len(set(values)) < len(values):
            parser.error(f"argument {flag}: the same value twice")
    return args


# --- The experiment ------------------------------------------------------------------------------------------------


def recipes(args: argparse.Namespace) -> tuple[Recipe, Recipe]:
    """How to retrain between the steps of iterative pruning, and at the end of every schedule."""
    if args.retrain == "plain":
        return Recipe(args.lr), Recipe(args.lr)
    if args.rewind:  # rewound weights are far from converged, so use the full learning rate
        return Recipe(args.lr, "linear", nesterov=True), Recipe(args.lr, "linear", nesterov=True, ema=EMA)
    # Between steps nothing is gained by settling: as in gradual pruning (Zhu and Gupta 2018) the rate stays high.
    step = Recipe(STEP_LR * args.lr, "constant", nesterov=True)
    return step, Recipe(RETRAIN_LR * args.lr, "linear", nesterov=True, ema=EMA)


def one_shot(run: Run, sparsity: float | None) -> Stage:
    """Prune the dense network at once, retrain. Without a sparsity it is the control: nothing is pruned."""
    _, retrain = recipes(run.args)
    zeros = run.all_zeros if sparsity is None else round(sparsity * run.weights)
    name = report.file_name("single", sparsity, run.args)
    epochs, control = run.args.retrain_epochs, sparsity is None
    settings = {"mode": "single", "sparsity": sparsity or 0.0, "retrain_epochs": epochs}
    settings |= run.limit.settings if run.limit and not control else {}
    return run.stage(name, run.dense, zeros, epochs, retrain, control=control, **settings)


def iterative(run: Run, sparsity: float, control: bool = False) -> Stage:
    """Prune in steps with retraining between them, then retrain longer. The control prunes nothing."""
    args, (step, retrain) = run.args, recipes(run.args)
    network = run.dense
    # With a limit, what a level may keep depends on where the steps lead.
    limit = run.limit.settings | {"sparsity": sparsity, "step": args.step} if run.limit and not control else {}
    for level, zeros in enumerate(pruning.schedule(run.weights, sparsity, args.step, run.zeros), 1):
        zeros = run.all_zeros if control else zeros
        name = f"level {level}, {zeros} zeros"
        settings = {"level": level, "step_epochs": args.step_epochs, **limit}
        network = run.stage(name, network, zeros, args.step_epochs, step, control=control, **settings)
    settings = limit | {"mode": "iter", "sparsity": sparsity, "step": args.step, "step_epochs": args.step_epochs}
    settings["final_epochs"] = args.final_epochs
    name = report.file_name("iter", sparsity, args, control)
    return run.stage(name, network, zeros, args.final_epochs, retrain, control=control, **settings)


def experiment(run: Run) -> list[Stage]:
    """The results that the command asks for, in the order in which they are made."""
    args = run.args
    targets = [one_shot(run, sparsity) for sparsity in args.pr if "single" in args.shot]
    targets += [one_shot(run, None)] if args.control and "single" in args.shot else []
    if "iter" in args.shot:
        targets += [iterative(run, sparsity) for sparsity in sorted(args.pr)]
        targets += [iterative(run, sparsity, control=True) for sparsity in sorted(args.pr) if args.control]
    return targets or [run.dense]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = utils.choose_device(args.device)
    utils.set_up(device, args.deterministic)
    images = data.load(args.dataset, args.data_dir, args.image_size, args.val_fraction, flip=not args.no_flip)
    run = Run(args, data.with_constants(images, args), device)
    targets = run.plan(experiment, args.force)
    if args.dry_run:
        print(report.plan(run, targets))
        return
    with run.work(targets), utils.stopping_on_signals():
        targets = run.plan(experiment, args.force)  # again, because another run may have ended just now
        if args.force:
            run.directory.set_aside(targets)
            targets = run.plan(experiment)
        print(run.summary())
        if todo := run.directory.all_unfinished([run.dense, *targets]):
            print(run.start(todo))
        if args.pr and not run.checkpoint:
            print(f"{run.directory.file(run.dense)} is missing: training the dense network first")
            make(run, run.dense, targets)
            targets = run.plan(experiment)  # again, because the identity of the dense network is known now
        if args.pr and any(map(run.directory.unfinished, targets)):
            print(run.measure_dense())
        run.tidy(targets)
        for target in targets:
            if not run.directory.unfinished(target):
                print(f"{run.directory.file(target)} is finished")
            for stage in run.directory.unfinished(target):
                make(run, stage, targets)


def make(run: Run, stage: Stage, targets: list[Stage]) -> None:
    """Make a stage from its parent's file: prune, measure, train from where it stopped, measure, write."""
    args, directory = run.args, run.directory
    parent = directory.load_parent(stage)
    torch.manual_seed(utils.derive_seed(args.seed, "initial weights"))
    fresh = models.build(args.arch, len(run.images.classes)) if parent is None else checkpoints.build_network(parent)
    network = engine.to_device(fresh, run.device)
    state = directory.load_state(stage, network, len(run.train_batches))
    if state:
        print(f"{stage.name}: resumes after {state['epoch']} of {utils.counted(stage.epochs, 'epoch')}")
    recipe, masks, pruned_acc = stage.recipe, {}, None
    if parent is not None:
        exclude = stage.settings["exclude"].split()
        zeros = sum(zeros for zeros, _ in pruning.count_zeros(network, exclude).values())
        masks = run.compute_masks(stage, network, max(zeros, stage.zeros))
        pruning.apply(network, masks)
        pruned_acc = parent.get("pruned_acc") if zeros >= stage.zeros else (state or {}).get("pruned_acc")
        pruned_acc = run.evaluate(network).accuracy if pruned_acc is None else pruned_acc
        if run.early and stage.is_level:
            network.load_state_dict(run.early)
            pruning.apply(network, masks)
        recipe = replace(recipe, teacher=run.teacher if args.retrain == "distilled" else None)
    directory.restart_log(stage, state["history"] if state else [])
    history = engine.fit(
        network,
        run.train_batches,
        recipe,
        stage.epochs,
        stage.name,
        dtype=run.dtype,
        after_step=pruning.mask_fn(network, masks),
        after_epoch=partial(run.after_epoch, stage, network),
        state=state,
        save_state=lambda state: directory.save_state(stage, state | {"pruned_acc": pruned_acc}),
    )
    pruning.apply(network, masks)
    score = run.evaluate(network)
    checkpoint = run.checkpoint_of(stage, network, history, score, parent)
    if run.checkpoint and parent is not None:
        checkpoint |= {"dense_acc": run.checkpoint["acc"], "pruned_acc": pruned_acc}
    checkpoints.save(directory.file(stage), checkpoint)
    directory.state_file(stage).unlink(missing_ok=True)
    directory.tidy(targets)
    print(report.summary(run, stage, checkpoint))


if __name__ == "__main__":
    utils.run(main)
