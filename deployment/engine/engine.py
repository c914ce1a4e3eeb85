"""The engine: prepared once from a network, then called with images like the network itself."""

import contextlib
import ctypes
import hashlib
import os
import threading
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deployment import model_file
from deployment.engine.build import build, library
from deployment.graph import lower
from deployment.simplification import without_dead_channels

LANES = 4, 8, 16


def usable_processors() -> int:
    """The number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Model:
    """A model file in an engine of engine.c. Calls from several threads wait for each other.

    ValueError, with what is wrong, for bytes that are not a model file.
    """

    def __init__(self, content: bytes, threads: int = 1, lanes: int | None = None, extra: tuple[str, ...] = ()):
        self.library, self.threads = library(lanes, extra), threads
        self.content = np.frombuffer(content, np.uint8).copy()  # aligned, and kept as long as the engine
        self.handle, self.process = None, None
        self.lock = threading.Lock()
        self.load()
        self.classes = self.library.engine_classes(self.handle)
        if hasattr(os, "register_at_fork"):
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: this() and this().start_anew())

    def load(self) -> None:
        handle = ctypes.c_void_p()
        address, size = self.content.ctypes.data, self.content.size
        self.raise_if(self.library.engine_load(address, size, self.threads, ctypes.byref(handle)))
        self.handle = handle
        self.free = weakref.finalize(self, free, self.library, handle, os.getpid())

    def start_anew(self) -> None:
        """In a forked process the engine's threads are missing, and one that was computing keeps the lock."""
        self.lock, self.handle = threading.Lock(), None

    def raise_if(self, code: int) -> None:
        if code:
            raise ValueError(self.library.engine_error(code).decode())

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """(N, 3, H, W) contiguous float32 -> (N, classes) float32."""
        count, _, height, width = pixels.shape
        logits = np.empty((count, self.classes), np.float32)
        with self.lock:
            if self.handle is None:
                self.load()
            code = self.library.engine_run(self.handle, pixels.ctypes.data, count, height, width, logits.ctypes.data)
        self.raise_if(code)
        return logits

    def seconds(self, grouped: bool) -> list[float]:
        """Seconds in each operation so far, if the library was built to measure them."""
        found: list[float] = []
        while (value := self.library.engine_seconds(self.handle, grouped, len(found))) >= 0:
            found.append(value)
        return found


def free(library: ctypes.CDLL, handle: ctypes.c_void_p, process: int) -> None:
    if os.getpid() == process:
        library.engine_free(handle)


class Engine:
    """A trained network on the CPU without its zero weights.

    network: any CNN that deployment.graph.lower reads. It is not changed, and later changes to it have no effect.
    threads: by default as many as PyTorch uses. lanes: floats in a vector, 4, 8 or 16, by default the processor's.
    Images of any size may follow if the network takes them, but how each layer is computed was chosen for `image_size`.

    Raises ValueError for more threads than processors, and for what lower() refuses, such as unknown modules and
    weights that are not float32. Raises RuntimeError if the logits of random images differ from PyTorch's.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: int | tuple[int, int] = 32,
        threads: int | None = None,
        lanes: int | None = None,
    ):
        self.threads = min(torch.get_num_threads(), usable_processors()) if threads is None else threads
        if not 1 <= self.threads <= usable_processors():
            raise ValueError(f"{self.threads} threads on {usable_processors()} processors")
        if lanes not in (None, *LANES):
            raise ValueError(f"vectors of {lanes} floats, not 4, 8 or 16")
        self.program = without_dead_channels(lower(network, image_size))
        content = model_file.write(self.program)
        self.model = Model(content, self.threads, lanes)
        self.lanes = self.model.library.engine_lanes()
        # A comparison with PyTorch takes longer than everything else, so it is made once for each model and library.
        checked = build(lanes).with_suffix(f".{hashlib.sha256(content).hexdigest()[:16]}-{self.threads}")
        if not checked.exists():
            self.check(network)
            mark(checked)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 images -> (N, classes) float32 logits. Calls from several threads wait for each other.

        Raises ValueError for images of another shape or type.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.float32 or 0 in images.shape[2:]:
            raise ValueError(f"images must be (N, 3, H, W) float32, not {tuple(images.shape)} {images.dtype}")
        return torch.from_numpy(self.model.run(np.ascontiguousarray(images.detach().cpu().numpy())))

    def all_weights(self, grouped: bool) -> list[str]:
        """The convolutions that are faster with all their weights, for one image at a time or for groups of images."""
        return model_file.all_weights(self.program, self.lanes, grouped)

    @torch.no_grad()
    def check(self, network: nn.Module) -> None:
        """RuntimeError if the logits of random images differ from PyTorch's by more than rounding explains."""
        count = (self.threads + 1) * self.lanes + 1
        images = torch.randn(count, 3, *self.program.image_size, generator=torch.Generator().manual_seed(0))
        modes = [(module, module.training) for module in network.modules()]
        expected = network.eval()(images)
        for module, training in modes:
            module.training = training
        error = (self(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        if not error < 1e-3:
            raise RuntimeError(f"the logits of the engine differ from PyTorch's by {error:.1e} of the largest one")


def mark(path: Path) -> None:
    """An empty file. A cache that has become unwritable costs time only."""
    with contextlib.suppress(OSError):
        path.touch()
