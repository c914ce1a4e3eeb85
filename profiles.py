"""Read how long each layer of a network takes on a device, by the number of weights that it keeps.

`deploy.py CHECKPOINT --profile` writes such a file for this machine, and it can be copied from another. JSON:

    profile    1, the version of the format
    device     text: processor and vectors
    threads    of the measurement
    arch       the network
    image_size pixels of a side
    other_ms   what does not depend on the weights, for one image
    layers     by name: `kept`, rising numbers of weights, the last one all of them; `ms`, the time with so many,
               which must not fall
"""

import hashlib
import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import checkpoints
import pruning
from budgets import Profile
from utils import Failure, counted

NAME = "profile.json"
VERSION = 1


@dataclass(frozen=True)
class DeviceProfile:
    """Milliseconds for one image. `layers` has for each layer numbers of weights, and the time with so many."""

    identity: str  # 16 hex digits; equal for equal content
    device: str  # with its number of threads
    arch: str
    image_size: int
    other_ms: float
    layers: dict[str, tuple[list[int], list[float]]]

    @property
    def dense_ms(self) -> float:
        """The time of the network with all its weights."""
        return self.other_ms + sum(ms[-1] for _, ms in self.layers.values())

    def shares(self, network: nn.Module, exclude: Collection[str] = ()) -> dict[str, Profile]:
        """The cost of each prunable layer, as shares of the dense network's time.

        Layers in `exclude` have no profile; what they and everything else cost is a constant in the first one.
        """
        names = [name.removesuffix(".weight") for name in pruning.prunable(network, exclude)]
        constant = self.dense_ms - sum(self.layers[name][1][-1] for name in names)
        found = {}
        for name in names:
            kept, ms = self.layers[name]
            costs = [(constant + value) / self.dense_ms for value in (ms[0], *ms)]
            found[f"{name}.weight"] = Profile((0, *kept), tuple(costs))
            constant = 0.0
        return found

    def predict(self, network: nn.Module) -> float:
        """Milliseconds for one image, by the number of nonzero weights in each layer."""
        weights = {name.removesuffix(".weight"): weight for name, weight in pruning.prunable(network).items()}
        return self.other_ms + sum(
            float(np.interp(int(weights[name].count_nonzero()), *points)) for name, points in self.layers.items()
        )

    def predicted(self, network: nn.Module) -> dict[str, Any]:
        """What the file of a network says about its time."""
        return {"predicted_ms": self.predict(network), "predicted_for": self.device}


def read(path: Path, network: nn.Module, arch: str, image_size: int) -> DeviceProfile:
    """The profile in a file; Failure unless it is one of this network and size of images."""
    if not path.exists():
        raise Failure(f"{path} is missing: deploy.py CHECKPOINT --profile measures this machine")
    content = checkpoints.read(path)
    try:
        found = json.loads(content)
        if found["profile"] != VERSION:
            raise Failure(f"{path} is a profile of version {found['profile']!s:.40}, not {VERSION}")
        profile = DeviceProfile(
            hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16],
            f"{found['device'][:100]}, {counted(found['threads'], 'thread')}",
            found["arch"],
            found["image_size"],
            found["other_ms"],
            {name: (layer["kept"], layer["ms"]) for name, layer in found["layers"].items()},
        )
        good = _milliseconds([profile.other_ms]) and type(found["threads"]) is int
        for kept, ms in profile.layers.values():
            good = good and len(kept) == len(ms) > 1 and all(type(number) is int for number in kept)
            good = good and kept[0] > 0 and all(a < b for a, b in itertools.pairwise(kept)) and _milliseconds(ms)
            good = good and all(a <= b for a, b in itertools.pairwise(ms))
        good = good and profile.dense_ms > 0
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, IndexError):
        good = False
    if not good:
        raise Failure(f"{path} is not a profile: deploy.py CHECKPOINT --profile writes one")
    if (profile.arch, profile.image_size) != (arch, image_size):
        raise Failure(
            f"{path} is a profile of {profile.arch!s:.60} for {profile.image_size!s:.40} pixels, "
            f"not of {arch} for {image_size}"
        )
    sizes = {name.removesuffix(".weight"): weight.numel() for name, weight in pruning.prunable(network).items()}
    if sizes != {name: kept[-1] for name, (kept, _) in profile.layers.items()}:
        raise Failure(f"{path} is a profile of other layers than those of {arch}")
    return profile


def _milliseconds(values: list) -> bool:
    return all(type(value) in (int, float) and 0 <= value < 1e9 for value in values)
