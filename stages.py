"""Stages of an experiment, and the directory that holds them. A finished stage is a file.

DIR/NAME.pth               a result
DIR/levels/IDENTITY.pth    a finished level of iterative pruning, while something still needs it
DIR/resume/NAME.pt         the state of an interrupted result, or IDENTITY.pt of an interrupted level
DIR/NAME.pth.bak           a result that --force replaced
DIR/log.jsonl              one line per epoch
"""

import contextlib
import hashlib
import json
import re
import shutil
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

import checkpoints
import locks
import models
from engine import Recipe
from utils import Failure, difference

DENSE = "ckpt.pth"
# What a crash leaves of a file that the program was about to write, and nothing else.
TEMPORARY = re.compile(r"\.(?:[\w.]*ckpt(?:_epoch\d+)?|[0-9a-f]{16}|log)\.(?:pth|pt|jsonl)\.[0-9a-f]{8}\.tmp")
# A result that differs in one of these belongs to another experiment, and --force does not replace it.
EXPERIMENT = ("arch", "dataset", "image_size", "val_fraction", "classes")
ANCESTRY = ("dense", "parent", "teacher")  # settings that are identities of networks
DERIVED = (*ANCESTRY, "zeros", "peak_lr", "schedule", "nesterov", "ema")  # they follow from the flags


@dataclass(frozen=True, eq=False)
class Stage:
    """Take the parent's network, prune it to `zeros` zeros, train it for `epochs` epochs by `recipe`, write it.

    `name` is the file name of a result, or describes a level. Random choices depend on it, never on a path.
    `settings` are all that the result depends on, with the identity of the parent. The dense network has no parent.
    """

    name: str
    parent: "Stage | None"
    zeros: int
    epochs: int
    recipe: Recipe
    settings: dict[str, Any]
    is_level: bool = False
    digest: str = ""  # of the weights in ckpt.pth, which identify it, because it may come from another program

    @cached_property
    def identity(self) -> str:
        """16 hex digits; equal for equal settings."""
        return self.digest or hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]

    def ancestors(self) -> list["Stage"]:
        """The stages that lead to this one, from the first after the dense network to this one."""
        chain, stage = [], self
        while stage.parent:
            chain.append(stage)
            stage = stage.parent
        return chain[::-1] or [self]


class Directory:
    """A checkpoint directory: what of a command's targets is finished, interrupted, or in the way."""

    def __init__(self, path: Path):
        self.path, self.levels, self.states = path, path / "levels", path / "resume"
        self.lock: TextIO | None = None
        self.kept_levels: set[str] = set()  # parents of interrupted stages of other commands

    def file(self, stage: Stage) -> Path:
        return self.levels / f"{stage.identity}.pth" if stage.is_level else self.path / stage.name

    def state_file(self, stage: Stage) -> Path:
        return self.states / f"{stage.identity if stage.is_level else Path(stage.name).stem}.pt"

    def unfinished(self, target: Stage) -> list[Stage]:
        """The stages that are still to be made for a target, in order, from the deepest file that exists."""
        missing: list[Stage] = []
        for stage in reversed(target.ancestors()):
            if self.file(stage).exists():
                break
            missing.insert(0, stage)
        return missing

    def all_unfinished(self, targets: list[Stage]) -> list[Stage]:
        """The stages that are still to be made for several targets, each once."""
        return list({stage.identity: stage for target in targets for stage in self.unfinished(target)}.values())

    # --- before any work ---

    def check_places(self, targets: list[Stage], more: list[Path]) -> None:
        """Failure when something that is no regular file, or no directory, has the name of what will be written."""
        for folder in (self.path, self.levels, self.states):
            if folder.is_symlink() and not folder.exists():
                raise Failure(f"{folder} is a link to nothing")
            if folder.exists() and not folder.is_dir():
                raise Failure(f"{folder} is not a directory")
        files = [file for stage in targets for file in (self.file(stage), self.state_file(stage))]
        for file in [*files, *more, self.path / "log.jsonl", self.path / ".lock"]:
            if file.exists() and not file.is_file():
                raise Failure(f"{file} is not a regular file")

    def check(self, target: Stage, force: bool) -> None:
        """Failure when a file or a state of the target's name was made otherwise than asked.

        With `force` only a file of another experiment is in the way.
        """
        path, state = self.file(target), self.state_file(target)
        again = f"--force makes it again and keeps the old file as {path.name}.bak"
        if path.exists():
            try:
                checkpoint = checkpoints.load_checkpoint(path)
            except Failure as failure:
                if force:
                    return
                raise Failure(f"{failure}; {again}") from None
            check_experiment(path, checkpoint, target.settings)
            if force:
                return
            if checkpoint.get("format") != checkpoints.FORMAT or "settings" not in checkpoint:
                raise Failure(f"{path} was written by an earlier version or another program; {again}")
            refuse_difference(path, checkpoint["settings"], target, again)
        elif state.exists() and not force:
            saved = self.peek(state)["settings"]
            refuse_difference(state, saved, target, "delete it to start this stage again")

    def old_files(self) -> list[str]:
        """States of earlier versions, which this one does not read."""
        names = [path.name for path in sorted(self.states.glob("*"))] if self.states.is_dir() else []
        return [name for name in names if not re.fullmatch(r"([0-9a-f]{16}|.*ckpt)\.pt|\..*\.tmp", name)]

    def peek(self, path: Path) -> dict:
        """What a state file holds, without reading its tensors."""
        if not path.is_file():
            raise Failure(f"{path} is not a regular file")
        try:
            with zipfile.ZipFile(path) as archive:
                pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                if any(b"_codecs\nencode" in archive.read(name) for name in pickled):
                    raise Failure("a value that can double in size")
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # torch's reader raises many kinds of error on damaged bytes
            saved = None
        good = isinstance(saved, dict) and isinstance(saved.get("state"), dict)
        if not isinstance(saved, dict) or not good or not checkpoints.plain_settings(saved.get("settings")):
            raise Failure(f"{path} is damaged: delete it to start this stage again")
        return saved

    def epochs_done(self, stage: Stage) -> int:
        """Epochs after which an interrupted stage resumes, 0 where it starts."""
        path = self.state_file(stage)
        epoch = self.peek(path)["state"].get("epoch") if path.exists() else 0
        return epoch if type(epoch) is int and 0 <= epoch <= stage.epochs else 0

    # --- at work ---

    def open(self, bytes_needed: int) -> None:
        """Lock the directory for one run. Failure when another run is at work there or the disk is too full."""
        try:
            existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
            free = shutil.disk_usage(existing).free
            if free < bytes_needed:
                raise Failure(
                    f"{self.path}: the disk has {free / 1e6:.0f} MB left, the run needs {bytes_needed / 1e6:.0f} MB"
                )
            for folder in (self.path, self.levels, self.states):
                folder.mkdir(parents=True, exist_ok=True)
            self.lock = locks.acquire(self.path / ".lock")
            if self.lock is None:
                print(f"note: the file system of {self.path} has no locks: let no second run work there")
            for folder in (self.path, self.levels, self.states):
                for leftover in folder.iterdir():
                    if TEMPORARY.fullmatch(leftover.name):
                        leftover.unlink()
            checkpoints.sync_directory(self.path)
        except locks.Held as holder:
            who = f" ({holder}); if that node is dead, delete {self.path / '.lock'}" if str(holder) else ""
            raise Failure(f"{self.path} is in use: another run is at work there{who}") from None
        except OSError as error:
            raise Failure(f"{error.filename or self.path} cannot be written: {error.strerror or error}") from None

    def close(self) -> None:
        """Unlock, and remove folders that are empty."""
        for folder in (self.levels, self.states):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if self.lock:
            self.lock.close()

    def set_aside(self, targets: list[Stage]) -> None:
        """Rename the targets' files to NAME.bak, and delete their states and levels: the stages start again.

        A .bak whose successor is unfinished stays, because then there is no file to rename.
        """
        for target in targets:
            if self.file(target).exists():
                self.file(target).replace(self.path / f"{target.name}.bak")
            self.state_file(target).unlink(missing_ok=True)
        stages = [stage for target in targets for stage in target.ancestors() if stage.is_level]
        for stage in stages:
            self.state_file(stage).unlink(missing_ok=True)
        for stage in stages:
            if stage.identity not in self.kept_levels:
                self.file(stage).unlink(missing_ok=True)
        checkpoints.sync_directory(self.path)

    def find_kept_levels(self, targets: list[Stage]) -> None:
        """Note the levels that interrupted stages of other commands start from."""
        own = {self.state_file(stage) for target in targets for stage in target.ancestors()}
        self.kept_levels = set()
        for path in self.states.glob("*.pt"):
            if path not in own:
                with contextlib.suppress(Failure):  # a damaged state resumes from nothing
                    self.kept_levels.add(str(self.peek(path)["settings"].get("parent")))

    def tidy(self, targets: list[Stage]) -> None:
        """Delete states of finished stages, and levels that no unfinished target and no interrupted stage needs."""
        needed = set(self.kept_levels)
        for target in targets:
            missing = self.unfinished(target)
            if missing and missing[0].parent:
                needed.add(missing[0].parent.identity)
            for stage in target.ancestors():
                if self.file(stage).exists():
                    self.state_file(stage).unlink(missing_ok=True)
        for stage in {stage.identity: stage for target in targets for stage in target.ancestors()}.values():
            if stage.is_level and stage.identity not in needed:
                self.file(stage).unlink(missing_ok=True)

    def load_parent(self, stage: Stage) -> dict | None:
        """The checkpoint that a stage starts from; None for the dense network."""
        if stage.parent is None:
            return None
        path = self.file(stage.parent)
        if not stage.parent.is_level:
            return checkpoints.load_checkpoint(path)
        try:
            checkpoint = checkpoints.load_checkpoint(path)
        except Failure as failure:
            raise Failure(f"{failure}: delete it, and it is made again") from None
        history = checkpoint.get("history")
        if checkpoint.get("settings") != stage.parent.settings or not isinstance(history, list) or not history:
            raise Failure(f"{path} is not the level that its name says: delete it, and it is made again")
        return checkpoint

    def load_state(self, stage: Stage, network: nn.Module, steps: int) -> dict | None:
        """The state from which an interrupted stage resumes, None where there is none.

        Failure unless it fits the network, and the stage with so many `steps` an epoch.
        """
        path = self.state_file(stage)
        if not path.exists():
            return None
        advice = "delete it to start this stage again"
        try:
            saved = checkpoints.load(path)
        except Failure as failure:
            raise Failure(f"{failure}: {advice}") from None
        state = saved.get("state") if isinstance(saved, dict) else None
        if not isinstance(saved, dict) or not isinstance(state, dict) or not fits(state, stage, network, steps):
            raise Failure(f"{path} is damaged: {advice}")
        if not checkpoints.plain_settings(saved.get("settings")):
            raise Failure(f"{path} is damaged: {advice}")
        if saved.get("settings") != stage.settings:
            raise Failure(f"{path} was made with other settings: {advice}")
        return state

    def save_state(self, stage: Stage, state: dict) -> None:
        checkpoints.save(self.state_file(stage), {"settings": stage.settings, "state": state})

    def log(self, stage: Stage, history: list[dict]) -> None:
        """Append the last epoch of a stage to log.jsonl."""
        path = self.path / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(log_line(stage, history[-1]))
        except OSError as error:
            raise Failure(f"{path} cannot be written: {error.strerror or error}", code=1) from None

    def restart_log(self, stage: Stage, history: list[dict]) -> None:
        """Let the lines of a stage in log.jsonl be those of its state, whose history holds what a crash left."""
        path = self.path / "log.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        others = [line for line in lines if line.endswith("}\n") and f'"{stage.identity}"' not in line]
        mine = [log_line(stage, entry) for entry in history]
        if others + mine != lines:
            checkpoints.write(path, "".join(others + mine).encode())


def fits(state: dict, stage: Stage, network: nn.Module, steps: int) -> bool:
    """Whether a state has every part that engine.fit resumes from, in shapes and numbers that fit."""

    def numbers(*values: object) -> bool:
        return all(type(value) in (int, float) and abs(value) < 1e12 for value in values)  # type: ignore[arg-type]

    def like(values: object, expected: list[Tensor]) -> bool:
        return (
            isinstance(values, list)
            and len(values) == len(expected)
            and all(
                checkpoints.is_plain(value)
                and (value.shape, value.dtype) == (wanted.shape, wanted.dtype)
                and bool(value.isfinite().all())
                for value, wanted in zip(values, expected)
            )
        )

    epoch, step, history, net = (state.get(name) for name in ("epoch", "step", "history", "net"))
    if not (type(epoch) is int and type(step) is int and isinstance(history, list) and isinstance(net, dict)):
        return False
    weights: list[Tensor] = list(network.parameters())
    wanted, accuracy = network.state_dict(), state.get("pruned_acc")
    entries = [entry if isinstance(entry, dict) else {} for entry in history]
    names = ("lr", "loss", "accuracy", "seconds")
    if any(set(entry) != {"epoch", *names} or type(entry["epoch"]) is not int for entry in entries):
        return False
    sums, seconds = state.get("sums", torch.zeros(0)), state.get("seconds", -1)
    return (
        0 <= epoch <= stage.epochs
        and 0 <= step <= (steps if epoch < stage.epochs else 0)
        and epoch + step > 0
        and [entry.get("epoch") for entry in entries] == list(range(1, epoch + 1))
        and all(numbers(*(entry.get(name) for name in names)) for entry in entries)
        and numbers(seconds)
        and seconds >= 0
        and checkpoints.same_form(net, {name: value.cpu() for name, value in wanted.items()})
        and like(state.get("momentum"), weights)
        and like([sums], [torch.zeros(3, dtype=torch.float64)])
        and bool(sums[0] >= 0 and 0 <= sums[1] <= sums[2])
        and bool(sums[2] > 0) == (step > 0)
        and (not stage.recipe.ema or like(state.get("ema"), weights))
        and (numbers(accuracy) if stage.parent else accuracy is None)
    )


def log_line(stage: Stage, entry: dict) -> str:
    content = {"stage": stage.name, "identity": stage.identity, "epochs": stage.epochs, **entry}
    return json.dumps(content) + "\n"


def check_experiment(path: Path, checkpoint: dict, settings: dict) -> None:
    """Failure when a file is of another network, data set, image size or held-out part than `settings`."""
    mine = {name: settings[name] for name in EXPERIMENT}
    # A file that does not say otherwise was trained on all images, including those that are held out.
    theirs = mine | {"val_fraction": 0.0} | {n: v for n, v in checkpoint.get("settings", {}).items() if n in mine}
    theirs |= {"arch": checkpoint["arch"], "classes": models.outputs(checkpoint["arch"], checkpoint["net"])}
    if other := difference(theirs, mine):
        own = f", or --arch {theirs['arch']}" if theirs | {"arch": mine["arch"]} == mine else ""
        raise Failure(f"{path} is of another experiment ({other}): choose another --checkpoint-dir{own}")


def refuse_difference(path: Path, saved: dict, stage: Stage, advice: str) -> None:
    """Failure when `saved` are other settings than those of the stage, naming each."""
    asked = stage.settings
    if "dense" in asked and not asked["dense"]:  # until the dense network is trained its identity is unknown
        saved, asked = ({k: v for k, v in each.items() if k not in ANCESTRY} for each in (saved, asked))
    by_flag = [{k: v for k, v in each.items() if k not in DERIVED} for each in (saved, asked)]
    if other := difference(*by_flag):
        raise Failure(f"{path} was made with other settings: {other}; {advice}")
    if saved.get("dense") != asked.get("dense"):
        raise Failure(f"{path} was pruned from another {DENSE}; {advice}")
    if other := difference(saved, asked):
        raise Failure(f"{path} was made with other settings: {other}; {advice}")
