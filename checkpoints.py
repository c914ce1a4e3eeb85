"""Files that hold networks: written whole or not at all, read without running code, checked before they are used.

A checkpoint is a dictionary in the format of the pytorch-cifar scripts, `{'net': state_dict, 'acc': percent,
'epoch': index}`, with keys of our own beside these (docs/files.md). It holds only tensors and plain values, so that
`torch.load(..., weights_only=True)` reads it.
"""

import contextlib
import hashlib
import io
import os
import secrets
import stat
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

import models
import pruning
from formats import foreign, packed, refusals
from utils import Failure, image_sizes, printable

MAX_FILE = 2**32  # bytes
NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not wait for its writer
FORMAT = 2  # of the checkpoints that main.py writes; files of earlier versions have no such mark


def write(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it is whole, the old or the new.

    Failure when the disk refuses; the old file survives. Two processes may write the same path: the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Failure(f"{path} cannot be written: {error.strerror or error}", code=1) from None
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory reach the disk, where the file system can."""
    if os.name == "posix":
        directory = os.open(path, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(directory)
        os.close(directory)


def save(path: Path, content: dict) -> None:
    """Write a dictionary of tensors and plain values; the same content gives the same bytes."""
    buffer = io.BytesIO()  # torch.save writes the name of a file into its bytes, but not that of a buffer
    torch.save(_canonical(content), buffer)
    write(path, buffer.getvalue())


def _canonical(value: object) -> object:
    """An equal value in which equal strings are one object.

    Pickle writes an object that it met before in another way than an equal second one, so a resumed run would differ
    in its bytes.
    """
    if isinstance(value, dict):
        return {_canonical(key): _canonical(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_canonical(entry) for entry in value]
    return sys.intern(value) if type(value) is str else value


def read(path: Path) -> bytes:
    """The content of a regular file. Failure for anything else, as for a pipe, which would be waited for."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Failure(f"{path} is not a regular file")
            if status.st_size > MAX_FILE:
                raise Failure(f"{path} is larger than {MAX_FILE:,} bytes")
            return file.read()
    except FileNotFoundError:
        raise Failure(f"{path} does not exist") from None
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror or error}") from None


def load(path: Path) -> object:
    """Read what `save` wrote, a packed file, or any file of tensors, on the CPU. Failure says what is wrong with it.

    Every byte of content is checked against a checksum, that of the packed file or those of the zip archive that
    torch.save writes. Only files in its older format, which is no archive, and safetensors files have none.
    """
    return _load(path, read(path))[0]


def _load(path: Path, content: bytes) -> tuple[object, str]:
    """What a file of this content holds, and the form of the file: packed, safetensors or pickle."""
    pickled = b""
    try:
        if content.startswith(packed.MAGIC):
            return packed.unpack(content), "packed"
        if foreign.is_safetensors(content):
            return foreign.read_safetensors(content), "safetensors"
        if what := refusals.describe(content, path):
            raise Failure(what)
        archive, pickled = _verified(content)
        # The text of a file of Python 2 may be the bytes of a number.
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(foreign.SAFE_GLOBALS):
            return torch.load(archive, map_location="cpu", weights_only=True, encoding="latin1"), "pickle"
    except Failure as failure:
        raise Failure(f"{path} is not a checkpoint that can be loaded: {failure}") from None
    except Exception as error:  # torch's reader and unpickler raise many kinds of error on foreign bytes
        asked = str(error) if isinstance(error, foreign.Unsafe) else ""
        reason = refusals.refused(pickled, path, asked) or "damaged or not one"
        raise Failure(f"{path} is not a checkpoint that can be loaded safely: {reason}") from None


def _verified(content: bytes) -> tuple[io.BytesIO, bytes]:
    """A file of torch.save, each of whose entries equals its checksum, and its pickle; Failure when one does not.

    PyTorch itself looks at no checksum. It gets an archive that is written anew from the verified entries, because its
    reader of archives and Python's might disagree about a damaged directory.
    """
    if not content.startswith(b"PK"):  # the older format of torch.save, or no checkpoint at all
        content = foreign.renamed(content)
        return io.BytesIO(content), content
    clean, pickled = io.BytesIO(), b""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(clean, "w") as copy:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Failure("its entries are compressed, which torch.save never does")
            if len({entry.filename for entry in entries}) < len(entries):
                raise Failure("damaged: two entries have the same name")
            if sum(entry.file_size for entry in entries) > len(content):
                raise Failure("damaged: its entries overlap")
            for entry in entries:
                found = archive.read(entry)  # this verifies the checksum
                if entry.filename.endswith("data.pkl"):
                    pickled = found = foreign.renamed(found)
                copy.writestr(zipfile.ZipInfo(entry.filename), found)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OverflowError,
        OSError,
        EOFError,
    ) as error:
        reason = "" if "not a zip file" in str(error) else f": {error}"
        raise Failure(f"cut short or damaged{reason}; get it again") from None
    clean.seek(0)
    return clean, pickled


def load_checkpoint(path: Path, content: bytes | None = None) -> dict:
    """Read and check a checkpoint: ours, packed, or in any form of docs/files.md that other scripts write.

    `content` is that of the file where the caller has read it.
    The result has `net` (float32, plain names), `arch` (identified by the tensors) and, where the file has them,
    `acc`, `epoch` and what else main.py writes. Only files with our mark, `format`, are held to its form: of others
    what has another form is ignored, and `taken` says what was found. Failure names the file and what is wrong with it.
    """
    loaded, kind = _load(path, read(path) if content is None else content)
    try:
        found = foreign.find(loaded)
        net, match, masks, left_out = _identified(found.net)
        arch, classes = match.arch, models.outputs(match.arch, net)
        types = {name: value.dtype for name, value in models.state(arch, classes).items()}
        net = {name: foreign.converted(name, value, masks.get(name), types[name]) for name, value in net.items()}
    except ValueError as error:
        raise Failure(f"{path} {error}") from None
    if not 2 <= classes <= packed.MAX_CLASSES:
        raise Failure(f"{path} holds a network with {classes} outputs, and not 2 to {packed.MAX_CLASSES}")
    checkpoint: dict = {"net": net, "arch": arch}
    marked = kind == "packed" or type(found.more.get("format")) is int
    try:
        checked = {**found.more, **_checked_metadata(found.more), **checkpoint}
        with torch.device("meta"):
            pruning.prunable(models.build(arch, classes), checked.get("settings", {}).get("exclude", "").split())
    except ValueError as error:
        if marked:
            raise Failure(f"{path} is not a checkpoint: {error}") from None
        checked = checkpoint
    if marked or "settings" in checked:  # files of earlier versions have no mark
        return checked
    checkpoint |= foreign.metadata(found.more, classes)
    checkpoint["taken"] = f"{'safetensors' if kind == 'safetensors' else found.form} of {arch}"
    if masks:
        checkpoint["taken"] += f", masks of {len(masks)} layers applied"
    if match.by_order:
        checkpoint["taken"] += ", weights matched by their order"
    if left_out:
        more = f" and {len(left_out) - 2} more" if len(left_out) > 2 else ""
        checkpoint["taken"] += f", without {', '.join(left_out[:2])}{more}"
    if found.others:
        checkpoint["taken"] += f", not {' or '.join(found.others)}"
    return checkpoint


def taken(checkpoint: dict) -> str:
    """What was taken from a file that is not ours, and its claim: "state_dict of resnet20, 91.73 % by its file"."""
    claim = f", {checkpoint['acc']:.2f} % by its file" if "acc" in checkpoint else ""
    return printable(checkpoint["taken"] + claim) if "taken" in checkpoint else ""


def adopt_constants(found: dict[Path, dict]) -> None:
    """Give a network of another program the constants of normalization of the networks that were pruned from it."""
    pruned = {
        checkpoint["settings"]["dense"]: (path, checkpoint)
        for path, checkpoint in found.items()
        if "mean" in checkpoint and "dense" in checkpoint.get("settings", {})
    }
    for checkpoint in found.values():
        if pruned and "taken" in checkpoint and "mean" not in checkpoint:
            identity = checkpoint["digest"] if "net" not in checkpoint else digest(checkpoint["net"])
            path, other = pruned.get(identity, (None, {}))
            if path:
                checkpoint |= {name: other[name] for name in ("mean", "std")}
                checkpoint["taken"] += f", normalized as {path.name}"


def _identified(net: dict[str, Tensor]) -> tuple[dict[str, Tensor], models.Match, dict[str, Tensor], list[str]]:
    """The tensors of a known network by its own names, which network it is, masks, and names of what is no part of it.
    ValueError if none fits.

    Names and shapes decide, before any value is touched.
    """
    for name, value in net.items():
        _check_form(name, value)
    unknown: ValueError | None = None
    found: tuple[dict, dict, models.Match, list[str]] | None = None
    for plain, left_out in foreign.plain_names(net):
        weights, masks = foreign.split_masks(plain)
        try:
            match = models.identify({name: tuple(value.shape) for name, value in weights.items()})
        except ValueError as error:
            if unknown is None or not (left_out or "like none" in str(error)):
                unknown = error
            continue
        if found is None or not match.by_order:  # names say more than the order
            found = weights, masks, match, left_out
        if not match.by_order:
            break
    if found is None:
        raise unknown or ValueError("holds no weights")
    weights, masks, match, left_out = found
    masks = {ours: masks[name] for name, ours in match.names.items() if name in masks}
    return {ours: weights[name] for name, ours in match.names.items()}, match, masks, left_out


def is_plain(value: object, more: tuple[torch.dtype, ...] = ()) -> bool:
    """Whether a value is an ordinary tensor on the CPU, of a type that files of ours hold, or of `more`."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter) or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu" and value.dtype in (*DTYPES, *more)


def plain_settings(settings: object) -> bool:
    """Whether settings from a file are names with texts and numbers."""
    return isinstance(settings, dict) and all(
        isinstance(name, str) and name.isprintable() and isinstance(value, (str, int, float))
        for name, value in settings.items()
    )


def same_form(net: dict, expected: dict[str, Tensor]) -> bool:
    """Whether a state_dict has names, shapes and types as expected, finite values, and no variance below zero."""
    return list(net) == list(expected) and all(
        is_plain(net[name])
        and (net[name].shape, net[name].dtype) == (value.shape, value.dtype)
        and bool(net[name].isfinite().all())
        and not (name.endswith("running_var") and bool((net[name] < 0).any()))
        for name, value in expected.items()
    )


def _check_form(name: str, value: Tensor) -> None:
    """ValueError unless a value is an ordinary tensor on the CPU that is as large as the memory it came with."""
    if value.is_quantized or (value.dtype in (torch.int8, torch.uint8) and not name.endswith("_mask")):
        raise ValueError(f"has {name} quantized: save the network before it was quantized")
    if not is_plain(value, (torch.bool, torch.uint8, torch.int8) if name.endswith("_mask") else ()):
        raise ValueError(f"has {name} in a form that is not a plain tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"has {name} in a form that claims more values than the file holds")


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)
NUMBERS = (
    "acc", "dense_acc", "pruned_acc", "loss", "zeros", "epoch", "fp32_acc", "fp32_loss", "format", "predicted_ms",
)  # fmt: skip
TEXTS = ("arch", "dataset", "parent", "mode", "allocation", "retrain", "dense", "teacher", "exclude", "profile")
CHOICES = {
    "mode": ("single", "iter"),
    "allocation": ("", *pruning.ALLOCATIONS),
    "retrain": ("distilled", "plain", "adaptive"),  # the last one in files of earlier versions
}
FRACTIONS = ("sparsity", "val_fraction", "macs")
WHOLE = ("image_size", "rewind", "epochs", "seed")


def _checked_metadata(checkpoint: dict) -> dict:
    """What a checkpoint says of its network; ValueError where the form is not that of main.py."""
    found = {name: checkpoint[name] for name in NUMBERS if name in checkpoint}
    for name, value in found.items():
        if isinstance(value, Tensor):
            _check_form(name, value)
            if value.numel() == 1:
                found[name] = value = value.item()
        if not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise ValueError(f"its {name} is not a finite number")
    if "dtype" in checkpoint and checkpoint["dtype"] not in ("bf16", "fp16"):
        raise ValueError("its dtype is unknown")
    if not isinstance(checkpoint.get("predicted_for", ""), str):
        raise ValueError("its predicted_for is not a text")
    for name in ("mean", "std"):
        values = checkpoint.get(name, [0.5] * 3)
        good = isinstance(values, list) and len(values) == 3 and all(isinstance(value, float) for value in values)
        if not (good and all(0 <= value <= 1 for value in values) and (name == "mean" or min(values) > 0)):
            raise ValueError(f"its {name} is not three fractions")
    if ("mean" in checkpoint) != ("std" in checkpoint):
        raise ValueError("it has only one of mean and standard deviation")
    if "settings" in checkpoint:
        settings = checkpoint["settings"]
        # The accuracy of a packed network before rounding is not that of the rounded one.
        good = isinstance(settings, dict) and ("acc" in found or "dtype" in checkpoint) and "zeros" in found
        good = good and {"arch", "dataset", "image_size"} <= set(settings)
        good = good and plain_settings(settings)
        good = good and all(settings.get(name, values[0]) in values for name, values in CHOICES.items())
        kinds = (
            dict.fromkeys(TEXTS, str)
            | dict.fromkeys(WHOLE, int)
            | {"val_fraction": float, "sparsity": float, "macs": float, "ms": float}
        )
        good = good and all(isinstance(settings[name], kind) for name, kind in kinds.items() if name in settings)
        good = good and all(0 <= settings.get(name, 0) < 1 for name in FRACTIONS)
        good = good and settings["image_size"] in image_sizes and settings.get("rewind", 0) >= 0
        good = good and 0 < settings.get("ms", 1) < 1e6
        if not (good and settings.get("epochs", 1) > 0):
            raise ValueError("its settings are not in the form that main.py writes")
    return found


def plain_state(network: nn.Module) -> dict[str, Tensor]:
    """The network's state_dict on the CPU, contiguous, sharing no memory with it, and with +0.0 for each -0.0."""
    state = {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
    return {name: value.add_(0.0) if value.is_floating_point() else value for name, value in state.items()}


def build_network(checkpoint: dict) -> nn.Module:
    """The network of a checkpoint from `load_checkpoint`, on the CPU."""
    net = checkpoint["net"]
    network = models.build(checkpoint["arch"], models.outputs(checkpoint["arch"], net))
    network.load_state_dict({**network.state_dict(), **net})
    return network


def digest(net: dict[str, Tensor]) -> str:
    """16 hex digits that identify the exact values of a state_dict."""
    sha = hashlib.sha256()
    for name in sorted(net):
        sha.update(name.encode())
        sha.update(net[name].contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
