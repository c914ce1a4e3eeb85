"""What other people's scripts wrote: where the weights are in their files, and what else these say.

docs/files.md has a table of the forms and of what happens. Nothing here runs code from a file: where PyTorch would call
NumPy to rebuild a number, it calls the functions below.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

CONTAINERS = ("net", "state_dict", "model", "model_state_dict", "network")  # the first that a file has is taken
OTHER_WEIGHTS = re.compile("ema|avg|average|swa|teacher|mask|optim|grad|momentum|init", re.IGNORECASE)
ACCURACIES = (
    "acc", "best_acc", "accuracy", "best_accuracy", "acc1", "best_acc1", "top1", "best_top1", "prec1", "best_prec1",
    "test_acc", "test_accuracy", "best_test_acc", "val_acc", "best_val_acc", "eval_acc",
)  # fmt: skip
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")  # DataParallel, torch.compile
PROFILED = (".total_ops", ".total_params", "total_ops", "total_params")  # what thop leaves in a network
DEEPEST_PREFIX = 5  # names before the first one of a network


# --- Numbers of NumPy ------------------------------------------------------------------------------------------------


class Unsafe(Exception):
    """A pickle asks for more than tensors and plain values; the text says for what."""


class ScalarType:
    """Stands for numpy.dtype in a pickle: the type of one number."""

    def __init__(self, name: object, *_more: object):
        if name not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise Unsafe(f"values of NumPy of type {name!r:.20}")
        self.name, self.order = name, "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="):
            self.order = state[1]


def scalar(kind: object, content: object) -> float:
    """Stands for numpy's function that rebuilds a scalar; the result is a plain number."""
    raw = content.encode("latin1") if isinstance(content, str) else content  # a text in files of Python 2
    if not isinstance(kind, ScalarType) or not isinstance(raw, bytes):
        raise Unsafe("a value of NumPy that is no number")
    dtype = np.dtype(f"{kind.order}{kind.name}")
    if len(raw) != dtype.itemsize:
        raise Unsafe("a value of NumPy that is no number")
    return np.frombuffer(raw, dtype)[0].item()


def latin1(text: object, codec: object = "") -> bytes:
    """Stands for _codecs.encode, by which pickles hold the bytes of a number. Other codecs double what they get."""
    if type(text) is not str or len(text) > 16 or codec != "latin1":
        raise Unsafe("_codecs.encode for more than a number")
    return text.encode("latin1")


def renamed(pickled: bytes) -> bytes:
    """A pickle that asks for `latin1` above in place of _codecs.encode."""
    return pickled.replace(b"_codecs\nencode", b"_codecs\nlatin1")


SAFE_GLOBALS: list = [
    (latin1, "_codecs.latin1"),
    (ScalarType, "numpy.dtype"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
]


# --- safetensors ---------------------------------------------------------------------------------------------------


def is_safetensors(content: bytes) -> bool:
    header = int.from_bytes(content[:8], "little")
    return content[8:9] == b"{" and header + 8 <= len(content)


def _safetensors_metadata(content: bytes) -> dict[str, str]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})


def is_of_deploy(content: bytes) -> bool:
    """Whether a file is a safetensors file that `write_safetensors` made."""
    try:
        return is_safetensors(content) and {"arch", "classes", "mean", "std"} <= set(_safetensors_metadata(content))
    except (ValueError, RecursionError, TypeError):
        return False


def read_safetensors(content: bytes) -> dict:
    """The tensors of such a file as `net`, and what deploy.py writes into its metadata, where that is well-formed."""
    checkpoint: dict = {"net": safetensors.torch.load(content)}  # verifies sizes and offsets
    metadata = _safetensors_metadata(content)
    for name, key in (("accuracy", "acc"), ("mean", "mean"), ("std", "std"), ("classes", "classes")):
        try:
            checkpoint[key] = json.loads(metadata[name])
        except (KeyError, ValueError, RecursionError):
            continue
    return checkpoint


def write_safetensors(net: dict[str, Tensor], **metadata: object) -> bytes:
    """The bytes of a safetensors file; metadata are written as JSON texts."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in net.items()}
    return safetensors.torch.save(plain, {"format": "pt", **texts})


# --- Where the weights are -----------------------------------------------------------------------------------------


@dataclass
class Found:
    """A state_dict in a file. `form` says where it was, `others` which other ones the file has."""

    form: str
    net: dict[str, Tensor]
    more: dict = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def find(content: object) -> Found:
    """The state_dict in what a file holds; ValueError when there is none, saying what there is."""
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, not a dictionary with the weights of a network")
    places = [place for name in CONTAINERS for place in _states(name, content.get(name))]
    if not places and _is_state(content):
        places = [("bare state_dict", {name: value for name, value in content.items() if _is_weight(name, value)})]
    if not places:
        unknown = [name for name in content if isinstance(name, str) and not OTHER_WEIGHTS.search(name)]
        places = [place for name in unknown for place in _states(name, content[name])]
        places = places if len(places) == 1 else []
    if not places:
        names = ", ".join(f"{name!r:.40}" for name in list(content)[:5]) or "nothing"
        advice = next((f": to take {name!r:.40}, save it alone" for name in content if _is_state(content[name])), "")
        raise ValueError(
            "holds no network: no 'net', 'state_dict', 'model' or 'model_state_dict' with weights, and no weights by "
            f"themselves; it has {names}{' and more' if len(content) > 5 else ''}{advice}"
        )
    form, net = places[0]
    net = {name: value for name, value in net.items() if not (value is None or isinstance(value, (int, float, str)))}
    if wrong := [name for name, value in net.items() if not (isinstance(name, str) and isinstance(value, Tensor))]:
        raise ValueError(f"has entries in its '{form}' that are not tensors, such as {wrong[0]!s:.40}")
    net = {name: value for name, value in net.items() if not name.endswith(PROFILED)}
    masks = [name for name, value in content.items() if isinstance(name, str) and "mask" in name and _is_state(value)]
    return Found(form, net, content, [other for other, _ in places[1:]] + masks)


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and "." in name and isinstance(value, Tensor)


def _is_state(entry: object) -> bool:
    return isinstance(entry, dict) and any(map(_is_weight, entry, entry.values()))


def _states(name: str, entry: object) -> Iterator[tuple[str, dict]]:
    """The state_dict at an entry of a file, or at entries of that."""
    if _is_state(entry):
        yield name, entry  # type: ignore[misc]
    elif isinstance(entry, dict):
        yield from ((f"{key} in {name}", entry[key]) for key in CONTAINERS if _is_state(entry.get(key)))


def plain_names(net: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    """The state_dict with plain names, and which tensors it leaves out.

    First without the wrappers' prefixes, then without what else stands before all names, at last what stands before
    most of them: a loss or a normalization beside the network is left out. ValueError if two names become one.
    """
    plain, left_out = {WRAPPERS.sub("", name): value for name, value in net.items()}, list[str]()
    for _ in range(DEEPEST_PREFIX):
        if len(plain) < len(net):
            raise ValueError("has the same weights both with and without a prefix")
        yield plain, left_out
        first = next(iter(plain), "").partition(".")[0] + "."
        if not plain or not all(name.startswith(first) for name in plain):
            heads = Counter(name.partition(".")[0] + "." for name in plain)
            first, count = heads.most_common(1)[0] if heads else ("", 0)
            if left_out or 2 * count <= len(plain):
                return
            left_out = [name for name in plain if not name.startswith(first)]
            net = plain = {name: value for name, value in plain.items() if name.startswith(first)}
        plain = {name.removeprefix(first): value for name, value in plain.items()}


def split_masks(net: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a state_dict and their masks, by the names of the weights (torch.nn.utils.prune's x_orig, x_mask).

    ValueError when a mask has no weight of its shape, or a weight has no mask although its name says so.
    """
    masks = {name.removesuffix("_mask"): value for name, value in net.items() if name.endswith("_mask")}
    weights: dict[str, Tensor] = {}
    for name, value in net.items():
        if name.endswith("_mask"):
            continue
        plain = name.removesuffix("_orig")
        if plain in weights or (plain != name and plain not in masks):
            raise ValueError(f"has {name} " + (f"beside {plain}" if plain in weights else f"without {plain}_mask"))
        weights[plain] = value
    for name, mask in masks.items():
        if name not in weights or mask.shape != weights[name].shape:
            raise ValueError(f"has {name}_mask, and no {name} of the same shape")
    return weights, masks


# --- What else a file says -----------------------------------------------------------------------------------------


def number(value: object) -> float | None:
    """A finite number, or a tensor of one, as a plain number; None for anything else."""
    if isinstance(value, Tensor):
        try:
            value = value.item() if value.numel() == 1 else None
        except (RuntimeError, NotImplementedError):  # it has no value that can be read
            return None
    return value if type(value) in (int, float) and abs(value) < 1e12 else None  # type: ignore[arg-type, return-value]


def accuracy(more: dict) -> float | None:
    """The accuracy in percent that a file claims, under one of the usual names. A number up to 1 is a fraction."""
    for name in ACCURACIES:
        value = number(more.get(name))
        if value is not None and 0 < value <= 100:
            return 100 * value if value <= 1 else float(value)
    return None


def metadata(more: dict, classes: int) -> dict:
    """What a file that is not of main.py says, as far as it has a form that can be used; everything else is ignored."""
    found: dict = {"acc": accuracy(more), "epoch": number(more.get("epoch"))}
    names = more.get("classes")
    if isinstance(names, list) and len(names) == classes and all(isinstance(name, str) for name in names):
        found["classes"] = names
    if constants(more.get("mean"), 0) and constants(more.get("std"), 1e-6):
        found |= {name: [float(value) for value in more[name]] for name in ("mean", "std")}
    return {name: value for name, value in found.items() if value is not None}


def constants(values: object, least: float) -> bool:
    """Whether a value is three fractions of full scale, by which the channels of images are normalized."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == 3
        and all(type(value) in (int, float) and least <= value <= 1 for value in values)
    )


def converted(name: str, value: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values of a parameter or buffer in the type of the network; ValueError when they cannot be used."""
    if dtype == torch.int64:  # a counter of BatchNorm, which nothing uses and half precision cannot hold, or indices
        return value.long() if bool(value.isfinite().all()) else torch.zeros_like(value, dtype=dtype)
    if not value.is_floating_point():
        raise ValueError(f"has {name} in a form that is not a float tensor")
    found = value.detach().float()
    if mask is not None:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"has {name}_mask with values other than 0 and 1")
        found = torch.where(mask != 0, found, 0.0)
    if name.endswith("running_var") and (found < 0).any():
        raise ValueError(f"has variances below zero in {name}")
    if not found.isfinite().all():
        large = value.isfinite().all()
        raise ValueError(f"has values in {name} that are not finite" + (" in float32" if large else ""))
    return found
