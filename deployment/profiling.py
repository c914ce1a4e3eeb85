"""Measure how long each layer of a network takes in the engine, by the number of weights it keeps.

`profiles` describes the file and reads it. Yang et al. 2018 (NetAdapt) prune channels by tables measured like this.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import checkpoints
import profiles
import pruning
from deployment import model_file, tables
from deployment.engine import lanes_of_this_cpu
from deployment.engine.engine import Model
from deployment.graph import lower
from deployment.simplification import fuse
from utils import Failure

DENSITIES = 0.005, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0
SECONDS = 0.02  # of calls of one network in one round


def write(args: argparse.Namespace, found: dict[Path, dict]) -> None:
    """Write the profile of one checkpoint's network beside it. Failure where there is one already."""
    if len(found) > 1:
        raise Failure("argument --profile: name one checkpoint, whose layers are measured")
    [(path, checkpoint)] = found.items()
    target = path.with_name(profiles.NAME)
    if target.exists():
        raise Failure(f"{target} exists, and results may depend on it: move it away to measure again")
    if not os.access(path.parent, os.W_OK):
        raise Failure(f"{target} cannot be written")
    size = args.image_size or checkpoint.get("settings", {}).get("image_size", 32)
    try:
        measured = measure(checkpoints.build_network(checkpoint).eval(), size, args.threads, args.rounds)
    except ValueError as error:
        raise Failure(f"{path} cannot run in the engine: {error}") from None
    content = {
        "profile": profiles.VERSION,
        "device": f"{tables.processor()}, vectors of {lanes_of_this_cpu()} floats",
        "threads": args.threads,
        "arch": checkpoint["arch"],
        "image_size": size,
        **measured,
    }
    checkpoints.write(target, (json.dumps(content, indent=1) + "\n").encode())
    whole = measured["other_ms"] + sum(layer["ms"][-1] for layer in measured["layers"].values())
    print(f"{target}: {len(measured['layers'])} layers, {whole:.3g} ms for one image with all weights")


def measure(network: nn.Module, size: int, threads: int, rounds: int) -> dict:
    """`layers` and `other_ms` of a profile, for images of `size` x `size` pixels.

    Every layer is pruned to the same density by magnitude, for one density after the other in each round. Times are
    medians over the rounds. ValueError for a network that the engine cannot run.
    """
    models, kept = [], defaultdict(list)
    for density in tqdm(DENSITIES, "preparing", leave=False, disable=None):
        pruned = pruned_to(network, density)
        program = fuse(lower(pruned, size))
        models.append(Model(model_file.write(program), threads, extra=("-DENGINE_PROFILE",)))
        for name, weight in pruning.prunable(pruned).items():
            kept[name.removesuffix(".weight")].append(int(weight.count_nonzero()))
    names = [operation.name if operation.kind == "convolve" else "" for operation in program.operations]
    pixels = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    times: list[list[list[float]]] = [[] for _ in models]  # by density and round: of each layer, then of all else
    for turn in tqdm(range(rounds), "measuring layers", unit="round", leave=False, disable=None):
        for i in range(len(models))[:: -1 if turn % 2 else 1]:
            times[i].append(one_round(models[i], pixels, names, list(kept)))
    medians = np.array([[statistics.median(values) for values in zip(*rows)] for rows in times])
    layers = {}
    for column, (name, counts) in enumerate(kept.items()):
        points = dict(zip(counts, medians[:, column]))  # tiny layers have the same weights at several densities
        ms = np.maximum.accumulate([points[count] for count in sorted(points)])  # less work does not take longer
        layers[name] = {"kept": sorted(points), "ms": [round(float(value), 6) for value in ms]}
    return {"other_ms": round(float(np.median(medians[:, -1])), 6), "layers": layers}


def pruned_to(network: nn.Module, density: float) -> nn.Module:
    """A copy with the share `density` of each layer's weights, at least one. Zeros of the network are filled up."""
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for weight in pruning.prunable(network).values():
        with torch.no_grad():
            noise = torch.randn(weight.shape, generator=generator)
            weight[weight == 0] = 1e-4 * noise[weight == 0]
            count = max(1, round(density * weight.numel()))
            order = weight.abs().flatten().sort(descending=True, stable=True).indices
            weight.view(-1)[order[count:]] = 0
    return network


def one_round(model: Model, pixels: np.ndarray, names: list[str], layers: list[str]) -> list[float]:
    """Milliseconds of one image in each of the layers, and in everything else. `names` are those of the operations."""
    model.run(pixels)  # the network before left its own data in the caches
    before, begin, calls = model.seconds(grouped=False), time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        model.run(pixels)
        calls += 1
    whole = (time.perf_counter() - begin) / calls
    sums = dict.fromkeys(layers, 0.0)
    for name, earlier, later in zip(names, before, model.seconds(grouped=False)):
        if name in sums:
            sums[name] += (later - earlier) / calls
    return [1e3 * value for value in (*sums.values(), max(0.0, whole - sum(sums.values())))]
