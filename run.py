"""What the stages of one command share: images, device, settings, the dense network they start from."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import checkpoints
import data
import engine
import limits
import models
import pruning
import utils
from engine import Recipe
from stages import DENSE, Directory, Stage, check_experiment
from utils import Failure, counted


def report_hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else counted(round(60 * hours), "minute")


class Run:
    """What the stages of one command share: images, device, settings, the dense network.

    `checkpoint` is that of ckpt.pth when the command prunes it, None until it exists. `weights` counts the weights
    that pruning may zero, `zeros` those of them that are zero in the dense network, `all_zeros` those of all layers.
    """

    def __init__(self, args: argparse.Namespace, images: data.Dataset, device: torch.device):
        self.args, self.images, self.device = args, images, device
        self.directory = Directory(args.checkpoint_dir)
        self.dtype = utils.choose_dtype(args.precision, device)
        self.measured = "validation" if args.val_fraction else "test"
        self.mean, self.std = images.mean_and_std()
        self.settings: dict[str, Any] = {
            "arch": args.arch,
            "dataset": images.identity,
            "image_size": args.image_size,
            "val_fraction": args.val_fraction,
            "classes": len(images.classes),
            "lr": args.lr,
            "batch_size": args.batch_size,
            "seed": args.seed,
            "precision": str(self.dtype).removeprefix("torch."),
            **images.settings,
        }
        self.checkpoint: dict | None = None
        self.digest = ""  # of the weights of ckpt.pth
        self.early: dict[str, Tensor] | None = None
        self.zeros, self.all_zeros = 0, 0
        self.epochs_left = 0
        with torch.device("meta"):
            network = models.build(args.arch, len(images.classes))
        try:
            self.weights = sum(weight.numel() for weight in pruning.prunable(network, args.exclude).values())
        except ValueError as error:
            raise Failure(f"argument --exclude: {error}") from None
        if not self.weights:
            raise Failure("argument --exclude: this leaves no layer to prune")
        try:
            last = len(images.training_images().labels) % args.batch_size or args.batch_size
            models.check_size(args.arch, len(images.classes), args.image_size, last)
        except ValueError as error:
            raise Failure(f"argument --image-size: {error}") from None
        self.limit = limits.of(args, network)
        most = pruning.max_zeros(network, args.allocation, args.exclude)
        for sparsity in args.pr:
            if round(sparsity * self.weights) > most:
                raise Failure(
                    f"argument -pr: {sparsity} of {self.weights} weights is more than --allocation "
                    f"{args.allocation} can prune, {most}"
                )

    # --- which stages there are ---

    @property
    def dense(self) -> Stage:
        """The stage of the dense network."""
        recipe = Recipe(self.args.lr)
        settings = self.settings | {"epochs": self.args.epochs, **recipe.settings()}
        return Stage(DENSE, None, 0, self.args.epochs, recipe, settings, digest=self.digest)

    def stage(
        self, name: str, parent: Stage, zeros: int, epochs: int, recipe: Recipe, *, control: bool = False, **more
    ) -> Stage:
        """A stage after the dense one, with every setting that its result depends on; `more` has its own flags."""
        args, dense = self.args, self.digest
        settings = self.settings | {"retrain": args.retrain, "rewind": args.rewind or 0, "control": control}
        settings |= {
            "allocation": "" if control else args.allocation,
            "exclude": "" if control else " ".join(sorted(set(args.exclude))),
        }
        settings |= {"zeros": zeros, **recipe.settings(), **more}
        settings |= {"dense": dense, "teacher": dense if args.retrain == "distilled" else ""}
        settings |= {"parent": parent.identity if dense else ""}
        return Stage(name, parent, zeros, epochs, recipe, settings, is_level="level" in more)

    def plan(self, experiment: Callable[["Run"], list[Stage]], force: bool = False) -> list[Stage]:
        """The results that the command asks for. Failure, before any work, when something is in their way."""
        self.directory.check_places([self.dense], [self.early_path] if self.args.rewind else [])
        self.load_dense()
        try:
            targets = experiment(self)
        except ValueError as error:
            raise Failure(f"argument --step: {error}") from None
        self.directory.check_places(targets, [])
        if self.args.pr and not self.checkpoint:
            self.directory.check(self.dense, force=False)
        for target in targets:
            self.directory.check(target, force)
        self.check_zeros(targets)
        self.check_limit(targets)
        self.load_early(targets, force)
        self.directory.find_kept_levels([self.dense, *targets])
        return targets

    def load_dense(self) -> None:
        """Take ckpt.pth as it is, if pruning starts from it."""
        path = self.args.checkpoint_dir / DENSE
        if self.args.pr and path.exists() and self.checkpoint is None:
            self.checkpoint = checkpoints.load_checkpoint(path)
            check_experiment(path, self.checkpoint, self.settings)
            self.check_constants(path, self.checkpoint)
            self.digest = checkpoints.digest(self.checkpoint["net"])
            network = checkpoints.build_network(self.checkpoint)
            self.zeros, self.all_zeros = (
                sum(zeros for zeros, _ in pruning.count_zeros(network, exclude).values())
                for exclude in (self.args.exclude, ())
            )

    def check_constants(self, path: Path, checkpoint: dict) -> None:
        """Failure when the dense network is for images that are normalized by other constants than this run's."""
        own = [*checkpoint.get("mean", self.mean), *checkpoint.get("std", self.std)]
        if max(abs(a - b) for a, b in zip(own, [*self.mean, *self.std])) > 1e-4:
            mean, std = (" ".join(f"{value:.7g}" for value in checkpoint[name]) for name in ("mean", "std"))
            flags = f"--mean {mean} --std {std}"
            raise Failure(f"{path} is for images that are normalized by other constants: {flags} are its own")

    def check_zeros(self, targets: list[Stage]) -> None:
        """Failure when the dense network has more zeros than asked for, or has them in the wrong layers."""
        if self.checkpoint is None or not self.zeros:
            return
        for sparsity in self.args.pr:
            if round(sparsity * self.weights) < self.zeros:
                raise Failure(
                    f"argument -pr: {DENSE} has {100 * self.zeros / self.weights:.2f} % zeros already, "
                    f"which is more than {sparsity:g} asks for"
                )
        if self.limit:
            return  # check_limit finds whether these zeros allow it
        network = checkpoints.build_network(self.checkpoint)
        for first in {stage.zeros: stage for stage in (target.ancestors()[0] for target in targets)}.values():
            try:
                if not first.settings["control"]:
                    self.compute_masks(first, network, first.zeros)
            except ValueError as error:
                raise Failure(f"argument --allocation: {error}") from None

    def check_limit(self, targets: list[Stage]) -> None:
        """Failure when a target cannot keep the limit of the command."""
        if not self.limit:
            return
        with torch.device("meta"):
            network = models.build(self.args.arch, len(self.images.classes))
        network = checkpoints.build_network(self.checkpoint) if self.checkpoint else network
        for target in targets:
            if not target.settings["control"]:
                self.limit.check(network, self.levels(target), self.args.exclude)

    def levels(self, stage: Stage) -> list[int]:
        """The zeros after each level of the schedule that a stage belongs to."""
        if "step" not in stage.settings:
            return [stage.zeros]
        return pruning.schedule(self.weights, stage.settings["sparsity"], stage.settings["step"], self.zeros)

    def compute_masks(self, stage: Stage, network: nn.Module, zeros: int) -> pruning.Masks:
        """Which weights of a network a stage keeps, at so many zeros."""
        exclude = stage.settings["exclude"].split()
        if not self.limit or stage.settings["control"]:
            return pruning.compute_masks(network, zeros, stage.settings["allocation"], exclude)
        assert self.checkpoint is not None
        dense = checkpoints.build_network(self.checkpoint)
        left = [level for level in self.levels(stage) if level >= stage.zeros]
        return self.limit.compute_masks(dense, network, zeros, left, exclude)

    # --- the weights to rewind to ---

    @property
    def early_path(self) -> Path:
        return self.args.checkpoint_dir / f"ckpt_epoch{self.args.rewind}.pt"

    def load_early(self, targets: list[Stage], force: bool) -> None:
        """Read the weights to rewind to. Failure where they are needed and do not belong to the dense network."""
        path, state = self.args.checkpoint_dir / DENSE, self.directory.state_file(self.dense)
        unfinished = any(map(self.directory.unfinished, targets))
        if not self.args.rewind or (self.args.pr and self.checkpoint and not unfinished and not force):
            return
        if self.checkpoint or (path.exists() and not force):
            settings = (self.checkpoint or checkpoints.load_checkpoint(path)).get("settings")
            advice = f"main.py --rewind {self.args.rewind} --force, without -pr, trains the dense network again"
        elif (
            state.exists()
            and (self.args.pr or not force)
            and self.directory.epochs_done(self.dense) >= self.args.rewind
        ):
            settings, advice = self.dense.settings, f"delete {state} to start the dense training again"
        else:
            return  # the dense training will write them
        if not self.early_path.exists():
            raise Failure(f"{self.early_path}, the weights to rewind to, is missing: {advice}")
        early = checkpoints.load(self.early_path)
        good = isinstance(early, dict) and checkpoints.plain_settings(early.get("settings"))
        net = early.get("net") if isinstance(early, dict) and good and early["settings"] == settings else None
        with torch.device("meta"):
            expected = models.build(self.args.arch, len(self.images.classes)).state_dict()
        if not isinstance(net, dict) or not checkpoints.same_form(net, expected):
            raise Failure(f"{self.early_path} is not of the training of {DENSE}: {advice}")
        self.early = net

    # --- at work ---

    @contextlib.contextmanager
    def work(self, targets: list[Stage]) -> Iterator[None]:
        """Hold the directory for this run. Failure when it is in use or the disk is too full."""
        with torch.device("meta"):
            state = models.build(self.args.arch, len(self.images.classes)).state_dict()
        # A state with momentum and average is three networks, and is written beside the one before it.
        files = [stage for target in targets for stage in self.directory.unfinished(target)]
        copies = 8 + len(targets) if files else 0
        self.directory.open(4 * copies * sum(value.numel() for value in state.values()))
        try:
            yield
        finally:
            self.directory.close()

    @cached_property
    def train_batches(self) -> data.TrainBatches:
        return data.TrainBatches(self.images, self.args.batch_size, self.args.seed, self.device)

    @cached_property
    def test_batches(self) -> data.TestBatches:
        return data.TestBatches(self.images.test, self.mean, self.std, self.device)

    @cached_property
    def teacher(self) -> nn.Module:
        """The dense network, for distillation."""
        assert self.checkpoint is not None
        network = checkpoints.build_network(self.checkpoint)
        return engine.to_device(network, self.device).eval()

    def tidy(self, targets: list[Stage]) -> None:
        """Delete what a kill left over."""
        state = self.directory.state_file(self.dense)
        if self.checkpoint and state.exists():
            with contextlib.suppress(Failure):  # a damaged state of another training is not ours to judge
                if self.directory.peek(state)["settings"] == self.checkpoint.get("settings"):
                    state.unlink()
        self.directory.tidy(targets)

    def evaluate(self, network: nn.Module) -> engine.Score:
        return engine.evaluate(network, self.test_batches)

    def seconds_per_epoch(self, distilled: bool) -> float:
        """An estimate from a few steps, with a teacher or without."""
        networks = [models.build(self.args.arch, len(self.images.classes)) for _ in range(2)]
        network, teacher = (engine.to_device(network, self.device) for network in networks)
        recipe = Recipe(self.args.lr, teacher=teacher.eval() if distilled else None)
        return engine.seconds_per_step(network, self.train_batches, recipe, self.dtype) * len(self.train_batches)

    def start(self, stages: list[Stage]) -> str:
        """A line with the number of epochs to train and, where they are many, an estimate of the time."""
        self.epochs_left = sum(stage.epochs - self.directory.epochs_done(stage) for stage in stages)
        line = f"{counted(len(stages), 'stage')}, {counted(self.epochs_left, 'epoch')} to train"
        if self.epochs_left * len(self.train_batches) < 2000:
            return line
        distilled = self.args.retrain == "distilled" and bool(self.args.pr)
        return f"{line}, about {report_hours(self.epochs_left * self.seconds_per_epoch(distilled) / 3600)}"

    def summary(self) -> str:
        """Which images are used, and which files are not."""
        old = self.directory.old_files()
        names = ", ".join(f"{self.directory.states / name}" for name in old)
        note = f"\nleft alone, because an earlier version wrote them: {names}" if old else ""
        return self.images.summary() + note

    def measure_dense(self) -> str:
        """A line about the network that pruning starts from, whose accuracy is measured if main.py did not."""
        assert self.checkpoint is not None
        saved, note = self.checkpoint.get("settings"), ""
        taken = checkpoints.taken(self.checkpoint)
        if not saved or "acc" not in self.checkpoint:
            score = self.evaluate(self.teacher)
            note = engine.doubt(self.checkpoint.get("acc"), score) if taken else ""
            self.checkpoint["acc"] = score.accuracy
        names = [name for name in ("epochs", "lr", "seed") if saved and name in saved]
        origin = taken or ", ".join(f"{name} {saved[name]}" for name in names if saved) or "of an earlier version"
        zeros = f", {self.zeros:,} weights are zero already" if self.zeros else ""
        path, acc = self.args.checkpoint_dir / DENSE, self.checkpoint["acc"]
        line = f"pruning starts from {path} ({origin}): {self.measured} accuracy {acc:.2f} %{zeros}"
        return utils.printable(line) + (f"\nnote: {note}" if note else "")

    def after_epoch(self, stage: Stage, network: nn.Module, history: list[dict]) -> None:
        """Log an epoch; keep the weights to rewind to."""
        self.directory.log(stage, history)
        if stage.parent is None and len(history) == self.args.rewind:
            content = {"net": checkpoints.plain_state(network), "settings": stage.settings}
            checkpoints.save(self.early_path, content)
        self.epochs_left -= 1
        if not sys.stdout.isatty():
            now = history[-1]
            left = report_hours(self.epochs_left * now["seconds"] / 3600)
            print(
                f"{stage.name}: epoch {now['epoch']} of {stage.epochs}, lr {now['lr']:.4f}, training loss "
                f"{now['loss']:.4f}, training accuracy {now['accuracy']:.2f} %, {now['seconds']:.1f} s; "
                f"{counted(self.epochs_left, 'epoch')} left, about {left}"
            )

    def checkpoint_of(
        self, stage: Stage, network: nn.Module, history: list[dict], score: engine.Score, parent: dict | None
    ) -> dict:
        """What the file of a finished stage holds; see docs/files.md."""
        net = checkpoints.plain_state(network)
        if not all(value.isfinite().all() for value in net.values()):
            raise Failure(f"{stage.name}: weights contain NaN or inf; try a smaller --lr", code=1)
        layers = pruning.count_zeros(network, str(stage.settings.get("exclude", "")).split())
        # Seconds differ from run to run; without them the same command writes the same bytes.
        entries = [
            {"stage": stage.name, **{name: value for name, value in entry.items() if name != "seconds"}}
            for entry in history
        ]
        entries[-1]["acc"] = score.accuracy
        earlier = parent["history"] if parent and stage.parent and stage.parent.is_level else []
        return {
            "format": checkpoints.FORMAT,
            "net": net,
            "acc": score.accuracy,
            "epoch": stage.epochs - 1,  # an index, as pytorch-cifar counts
            "loss": score.loss,
            "zeros": sum(zeros for zeros, _ in layers.values()),
            "classes": list(self.images.classes),
            "mean": self.mean,
            "std": self.std,
            "test_images": self.images.test_identity,
            "settings": stage.settings,
            "history": earlier + entries,
            **({"parent": checkpoints.digest(parent["net"])} if parent else {}),
            **(self.limit.predicted(network) if self.limit and not stage.settings.get("control", True) else {}),
        }
