"""The engine: a network made ready once, then called with images like the network itself."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.resnet import ResNet
from sparse.kernels import lanes_of_this_cpu
from sparse.layers import convolutions
from sparse.loops import WINOGRAD, compiled
from sparse.plan import Plan, aligned_zeros, make_plan
from sparse.team import Team, usable_processors
from sparse.winograd import applies, transformed

GROUP_FLOATS = 2**26  # the most floats of activations for which it pays to compute several images in one vector
LEAST_DENSITY = 0.15  # below it no layer is faster with all its weights
ROUNDS = 3  # of measurements of which the fastest counts
SIZES = 8  # of images that an engine stays ready for


@dataclass
class Ready:
    """A plan with its memory: an arena for each thread, and for each size of team the filters of its threads."""

    plan: Plan
    arenas: list[np.ndarray]
    shares: dict[int, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]  # of the dense layers, of the classifier

    def data(self, thread: int, team: int) -> tuple:
        """What the loops read and write. A team has its activations in one arena, each thread works in its own."""
        plan, own = self.plan, self.arenas[thread % len(self.arenas)]
        arena = self.arenas[thread if team == 1 else 0]
        return plan.operations, arena, own, plan.nonzeros, plan.starts, plan.biases, self.shares[team], *self.weights


class Engine:
    """A trained network on the CPU, without its zero weights.

    network: any of models/, also with channels removed; it is neither changed nor used in later calls. threads: as
    many as PyTorch uses by default. lanes: floats in a vector, 8 or 16, by default as the processor has them.
    Raises ValueError for more threads than there are processors and for weights that are not float32, RuntimeError
    where the logits are not those of PyTorch, which is checked once, with random images of `image_size`; images of
    any size may follow. `dense` has the layers that groups of images are computed with all weights in, which was
    measured to be faster with images of `image_size`.
    """

    def __init__(self, network: ResNet, image_size: int = 32, threads: int | None = None, lanes: int | None = None):
        self.threads = min(torch.get_num_threads(), usable_processors()) if threads is None else threads
        if not 1 <= self.threads <= usable_processors():
            raise ValueError(f"{self.threads} threads on {usable_processors()} processors")
        self.lanes = lanes_of_this_cpu() if lanes is None else lanes
        if self.lanes not in (8, 16):
            raise ValueError(f"vectors of {self.lanes} floats, not 8 or 16")
        if any(value.dtype != torch.float32 for value in network.parameters()):
            raise ValueError("the weights of the network are not float32")
        self.layers = convolutions(network)
        self.run_image, self.run_group = compiled(self.lanes)
        linear = network.linear
        self.classifier = np.column_stack([linear.weight.detach().numpy(), linear.bias.detach().numpy()])
        self.team = Team(self.threads)
        self.lock = threading.Lock()
        self.ready: dict[tuple[int, int, bool], Ready] = {}
        self.dense, self.dense_weights = transformed(self.layers, self.faster_dense(image_size), self.lanes)
        self.check(network, image_size)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 images -> (N, classes) float32 logits; calls from several threads wait in turn."""
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32 or 0 in images.shape[2:]:
            raise ValueError(f"images are (N, 3, H, W) float32, not {tuple(images.shape)} {images.dtype}")
        pixels = np.ascontiguousarray(images.detach().numpy())
        with self.lock:  # the memory for activations is one
            return self.compute(pixels)

    def compute(self, pixels: np.ndarray) -> Tensor:
        count, _, height, width = pixels.shape
        logits = np.empty((count, len(self.classifier)), np.float32)
        groups, rest = divmod(count, self.lanes)
        if 2 * rest > self.lanes:  # lanes that do nothing cost less than so many images one by one
            groups, rest = groups + 1, 0
        if groups and len(self.prepare(height, width, grouped=True).arenas) == 0:
            groups = 0
        parts = [slice(start, start + self.lanes) for start in range(0, groups * self.lanes, self.lanes)]
        if parts:
            self.compute_groups(pixels, logits, parts)
        for index in range(min(count, groups * self.lanes), count):
            self.compute_image(pixels[index], logits[index : index + 1])
        return torch.from_numpy(logits)

    def compute_groups(self, pixels: np.ndarray, logits: np.ndarray, parts: list[slice]) -> None:
        """Each thread takes groups of images of its own; those that do not come out even are worked on together."""
        ready = self.prepare(*pixels.shape[2:], grouped=True)
        alone = len(parts) // self.threads * self.threads

        def own(thread: int) -> None:
            for part in parts[thread : alone : self.threads]:
                self.run_group(*ready.data(thread, 1), logits[part], pixels[part], 0, 1, 0)

        for other in self.team.start(own):
            other.result()
        for part in parts[alone:]:
            self.as_team(self.run_group, ready, logits[part], pixels[part])

    def compute_image(self, pixels: np.ndarray, logits: np.ndarray) -> None:
        ready = self.prepare(*pixels.shape[1:], grouped=False)
        self.as_team(self.run_image, ready, logits, pixels)

    def as_team(self, run: Callable, ready: Ready, logits: np.ndarray, pixels: np.ndarray) -> None:
        """All threads compute the same images, each its share of the filters of each layer."""
        counter, team = np.zeros(1, np.int64), self.threads
        # The loops end with a meeting of all threads, so what the others still do is to end.
        try:
            self.team.start(
                lambda thread: run(*ready.data(thread, team), logits, pixels, thread, team, counter.ctypes.data)
            )
        except BaseException:  # as of Ctrl-C: the others must not wait for this thread, and may still write
            counter[0] = 2**62
            self.ready.clear()
            raise

    def prepare(self, height: int, width: int, grouped: bool) -> Ready:
        """What computing images of a size needs, made once. It has no arenas where groups would need too much."""
        key = height, width, grouped
        if key not in self.ready:
            if len(self.ready) >= SIZES:
                del self.ready[next(iter(self.ready))]
            plan = make_plan(self.layers, height, width, self.lanes, grouped, self.dense)
            shares = {team: plan.shares(team) for team in {1, self.threads}}
            weights = self.dense_weights, self.classifier
            arenas = self.threads if grouped else 1
            if grouped and plan.floats > GROUP_FLOATS:
                arenas = 0
            self.ready[key] = Ready(plan, [plan.arena() for _ in range(arenas)], shares, weights)
        return self.ready[key]

    def faster_dense(self, size: int) -> list[int]:
        """The layers that are faster with all weights for a group of images of this size, measured in one thread."""
        candidates = [
            index
            for index, layer in enumerate(self.layers)
            if applies(layer) and np.count_nonzero(layer.weight) > LEAST_DENSITY * layer.weight.size
        ]
        places, weights = transformed(self.layers, candidates, self.lanes)
        plans = [make_plan(self.layers, size, size, self.lanes, True, dense) for dense in ({}, places)]
        if plans[0].floats > GROUP_FLOATS:
            return []
        arena = aligned_zeros(max(plan.floats for plan in plans))
        ready = [Ready(plan, [arena], {1: plan.shares(1)}, (weights, self.classifier)) for plan in plans]
        logits = np.empty((self.lanes, len(self.classifier)), np.float32)
        pixels = np.zeros((self.lanes, 3, size, size), np.float32)
        found = []
        for index in [index for index in candidates if plans[1].operations[index + 1, 0] == WINOGRAD]:
            seconds = [np.inf, np.inf]
            for kind in (0, 1) * ROUNDS:
                operations, *data = ready[kind].data(0, 1)
                begin = time.perf_counter()
                # The first operation loads the images.
                self.run_group(operations[index + 1 : index + 2], *data, logits, pixels, 0, 1, 0)
                seconds[kind] = min(seconds[kind], time.perf_counter() - begin)
            if seconds[1] < seconds[0]:
                found.append(index)
        return found

    @torch.no_grad()
    def check(self, network: ResNet, image_size: int) -> None:
        """RuntimeError when the logits of random images differ from PyTorch's by more than rounding explains."""
        images = torch.randn(
            (self.threads + 1) * self.lanes + 1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)
        )
        training = network.training
        expected = network.eval()(images)
        network.train(training)
        error = (self(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        if not error < 1e-3:
            raise RuntimeError(
                f"the sparse engine computes other logits than PyTorch: off by {error:.1e} of the largest"
            )
