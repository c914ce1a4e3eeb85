"""Train a ResNet on CIFAR-10, zero most of its weights by magnitude, retrain what is left.

python main.py                                        train the dense network
python main.py -pr 0.9 -shot iter                     prune it to 90 % in steps
python main.py -pr 0.5 0.75 0.9 -shot single iter     the whole experiment
python test.py                                        reload every checkpoint, report
"""

import signal

if __name__ == "__main__":  # until there is something to save, Ctrl-C just ends it: imports take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

import data
import engine
import models
import pruning
import store
import utils

DENSE = "ckpt.pth"
EARLY = "ckpt_epoch{}.pt"  # weights of the dense training after that epoch
RECIPES = ("distilled", "adaptive", "plain")  # of retraining; the first is the default, and not part of names
RECIPE = 3  # a number for what they do, other than plain: what one began another cannot end
HIGH = 0.5  # of --lr, in the steps of iterative pruning, and what other retraining has at least at its height
AVERAGED = 0.05  # of the steps of retraining: over so many its weights are averaged


def parse_args() -> argparse.Namespace:
    parser = utils.Parser(description="Train, prune by magnitude, retrain.")
    pruned = parser.add_argument_group("pruning")
    pruned.add_argument(
        "-pr",
        nargs="+",
        action="extend",
        type=utils.sparsity,
        default=[],
        metavar="SPARSITY",
        help="target sparsities, 0.9 for 90 %%; 0 retrains and prunes nothing (default: train the dense network)",
    )
    pruned.add_argument(
        "-shot",
        nargs="+",
        action="extend",
        choices=("single", "iter"),
        default=[],
        help="prune at once, or in steps with retraining between them",
    )
    pruned.add_argument(
        "--allocation",
        choices=pruning.ALLOCATIONS,
        default="global",
        help="how many zeros each layer gets: by one threshold over all; the same share, but first and last layer "
        "dense; by the layer's shape (Evci et al. 2020); by one threshold of LAMP scores (Lee et al. 2021)",
    )
    pruned.add_argument(
        "--retrain-epochs", type=utils.positive_int, default=20, metavar="N", help="single: epochs after pruning"
    )
    pruned.add_argument(
        "--step",
        type=utils.fraction,
        default=0.11,
        metavar="FRACTION",
        help="iter: share of the remaining weights that a step prunes",
    )
    pruned.add_argument(
        "--step-epochs", type=utils.positive_int, default=5, metavar="N", help="iter: epochs after each step"
    )
    pruned.add_argument(
        "--final-epochs", type=utils.positive_int, default=100, metavar="N", help="iter: epochs after the last step's"
    )
    pruned.add_argument(
        "--retrain",
        choices=RECIPES,
        default=RECIPES[0],
        help="adaptive: from a learning rate by what pruning took away straight down to 0 (Zimmer et al. 2023); "
        "distilled (the default): the same, with the dense network as teacher (Hinton et al. 2015); plain: as dense "
        "training",
    )
    pruned.add_argument(
        "--rewind",
        type=utils.positive_int,
        metavar="EPOCH",
        help="iter: after each pruning put the weights that are left back to what they were after this epoch of the "
        "dense training, which has to be given it too (lottery tickets, Frankle et al. 2020)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--arch", choices=models.ARCHITECTURES, default="resnet18", help="network")
    training.add_argument(
        "--epochs", type=utils.positive_int, default=200, metavar="N", help="epochs of the dense network"
    )
    training.add_argument(
        "--lr",
        type=utils.positive_float,
        default=0.1,
        help="learning rate at the start of dense training, a cosine takes it to 0; retraining has at most that",
    )
    training.add_argument("--batch-size", type=utils.positive_int, default=128, metavar="N", help="images a step")
    training.add_argument(
        "--seed", type=utils.seed, default=0, help="initial weights, order and augmentation of the images"
    )
    utils.add_data_arguments(parser, "cifar10", 32)
    utils.add_device_arguments(parser, "of training; auto is bf16 where the processor has it")
    files = parser.add_argument_group("files")
    files.add_argument(
        "--checkpoint-dir", type=Path, default=Path("checkpoint"), metavar="DIR", help="where results go"
    )
    files.add_argument("-r", "--resume", action="store_true", help="go on where an interrupted run stopped")
    files.add_argument("--force", action="store_true", help="make results again that are there")
    args = parser.parse_args()
    if bool(args.pr) != bool(args.shot):
        parser.error("-pr and -shot go together: what sparsity, and how to get there")
    if args.rewind and "single" in args.shot:
        parser.error("argument --rewind: -shot single does not go back")
    if args.rewind and args.rewind >= args.epochs:
        parser.error(f"argument --rewind: {args.rewind} is not before the last of {args.epochs} epochs")
    for flag, values in ("-pr", [result_name(s, "", "", "", None) for s in args.pr]), ("-shot", args.shot):
        if len(set(values)) < len(values):
            parser.error(f"argument {flag}: the same value twice")
    return args


def main() -> None:
    args = parse_args()
    device = utils.choose_device(args.device)
    utils.set_up(device)
    images = data.load(args.dataset, args.data_dir, args.image_size, args.val_fraction)
    lab = Lab(args, images, device)
    if lab.another_waits:
        for name, settings in lab.asked.items():
            lab.skip(name, settings)
        print(f"{args.checkpoint_dir}: an interrupted run with other settings waits")
        return
    dense = train_dense(lab)
    if "single" in args.shot:
        for sparsity in args.pr:
            prune_one_shot(lab, dense, sparsity)
    if "iter" in args.shot:
        prune_iteratively(lab, dense, sorted(args.pr))
    lab.directory.close()


def train_dense(lab: "Lab") -> dict:
    """Make ckpt.pth if it is not there; return it."""
    settings = lab.dense_settings
    path = lab.directory.path / DENSE
    if lab.args.pr and lab.directory.has(DENSE):
        dense = lab.load_dense()
        print(
            f"pruning starts from {path}, {lab.measured} accuracy {dense['acc']:.2f} %"
            f"{lab.other_settings(dense, lab.settings)}"
        )
        return dense
    if lab.args.pr:
        why = "is to be made again" if path.exists() else "is missing"
        print(f"{path} {why}: training the dense network first")
    elif lab.skip(DENSE, settings):
        return lab.load_dense()
    state = lab.directory.kept("dense", settings) if lab.args.rewind else None
    early = store.load(lab.early_path) if state and lab.early_path.exists() else None
    kept_early = isinstance(early, dict) and early.get("settings") == settings
    if state and state["epoch"] >= lab.args.rewind and not kept_early:
        raise utils.Failure(
            f"argument --rewind: the interrupted training is past epoch {lab.args.rewind} and did not keep its "
            "weights: --force without -r starts again"
        )
    torch.manual_seed(utils.derive_seed(lab.args.seed, "initial weights"))
    network = lab.place(models.build(lab.args.arch, len(lab.images.classes)))

    def keep_early(epoch: int) -> None:
        if epoch == lab.args.rewind:
            store.save(lab.early_path, {"net": store.plain_state(network), "settings": settings})

    history = lab.train(network, "dense", lab.args.epochs, settings, after_epoch=keep_early)
    lab.finish(DENSE, network, settings, history)
    lab.directory.forget("dense")
    return lab.load_dense()


def prune_one_shot(lab: "Lab", dense: dict, sparsity: float) -> None:
    """Prune the dense network to `sparsity` at once, retrain, save."""
    result, stage = lab.result_name(sparsity, "single"), f"{100 * sparsity:g}percent_single"
    settings = lab.pruned_settings("single", sparsity, dense)
    if lab.skip(result, settings):
        return
    network = lab.place(store.network_of(dense))
    masks = pruning.choose(network, round(sparsity * lab.weights), allocation=lab.args.allocation)
    recipe = lab.recipe(network, masks, lab.args.retrain_epochs, dense)
    before = lab.accuracy_after_pruning(network, masks)
    history = lab.train(network, stage, lab.args.retrain_epochs, settings, masks, recipe)
    lab.finish(result, network, settings, history, dense, before)
    lab.directory.forget(stage)


def prune_iteratively(lab: "Lab", dense: dict, targets: list[float]) -> None:
    """Prune in steps of `--step` of the weights left, retraining after each, to every one of the ascending
    `targets`. The steps that targets have in common are the trunk, made once; each target branches off.

    A target of 0, the control, has one step of as many epochs as all those of the largest target, of 90 % when alone;
    where weights are put back after each step, as many as one, because others lose what they learnt in the rest.
    """
    args = lab.args
    steps = lab.pruned_settings("iter", None, dense)
    todo = {}
    for sparsity in targets:
        settings = lab.pruned_settings("iter", sparsity, dense)
        if not lab.skip(lab.result_name(sparsity, "iter"), settings):
            todo[sparsity] = settings
    if not todo:
        return
    early = lab.early_weights(dense) if args.rewind else None
    trunk = lab.directory.kept("iter_trunk", steps)
    if trunk:  # what a kill between writing it and this left
        lab.directory.forget(*(f"iter_step{step}" for step in range(1, trunk["step"] + 1)))
    # What the trunk of an interrupted run is past begins anew, and replaces it: so that comes last.
    begun = trunk["step"] if trunk else 0
    for sparsity in sorted(todo, key=lambda target: len(pruning.levels(lab.weights, target, args.step)) <= begun):
        settings = todo[sparsity]
        *shared, last = pruning.levels(lab.weights, sparsity, args.step)
        if trunk is None or trunk["step"] > len(shared):
            trunk = {"step": 0, "net": dense["net"], "masks": None, "history": []}
        if trunk["step"] < len(shared) and trunk.get("targets") != targets:
            # Before the first step, so that what an interrupted run asked for, and which trunk is its, is known.
            trunk["targets"] = targets
            lab.directory.keep("iter_trunk", steps, trunk)
        network = lab.place(store.network_of(dense | trunk))
        masks, history = trunk["masks"], trunk["history"]
        for step, zeros in enumerate(shared[trunk["step"] :], trunk["step"] + 1):
            stage = f"iter_step{step}"
            masks = pruning.choose(network, zeros, masks, args.allocation)
            recipe = lab.recipe(network, masks, args.step_epochs, dense, more_follows=True)
            if early:
                network.load_state_dict(early)
            history = history + lab.train(network, stage, args.step_epochs, steps, masks, recipe)
            trunk = trunk | {"step": step, "net": store.plain_state(network), "masks": masks, "history": history}
            lab.directory.keep("iter_trunk", steps, trunk)
            lab.directory.forget(stage)
        masks = pruning.choose(network, last, masks, args.allocation)
        recipe = lab.recipe(network, masks, settings["step_epochs"], dense, more_follows=True)
        before = lab.accuracy_after_pruning(network, masks)
        if early:
            network.load_state_dict(early)
        stages = [f"{100 * sparsity:g}percent_iter_{part}" for part in ("last_step", "final")]
        history = history + lab.train(network, stages[0], settings["step_epochs"], settings, masks, recipe)
        recipe = lab.recipe(network, masks, args.final_epochs, dense)
        history = history + lab.train(network, stages[1], args.final_epochs, settings, masks, recipe)
        lab.finish(lab.result_name(sparsity, "iter"), network, settings, history, dense, before)
        lab.directory.forget(*stages)
    lab.directory.forget("iter_trunk")


def result_name(sparsity: float, mode: str, allocation: str, retrain: str, rewind: int | None) -> str:
    """The file of a pruned network: 90percent_iter_ckpt.pth; what is not the default is part of it, as _erk_plain."""
    choices = [choice for choice in (allocation, retrain) if choice not in ("global", RECIPES[0])]
    choices += [f"rewind{rewind}"] if rewind else []
    return "_".join([f"{100 * sparsity:g}percent", mode, *choices, "ckpt.pth"])


class Lab:
    """What the stages of one command share: images, device, settings, and the directory of results."""

    def __init__(self, args: argparse.Namespace, images: data.Dataset, device: torch.device):
        self.args, self.images, self.device = args, images, device
        self.dtype = utils.choose_dtype(args.precision, device)
        self.measured = "validation" if args.val_fraction else "test"
        self.settings = {
            "arch": args.arch,
            "dataset": images.identity,
            "image_size": args.image_size,
            "val_fraction": args.val_fraction,
            "lr": args.lr,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "precision": str(self.dtype).removeprefix("torch."),
        }
        with torch.device("meta"):
            network = models.build(args.arch, len(images.classes))
        self.weights = sum(weight.numel() for weight in pruning.prunable(network).values())
        for sparsity in args.pr:
            zeros, most = round(sparsity * self.weights), pruning.most_zeros(network, args.allocation)
            if zeros == self.weights:
                raise utils.Failure(f"argument -pr: {sparsity} of {self.weights} weights leaves none")
            if zeros > most:
                raise utils.Failure(
                    f"argument -pr: {sparsity} of {self.weights} weights is more than the {most} that "
                    f"--allocation {args.allocation} can prune"
                )
        self.dense_settings = self.settings | {"epochs": args.epochs}
        self.asked = {} if args.pr else {DENSE: self.dense_settings}
        for mode, sparsity in itertools.product(args.shot, args.pr):
            self.asked[self.result_name(sparsity, mode)] = self.pruned_settings(mode, sparsity)
        for name in {DENSE, *self.asked}:
            self.check_same_experiment(args.checkpoint_dir / name, replaced=args.force and name in self.asked)
        # Results; the trunk with masks, the last step, a stage with momentum and average, the next versions of both.
        network_bytes = 4 * sum(value.numel() for value in network.state_dict().values())
        needed = (10 + len({DENSE, *self.asked})) * network_bytes
        self.directory = store.Directory(args.checkpoint_dir, list(self.asked), args.resume, args.force, needed)
        self.another_waits = self.check_unfinished()
        missing = not all(map(self.directory.has, self.asked))
        if missing and args.pr and args.rewind and self.directory.has(DENSE):
            self.early_weights(store.load_checkpoint(args.checkpoint_dir / DENSE))
        self.directory.begin()
        self.train_batches = data.TrainBatches(images, args.batch_size, args.seed, device)
        self.test_batches = data.TestBatches(images, device)
        utils.stop_on_signals()

    def check_same_experiment(self, path: Path, replaced: bool) -> None:
        """Failure when the file at `path` is of another network or data set, which must not be mixed or lost.

        A broken file may be `replaced`, if that is what the user asked for."""
        if not path.exists():
            return
        try:
            checkpoint = store.load_checkpoint(path)
        except utils.Failure:
            if replaced:
                return
            raise
        mine = {name: self.settings[name] for name in ("arch", "dataset", "image_size", "val_fraction")}
        mine["classes"] = len(self.images.classes)
        # A file that does not say otherwise was trained on all images, those that are held out, too.
        theirs = mine | {"val_fraction": 0.0} | checkpoint.get("settings", {})
        theirs |= {"arch": checkpoint["arch"], "classes": len(checkpoint["net"]["linear.weight"])}
        if other := utils.difference(theirs, mine):
            raise utils.Failure(f"{path} is of another experiment ({other}): choose another --checkpoint-dir")

    def check_unfinished(self) -> bool:
        """Failure, before any work, when an interrupted stage is not one that this command can go on with; but True
        when it has nothing to do, as all results asked for are there."""
        args, dense = self.args, None
        if args.pr and self.directory.has(DENSE):
            dense = store.load_checkpoint(args.checkpoint_dir / DENSE)
            dense["digest"] = store.digest(dense["net"])
        for path, saved, state in self.directory.unfinished():
            mode, sparsity = saved.get("mode"), saved.get("sparsity")
            # The steps of a trunk are for certain targets, and others would go past them or begin anew.
            targets = state.get("targets", []) if sparsity is None else [sparsity]
            choices = (saved.get("allocation", "global"), saved.get("retrain", "plain"), saved.get("rewind"))
            results = [result_name(target, mode, *choices) for target in targets] if mode else [DENSE]
            if results and all(map(self.directory.has, results)):
                if not mode and state.get("epoch") != saved.get("epochs"):
                    raise utils.Failure(f"{path} is an interrupted training, and {DENSE} is there: remove one of them")
                self.directory.over.append(path.stem)  # a kill between writing the one and deleting the other left it
                continue
            mine = self.pruned_settings(mode, sparsity, dense) if mode else self.dense_settings
            mine = {name: value for name, value in mine.items() if name in saved or name in self.choices}
            waiting = [target for target in targets if target not in args.pr]
            if mode and mode not in args.shot:
                mine["mode"] = " ".join(args.shot) or "dense"
            elif any(not self.directory.has(self.result_name(target, mode)) for target in waiting):
                saved = saved | {"sparsity": " ".join(map(str, waiting))}
                mine["sparsity"] = " ".join(map(str, args.pr))
            if other := utils.difference(saved, mine):
                if all(map(self.directory.has, self.asked)):
                    return True
                raise utils.Failure(f"{path} was made with other settings: {other}")
        return False

    def skip(self, result: str, settings: dict) -> bool:
        """Whether a result is there already; if so, say so, and what differs from what was asked."""
        if not self.directory.has(result):
            return False
        path = self.directory.path / result
        other = self.other_settings(store.load_checkpoint(path), settings)
        print(f"{path} is there already{other}: skipped, --force makes it again")
        return True

    def other_settings(self, checkpoint: dict, settings: dict) -> str:
        """What a checkpoint was made with instead of `settings`, in brackets; nothing when they agree."""
        if "settings" not in checkpoint:
            return " (made by another program)"
        other = utils.difference(checkpoint["settings"], settings)
        return f" ({other})" if other else ""

    def load_dense(self) -> dict:
        """The dense checkpoint, with its fingerprint and, where another program wrote it, its accuracy by our count."""
        dense = store.load_checkpoint(self.directory.path / DENSE)
        if "settings" not in dense or "acc" not in dense:
            dense["acc"] = engine.evaluate(self.place(store.network_of(dense)), self.test_batches).accuracy
        return dense | {"digest": store.digest(dense["net"])}

    @property
    def early_path(self) -> Path:
        """Where the weights are that --rewind goes back to."""
        return self.args.checkpoint_dir / EARLY.format(self.args.rewind)

    def early_weights(self, dense: dict) -> dict:
        """The weights that --rewind goes back to; Failure without those of the training of `dense`."""
        again = (
            f"main.py --rewind {self.args.rewind} --force, without -pr, trains the dense network again and keeps them"
        )
        if not self.early_path.exists():
            raise utils.Failure(f"{self.early_path} is missing: {again}")
        early = store.load(self.early_path)
        good = isinstance(early, dict) and isinstance(early.get("net"), dict)
        good = good and early.get("settings") == dense.get("settings") and early["net"].keys() == dense["net"].keys()
        good = good and all(
            isinstance(value, torch.Tensor) and value.shape == dense["net"][name].shape and value.isfinite().all()
            for name, value in early["net"].items()
        )
        if not good:
            raise utils.Failure(f"{self.early_path} is not of the training of {DENSE}: {again}")
        return early["net"]

    @property
    def choices(self) -> dict:
        """The settings of pruning that all its results have in common."""
        args = self.args
        recipe = 1 if args.retrain == "plain" else RECIPE
        rewind = args.rewind or 0
        return {"allocation": args.allocation, "retrain": args.retrain, "recipe": recipe, "rewind": rewind}

    def pruned_settings(self, mode: str, sparsity: float | None, dense: dict | None = None) -> dict:
        """The settings of a result; without a sparsity those of the steps that iterative targets share. The dense
        network it is pruned from is one of them, when that is known."""
        args = self.args
        settings = self.settings | self.choices | {"mode": mode}
        if mode == "single":
            settings["retrain_epochs"] = args.retrain_epochs
        else:
            settings |= {"step": args.step, "step_epochs": args.step_epochs, "final_epochs": args.final_epochs}
        if sparsity is not None:
            settings["sparsity"] = sparsity
        if sparsity == 0 and mode == "iter" and not args.rewind:  # the control: see `prune_iteratively`
            settings["step_epochs"] *= len(pruning.levels(self.weights, max(args.pr, default=0) or 0.9, args.step))
        if dense:
            settings["parent"] = dense["digest"]
            # What does not say how long it was trained is taken to have had --epochs: see `recipe`.
            settings |= {} if "epochs" in dense.get("settings", {}) else {"epochs": args.epochs}
        return settings

    def result_name(self, sparsity: float, mode: str) -> str:
        return result_name(sparsity, mode, self.args.allocation, self.args.retrain, self.args.rewind)

    def place(self, network: nn.Module) -> nn.Module:
        """The network on the device, in the layout that convolutions are fastest in."""
        return network.to(self.device, memory_format=torch.channels_last)

    def recipe(
        self, network: nn.Module, masks: pruning.Masks, epochs: int, dense: dict, more_follows: bool = False
    ) -> dict:
        """How to retrain for so many epochs what `masks` leave of a network: arguments of engine.fit.

        The adaptive learning rate is that of Zimmer, Spiegel and Pokutta (How I learned to stop worrying and love
        retraining, 2023): the larger the share of the weights' norm that goes, beyond what as many random weights
        would take, the higher it starts, at most at --lr. At least it is, with them, the rate that the dense training
        would have so many epochs before its end, were it linear; here half of --lr, when that is not more than five
        times as much: a higher rate gains where pruning took little, too (results/README.md).

        Where pruning or training follows, nothing is gained by settling: as in gradual pruning (Zhu and Gupta 2018)
        the rate is high all the time, and goes down once, at the end.
        """
        if self.args.retrain == "plain":
            return {"lr": self.args.lr}
        recipe = {"nesterov": True}
        if self.args.retrain == "distilled":
            recipe["teacher"] = self.place(store.network_of(dense)).eval()
        if more_follows and not self.args.rewind:
            return recipe | {"lr": HIGH * self.args.lr, "schedule": engine.constant}
        if not more_follows:
            recipe["average"] = AVERAGED
        if self.args.rewind:  # weights that are put back have all to learn, whatever pruning took
            return recipe | {"lr": self.args.lr, "schedule": engine.linear}
        left = sum(int(weight.count_nonzero()) for weight in pruning.prunable(network).values())
        share = 1 - sum(int(mask.sum()) for mask in masks.values()) / max(left, 1)
        change = pruning.change(network, masks) / share**0.5 if share > 0 else 0.0
        least = min(HIGH, 5 * epochs / dense.get("settings", {}).get("epochs", self.args.epochs))
        return recipe | {"lr": self.args.lr * min(max(change, least), 1.0), "schedule": engine.linear}

    def accuracy_after_pruning(self, network: nn.Module, masks: pruning.Masks) -> float:
        """Prune, and measure before anything is retrained; percent."""
        pruning.apply(network, masks)
        return engine.evaluate(network, self.test_batches).accuracy

    def train(
        self,
        network: nn.Module,
        stage: str,
        epochs: int,
        settings: dict,
        masks: pruning.Masks | None = None,
        recipe: dict | None = None,
        **more,
    ) -> list[dict]:
        """Train in place, from where an interrupted run stopped; with `masks`, pruned weights are zero and stay it."""
        begin = time.monotonic()
        recipe, after_step = recipe or {"lr": self.args.lr}, {}
        if masks:
            pruning.apply(network, masks)
            after_step = {"after_step": pruning.keeper(network, masks)}
        history = engine.fit(
            network,
            self.train_batches,
            stage=stage,
            epochs=epochs,
            **recipe,
            **more,
            dtype=self.dtype,
            state=self.directory.kept(stage, settings),
            keep=lambda state: self.directory.keep(stage, settings, state),
            **after_step,
        )
        if masks:
            pruning.apply(network, masks)
        found = pruning.sparsity(network)
        seconds = timedelta(seconds=round(time.monotonic() - begin))
        last = history[-1]
        print(
            f"{stage}: sparsity {100 * found:.2f} %, {epochs} epochs in {seconds}, learning rate up to "
            f"{recipe['lr']:.4f}, training loss {last['loss']:.4f}, accuracy {last['accuracy']:.2f} %"
        )
        return [entry | {"sparsity": found, "peak_lr": recipe["lr"]} for entry in history]

    def finish(
        self,
        result: str,
        network: nn.Module,
        settings: dict,
        history: list[dict],
        dense: dict | None = None,
        before: float | None = None,
    ) -> None:
        """Measure a network and write its checkpoint. `before`: accuracy before retraining."""
        score = engine.evaluate(network, self.test_batches)
        net = store.plain_state(network)
        if not all(value.isfinite().all() for value in net.values()):
            raise utils.Failure(f"{result} would hold values that are not finite: a smaller --lr may help", code=1)
        checkpoint = {
            "net": net,
            "acc": score.accuracy,
            "epoch": history[-1]["epoch"] - 1,  # an index, as pytorch-cifar counts
            "loss": score.loss,
            "zeros": sum(zeros for zeros, _ in pruning.count(network).values()),
            "classes": list(self.images.classes),
            "settings": settings,
            "history": history,
        }
        drop = ""
        if dense:
            checkpoint |= {"dense_acc": dense["acc"], "pruned_acc": before}
            drop = f", drop {dense['acc'] - score.accuracy:.2f} points"
        self.directory.finish(result, checkpoint)
        counts = pruning.multiply_adds(network, self.args.image_size).values()
        dense_count, nonzero = (sum(column) / 1e6 for column in zip(*counts))
        print(
            f"{self.directory.path / result}: {self.measured} accuracy {score.accuracy:.2f} %, loss {score.loss:.4f}"
            f"{drop}, {nonzero:,.1f} of {dense_count:,.1f} million multiply-adds"
        )


if __name__ == "__main__":
    utils.run(main)
