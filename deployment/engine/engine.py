"""The engine: prepared once from a network, then called with images like the network itself."""

import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deployment.engine.kernels import lanes_of_this_cpu
from deployment.engine.layers import convolutions
from deployment.engine.loops import WINOGRAD, compiled
from deployment.engine.plan import Plan, aligned_zeros, make_plan
from deployment.engine.thread_pool import ThreadPool, usable_processors
from deployment.engine.winograd import applies, transformed
from models.resnet import ResNet

GROUP_FLOATS = 2**26  # above this many floats of activations, computing several images in one vector does not pay
MIN_DENSITY = 0.15  # below this density no layer is faster with all its weights
ROUNDS = 3  # of measurements, of which the fastest counts
MAX_SIZES = 8  # image sizes for which an engine keeps its plans


@dataclass
class Prepared:
    """A plan with its memory: an arena for each thread, and the filters of each thread for each number of threads."""

    plan: Plan
    arenas: list[np.ndarray]
    shares: dict[int, np.ndarray]
    weights: tuple[np.ndarray, np.ndarray]  # of the dense layers, of the classifier

    def arguments(self, thread: int, threads: int) -> tuple:
        """What the loops read and write. Threads that share images share one arena for activations; each has its own
        scratch memory."""
        plan, own = self.plan, self.arenas[thread % len(self.arenas)]
        arena = self.arenas[thread if threads == 1 else 0]
        return plan.operations, arena, own, plan.nonzeros, plan.starts, plan.biases, self.shares[threads], *self.weights


class Engine:
    """A trained network on the CPU without its zero weights.

    network: any of models/, also without its dead channels. It is not changed, and later changes to it have no effect.
    threads: by default as many as PyTorch uses. lanes: floats in a vector, 8 or 16, by default the processor's width.
    Images of any size may follow, but `dense` holds the layers that groups of images compute with all their weights,
    because that was measured to be faster at `image_size`.

    Raises ValueError for more threads than processors and for weights that are not float32. Raises RuntimeError if the
    logits of random images differ from PyTorch's.
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
        self.pool = ThreadPool(self.threads)
        self.lock = threading.Lock()
        self.prepared: dict[tuple[int, int, bool], Prepared] = {}
        if hasattr(os, "register_at_fork"):
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: this() and this().start_anew())
        self.dense, self.dense_weights = transformed(self.layers, self.faster_dense(image_size), self.lanes)
        self.check(network, image_size)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 images -> (N, classes) float32 logits. Calls from several threads wait for each other.

        Raises ValueError for images of another shape or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32 or 0 in images.shape[2:]:
            raise ValueError(f"images must be (N, 3, H, W) float32, not {tuple(images.shape)} {images.dtype}")
        pixels = np.ascontiguousarray(images.detach().numpy())
        with self.lock:  # all calls use the same memory for activations
            try:
                return self.compute(pixels)
            except BaseException:  # such as Ctrl-C: other threads may still write to the memory of this call
                self.prepared.clear()
                raise

    def start_anew(self) -> None:
        """In a forked process: a thread that was computing is not there to release the lock and its memory."""
        self.lock = threading.Lock()
        self.prepared = {}

    def compute(self, pixels: np.ndarray) -> Tensor:
        count, _, height, width = pixels.shape
        logits = np.empty((count, len(self.classifier)), np.float32)
        groups, rest = divmod(count, self.lanes)
        if 2 * rest > self.lanes:  # idle lanes cost less than so many images one by one
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
        """Each thread takes whole groups of images; all threads share each of the groups that are left over."""
        prepared = self.prepare(*pixels.shape[2:], grouped=True)
        alone = len(parts) // self.threads * self.threads

        def own(thread: int) -> None:
            for part in parts[thread : alone : self.threads]:
                self.run_group(*prepared.arguments(thread, 1), logits[part], pixels[part], 0, 1, 0)

        for other in self.pool.start(own):
            other.result()
        for part in parts[alone:]:
            self.run_together(self.run_group, prepared, logits[part], pixels[part])

    def compute_image(self, pixels: np.ndarray, logits: np.ndarray) -> None:
        prepared = self.prepare(*pixels.shape[1:], grouped=False)
        self.run_together(self.run_image, prepared, logits, pixels)

    def run_together(self, run: Callable, prepared: Prepared, logits: np.ndarray, pixels: np.ndarray) -> None:
        """All threads compute the same images, each with its share of the filters of every layer."""
        counter, threads = np.zeros(1, np.int64), self.threads
        # The loops end with a barrier, so nobody needs to wait for the other threads here.
        try:
            self.pool.start(
                lambda thread: run(
                    *prepared.arguments(thread, threads), logits, pixels, thread, threads, counter.ctypes.data
                )
            )
        except BaseException:  # such as Ctrl-C: release the others from the barrier
            counter[0] = 2**62
            raise

    def prepare(self, height: int, width: int, grouped: bool) -> Prepared:
        """Plan and memory for images of one size, made once. It has no arenas if groups would need too much memory."""
        key = height, width, grouped
        if key not in self.prepared:
            if len(self.prepared) >= MAX_SIZES:
                del self.prepared[next(iter(self.prepared))]
            plan = make_plan(self.layers, height, width, self.lanes, grouped, self.dense)
            shares = {threads: plan.shares(threads) for threads in {1, self.threads}}
            weights = self.dense_weights, self.classifier
            arenas = self.threads if grouped else 1
            if grouped and plan.floats > GROUP_FLOATS:
                arenas = 0
            self.prepared[key] = Prepared(plan, [plan.arena() for _ in range(arenas)], shares, weights)
        return self.prepared[key]

    def faster_dense(self, size: int) -> list[int]:
        """The layers that are faster with all weights for a group of images of this size, timed in one thread."""
        candidates = [
            index
            for index, layer in enumerate(self.layers)
            if applies(layer) and np.count_nonzero(layer.weight) > MIN_DENSITY * layer.weight.size
        ]
        places, weights = transformed(self.layers, candidates, self.lanes)
        plans = [make_plan(self.layers, size, size, self.lanes, True, dense) for dense in ({}, places)]
        if plans[0].floats > GROUP_FLOATS:
            return []
        arena = aligned_zeros(max(plan.floats for plan in plans))
        prepared = [Prepared(plan, [arena], {1: plan.shares(1)}, (weights, self.classifier)) for plan in plans]
        logits = np.empty((self.lanes, len(self.classifier)), np.float32)
        pixels = np.zeros((self.lanes, 3, size, size), np.float32)
        found = []
        for index in [index for index in candidates if plans[1].operations[index + 1, 0] == WINOGRAD]:
            seconds = [np.inf, np.inf]
            for kind in (0, 1) * ROUNDS:
                operations, *arguments = prepared[kind].arguments(0, 1)
                begin = time.perf_counter()
                # The first operation loads the images.
                self.run_group(operations[index + 1 : index + 2], *arguments, logits, pixels, 0, 1, 0)
                seconds[kind] = min(seconds[kind], time.perf_counter() - begin)
            if seconds[1] < seconds[0]:
                found.append(index)
        return found

    @torch.no_grad()
    def check(self, network: ResNet, image_size: int) -> None:
        """RuntimeError if the logits of random images differ from PyTorch's by more than rounding explains."""
        images = torch.randn(
            (self.threads + 1) * self.lanes + 1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)
        )
        training = network.training
        expected = network.eval()(images)
        network.train(training)
        error = (self(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        if not error < 1e-3:
            raise RuntimeError(
                f"the logits of the sparse engine differ from PyTorch's by {error:.1e} of the largest one"
            )
