"""What the program keeps on disk: checkpoints, and the states that an interrupted run goes on from.

A checkpoint is a dictionary in the format of the pytorch-cifar scripts, `{'net': state_dict, 'acc': percent,
'epoch': index}`, with keys of our own beside these. It holds plain tensors and numbers only, so that
`torch.load(..., weights_only=True)` reads it and reading it never runs code.
"""

import hashlib
import io
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import filelock
import torch
from torch import Tensor, nn

import models
import packed
from utils import Failure, difference


def write(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it is whole, the old or the new. Failure when
    the disk does not take it; the old file survives."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself reaches the disk only with its directory
            directory = os.open(path.parent, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Failure(f"{path} cannot be written: {error.strerror or error}", code=1) from None


def save(path: Path, content: dict) -> None:
    """Write a dictionary of tensors and plain values; the same content gives the same bytes."""
    buffer = io.BytesIO()  # torch.save puts the name of a file into its bytes, but not that of a buffer
    torch.save(_canonical(content), buffer)
    write(path, buffer.getvalue())


def _canonical(value: object) -> object:
    """An equal value in which equal strings are one object: pickle writes an object that it met before in
    another way than a second one that is equal, so a resumed run would differ in its bytes."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    return sys.intern(value) if type(value) is str else value


def load(path: Path) -> object:
    """Read what `save` wrote, or a packed or any file of tensors, on the CPU. Failure when it is not such a file."""
    if path.exists() and not path.is_file():
        raise Failure(f"{path} is not a file")
    try:
        with open(path, "rb") as file:
            if file.read(len(packed.MAGIC)) == packed.MAGIC:
                return packed.unpack(path.read_bytes())
        with warnings.catch_warnings(action="ignore"):  # of formats; the error below says enough
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Failure(f"{path} does not exist") from None
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror or error}") from None
    except Failure as failure:
        raise Failure(f"{path} is not a checkpoint that can be loaded: {failure}") from None
    except Exception as error:  # whatever torch's reader and unpickler raise on bytes that nobody meant for them
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {code[1]}, not just for tensors and plain values" if code else "damaged or not one"
        raise Failure(f"{path} is not a checkpoint that can be loaded safely: {reason}") from None


def load_checkpoint(path: Path) -> dict:
    """Read and check a checkpoint, ours, packed, or in the format of pytorch-cifar, with or without `module.` prefixes.

    The result has `net` (float32, plain names), `arch` and, where the file says them, `acc`, `epoch` and what
    main.py put there. Failure names the file and what is wrong with it.
    """
    checkpoint = load(path)
    net = checkpoint.get("net") if isinstance(checkpoint, dict) else None
    if not isinstance(net, dict) or not net:
        raise Failure(f"{path} is not a checkpoint: it has no 'net' with the weights of a network")
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in net.items()):
        raise Failure(f"{path} is not a checkpoint: its 'net' has entries that are not tensors")
    classes = net["linear.weight"].shape[0] if getattr(net.get("linear.weight"), "ndim", 0) == 2 else 2
    if classes < 2:
        raise Failure(f"{path} is of a network for {classes} classes, and there must be two or more")
    # DataParallel and torch.compile put their own names in front.
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value.detach() for name, value in net.items()}
    if len(plain) < len(net):
        raise Failure(f"{path} has weights both with and without a prefix of the same name")
    try:
        arch = models.identify(plain)  # by names and shapes, before any value is touched
    except ValueError as error:
        raise Failure(f"{path} {error}") from None
    for name, value in plain.items():
        counter = name.endswith("num_batches_tracked")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_complex() or value.is_quantized:
            raise Failure(f"{path} has {name} in a form that is not a plain tensor")
        if not counter and not value.is_floating_point():
            raise Failure(f"{path} has {name} in a form that is not a float tensor")
        plain[name] = value.long() if counter else value.float()
        if not plain[name].isfinite().all():
            raise Failure(f"{path} has values in {name} that are not finite")
    return {**checkpoint, **_checked_facts(path, checkpoint), "net": plain, "arch": arch}


def _checked_facts(path: Path, checkpoint: dict) -> dict:
    """What a checkpoint says of its network, if it says it in the way that main.py does."""
    facts = {
        name: checkpoint[name]
        for name in ("acc", "dense_acc", "pruned_acc", "loss", "zeros", "epoch", "fp32_acc", "fp32_loss")
        if name in checkpoint
    }
    for name, value in facts.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            facts[name] = value = value.item()
        if not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise Failure(f"{path} is not a checkpoint: its {name} is not a finite number")
    if "values" in checkpoint and checkpoint["values"] not in ("bf16", "fp16"):
        raise Failure(f"{path} is not a checkpoint: its values are of no type that is known")
    if "settings" in checkpoint:
        settings = checkpoint["settings"]
        kinds = {
            "arch": str,
            "dataset": str,
            "image_size": int,
            "parent": str,
            "mode": str,
            "allocation": str,
            "retrain": str,
            "recipe": int,
            "rewind": int,
            "epochs": int,
            "seed": int,
            "val_fraction": float,
            "sparsity": (int, float),
        }
        # What was measured before a packed network was rounded is not said of the rounded one.
        good = isinstance(settings, dict) and ("acc" in facts or "values" in checkpoint) and "zeros" in facts
        good = good and {"arch", "dataset", "image_size"} <= set(settings)
        good = good and all(isinstance(name, str) and name.isprintable() for name in settings)
        good = good and all(isinstance(value, (str, int, float)) for value in settings.values())
        good = good and all(isinstance(settings[name], kind) for name, kind in kinds.items() if name in settings)
        good = good and all(0 <= settings.get(name, 0) < 1 for name in ("sparsity", "val_fraction"))
        if not (good and settings.get("epochs", 1) > 0):
            raise Failure(f"{path} is not a checkpoint: its settings are not what main.py writes")
    return facts


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state_dict on the CPU, contiguous, sharing no memory with it, and with +0.0 for each -0.0."""
    state = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    return {name: value.add_(0.0) if value.is_floating_point() else value for name, value in state.items()}


def network_of(checkpoint: dict) -> nn.Module:
    """The network of a checkpoint from `load_checkpoint`, on the CPU."""
    net = checkpoint["net"]
    network = models.build(checkpoint["arch"], net["linear.weight"].shape[0])
    network.load_state_dict({**network.state_dict(), **net})
    return network


def digest(state: dict[str, Tensor]) -> str:
    """A fingerprint of the exact values of a state_dict."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


class Directory:
    """A checkpoint directory while one run works in it: its lock, its results and its unfinished stages.

    An unfinished stage is one file in `resume/`: the state it goes on from and the settings it was made with.
    `resume/redo.json` has the results that --force asked for, and of each whether it is still to be made again:
    the old ones stay until then.
    """

    def __init__(self, path: Path, asked: list[str], resume: bool, force: bool, bytes_needed: int):
        """`asked`: the results of this run, by file name. Failure when the directory cannot be worked in."""
        self.path, self.states = path, path / "resume"
        try:
            there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
            free = shutil.disk_usage(there).free
            if free < bytes_needed:
                raise Failure(f"{path} has {free / 1e6:.0f} MB of disk left and this needs {bytes_needed / 1e6:.0f} MB")
            path.mkdir(parents=True, exist_ok=True)
            (path / ".lock").touch()  # filelock itself waits and retries where it may not write
            self.lock = filelock.FileLock(path / ".lock", timeout=0)
            self.lock.acquire()
            for leftover in [*path.glob(".*.tmp"), *self.states.glob(".*.tmp")]:
                leftover.unlink()
        except filelock.Timeout:
            raise Failure(f"{path} is in use: another run is at work there") from None
        except OSError as error:
            raise Failure(f"{path} cannot be written: {error.strerror or error}") from None
        unfinished = sorted(file.stem for file in self.states.glob("*.pt"))
        if unfinished and not (resume or force):
            names = ", ".join(unfinished)
            raise Failure(f"{path} holds an interrupted run ({names}): -r goes on with it, --force starts again")
        self.over = [] if resume else unfinished  # states that this run has no use for
        self.redo_file = self.states / "redo.json"
        known = self._read_redo() if resume else {}
        if force:  # what an interrupted run was asked to make again stays as it left it
            known = {name: (path / name).exists() for name in asked} | known
        self.redo = known

    def begin(self) -> None:
        """Forget the states that are over and write down what --force asked for, once it is sure that the run is not
        refused."""
        self.states.mkdir(exist_ok=True)
        self.forget(*self.over)
        self._set_redo(self.redo)

    def has(self, result: str) -> bool:
        """Whether the result of that file name is there and is to stay."""
        return (self.path / result).exists() and not self.redo.get(result)

    def finish(self, result: str, checkpoint: dict) -> None:
        """Write a result."""
        save(self.path / result, checkpoint)
        self._set_redo(self.redo | {result: False} if result in self.redo else self.redo)

    def keep(self, stage: str, settings: dict, state: dict) -> None:
        """Write the state from which `stage` can go on."""
        save(self.states / f"{stage}.pt", {"settings": settings, "state": state})

    def unfinished(self) -> list[tuple[Path, dict, dict]]:
        """The states of an interrupted run that this one goes on with: file, settings, state."""
        paths = [path for path in sorted(self.states.glob("*.pt")) if path.stem not in self.over]
        return [(path, saved["settings"], saved["state"]) for path in paths if (saved := self._read_state(path))]

    def kept(self, stage: str, settings: dict) -> dict | None:
        """The state that `keep` wrote last, None without one. Failure when it was made with other settings."""
        path = self.states / f"{stage}.pt"
        if not path.exists():
            return None
        saved = self._read_state(path)
        if other := difference(saved["settings"], settings):
            raise Failure(f"{path} was made with other settings: {other}")
        return saved["state"]

    @staticmethod
    def _read_state(path: Path) -> dict:
        saved = load(path)
        if not isinstance(saved, dict) or not all(isinstance(saved.get(key), dict) for key in ("settings", "state")):
            raise Failure(f"{path} is damaged: --force starts again")
        return saved

    def forget(self, *stages: str) -> None:
        """Delete states whose stages are over."""
        for stage in stages:
            (self.states / f"{stage}.pt").unlink(missing_ok=True)

    def close(self) -> None:
        """The end of a run that finished: nothing is left to go on with."""
        if not any(self.redo.values()):
            self.redo_file.unlink(missing_ok=True)
        if not any(self.states.iterdir()):
            self.states.rmdir()

    def _read_redo(self) -> dict[str, bool]:
        try:
            names = json.loads(self.redo_file.read_text())
        except FileNotFoundError:
            return {}
        except ValueError:
            names = None
        if not isinstance(names, dict):
            raise Failure(
                f"{self.redo_file} is damaged: without it, -r goes on, but what --force asked for is forgotten"
            )
        return names

    def _set_redo(self, names: dict[str, bool]) -> None:
        self.redo = names
        if names:
            write(self.redo_file, json.dumps(names).encode())
        else:
            self.redo_file.unlink(missing_ok=True)
