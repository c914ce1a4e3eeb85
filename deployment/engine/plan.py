"""The memory layout of activations, and the nonzero weights in the order in which the loops read them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from deployment.engine.layers import Convolution
from deployment.engine.loops import CLASSIFY, COLUMNS, CONVOLVE, LOAD, SHIFT, WINOGRAD
from deployment.engine.winograd import TILE, scratch_floats

# Chosen by measurement on a core with 48 KB of L1 cache.
BLOCK_BYTES = 32 * 1024  # of input that a tile may read from one block of channels
MIN_NONZEROS = 16  # per block and filter; fewer do not pay for loading and storing a tile

NONZERO = np.dtype([("offset", "<u4"), ("value", "<f4")])  # offset in bytes from the block's first channel
Size = tuple[int, int, int]  # channels, height, width


@dataclass
class Plan:
    """A network prepared for images of one size: the table of operations, and the arrays that it refers to."""

    operations: np.ndarray  # (operations, COLUMNS) int64
    nonzeros: np.ndarray  # NONZERO; all layers
    starts: np.ndarray  # int64; the index of the first nonzero of each layer, block and filter
    biases: np.ndarray  # float32
    counts: list[np.ndarray]  # nonzeros of each filter, layer by layer
    floats: int  # size of the arena for activations

    def arena(self) -> np.ndarray:
        """Zeroed memory for activations."""
        return aligned_zeros(self.floats)

    def shares(self, threads: int) -> np.ndarray:
        """(layers, threads + 1) int64: the first filter of each thread, chosen so that all have as many nonzeros."""
        shares = np.zeros((len(self.counts), threads + 1), np.int64)
        for share, counts in zip(shares, self.counts):
            work = np.cumsum(counts + 8)  # the outputs of a filter without weights must be written, too
            share[1:-1] = np.searchsorted(work, work[-1] * np.arange(1, threads) / threads)
            share[-1] = len(counts)
        return shares


def aligned_zeros(floats: int) -> np.ndarray:
    """(floats,) float32 zeros that start at a cache line."""
    memory = np.zeros(floats + 16, np.float32)
    skip = -memory.ctypes.data // 4 % 16
    return memory[skip : skip + floats]


def make_plan(
    layers: list[Convolution], height: int, width: int, lanes: int, grouped: bool, dense: Mapping[int, int]
) -> Plan:
    """The plan for images of `height` x `width` pixels.

    grouped: a vector holds the same pixel of `lanes` images, in place of neighboring pixels of one image. dense: the
    layers that groups of images compute with all weights, and where the transformed weights of each begin.
    """
    sizes = {0: (layers[0].weight.shape[1], height, width)}
    last_use = {}
    for index, layer in enumerate(layers):
        _, height, width = sizes[layer.source]
        rows, columns = (height - 1) // layer.stride + 1, (width - 1) // layer.stride + 1
        sizes[layer.target] = len(layer.weight), rows, columns
        last_use[layer.source] = last_use[layer.residual] = index
    planner = (Grouped if grouped else Single)(lanes, layers, sizes, dense)
    planner.place(0)
    planner.begin()
    for index, layer in enumerate(layers):
        over = planner.may_write_over(layer) and last_use[layer.residual] == index
        if over:
            planner.places[layer.target] = planner.places[layer.residual]
        else:
            planner.place(layer.target)
        planner.add(index, layer)
        for activation, use in last_use.items():
            if use == index and activation is not None and not (over and activation == layer.residual):
                planner.free.setdefault(sizes[activation], []).append(planner.places[activation])
    planner.finish(layers[-1].target)
    rows = [row + [0] * (COLUMNS - len(row)) for row in planner.operations]
    return Plan(
        np.array(rows, np.int64),
        np.concatenate([*planner.nonzeros, np.zeros(8, NONZERO)]),  # the loops read ahead by up to 8
        np.concatenate(planner.starts),
        np.concatenate([layer.bias for layer in layers]),
        planner.counts,
        planner.floats + 16 * lanes,  # the last vectors may read beyond their activation
    )


@dataclass
class Planner:
    """The common part of both kinds of plan."""

    lanes: int
    layers: list[Convolution]
    sizes: dict[int, Size]  # of each activation
    dense: Mapping[int, int]  # layers that run with all weights, and where these begin
    places: dict[int, int] = field(default_factory=dict)  # of each activation, in floats from the start of the arena
    free: dict[Size, list[int]] = field(default_factory=dict)
    floats: int = 16  # the first vectors may read a little before their activation
    operations: list[list[int]] = field(default_factory=list)
    nonzeros: list[np.ndarray] = field(default_factory=list)
    starts: list[np.ndarray] = field(default_factory=lambda: [np.zeros(1, np.int64)])
    counts: list[np.ndarray] = field(default_factory=list)
    filters: int = 0

    def reserve(self, floats: int) -> int:
        """A new place at the start of a cache line."""
        place = self.floats
        self.floats += -(-floats // 16) * 16
        return place

    def place(self, activation: int) -> None:
        """Give an activation its place: a free one of the same shape, whose border is zero already, or a new one."""
        size = self.sizes[activation]
        spare = self.free.get(size)
        self.places[activation] = spare.pop() if spare else self.reserve(size[0] * self.pitch(size))

    def may_write_over(self, layer: Convolution) -> bool:
        """Whether a layer may write its outputs over its residual: not if tiles overlap."""
        _, rows, columns = self.sizes[layer.target]
        return layer.residual is not None and rows % TILE == columns % TILE == 0

    def convolve(
        self, index: int, layer: Convolution, source: int, per_channel: int, taps: np.ndarray, reads: int, inside: int
    ) -> list[int]:
        """The row of a convolution.

        taps: (k, k), where each weight reads, in floats from the start of its channel. per_channel: floats from one
        channel of the source to the next. reads: floats that a tile reads from one channel. inside: floats before the
        first output in the target.
        """
        filters, channels, kernel, _ = layer.weight.shape
        density = max(np.count_nonzero(layer.weight), 1) / layer.weight.size
        block = max(1, BLOCK_BYTES // (4 * reads))
        block = min(channels, max(block, min(int(MIN_NONZEROS / (density * kernel**2)) + 1, 4 * block)))
        o, c, y, x = np.nonzero(layer.weight)
        order = np.argsort(c // block, kind="stable")
        o, c, y, x = o[order], c[order], y[order], x[order]
        blocks = -(-channels // block)
        first = sum(map(len, self.starts)) - 1
        nonzeros = np.empty(len(o), NONZERO)
        nonzeros["offset"], nonzeros["value"] = 4 * (c % block * per_channel + taps[y, x]), layer.weight[o, c, y, x]
        self.nonzeros.append(nonzeros)
        counts = np.bincount(c // block * filters + o, minlength=blocks * filters)
        self.starts.append(self.starts[-1][-1] + np.cumsum(counts))
        self.counts.append(np.bincount(o, minlength=filters))
        residual = -1 if layer.residual is None else self.places[layer.residual] + inside
        target, pitch = self.places[layer.target] + inside, self.pitch(self.sizes[layer.target])
        bias, self.filters = self.filters, self.filters + filters
        return [CONVOLVE, source, block * per_channel, target, pitch, residual, int(layer.relu), filters, blocks] + [
            first, bias, index,
        ]  # fmt: skip


class Single(Planner):
    """One image: a vector holds neighboring pixels. Each channel of an activation is padded to whole vectors."""

    def pitch(self, size: Size) -> int:
        """Floats from one channel to the next."""
        return -(-size[1] * size[2] // 16) * 16

    def begin(self) -> None:
        self.operations.append([LOAD, self.places[0], self.pitch(self.sizes[0])])
        self.copies = None
        self.scratch = self.reserve(max(map(self.copied_floats, self.layers)))

    def copied_floats(self, layer: Convolution) -> int:
        _, channels, kernel, _ = layer.weight.shape
        _, rows, columns = self.sizes[layer.target]
        return channels * kernel * layer.stride * (rows + 2) * columns

    def add(self, index: int, layer: Convolution) -> None:
        kernel, stride = layer.weight.shape[2], layer.stride
        source, size = self.places[layer.source], self.sizes[layer.source]
        _, rows, columns = self.sizes[layer.target]
        vectors = -(-rows * columns // self.lanes)
        per_channel, taps = self.pitch(size), np.zeros((1, 1), np.int64)
        reads = min(vectors, 16) * self.lanes
        if kernel > 1 or stride > 1:
            # A block's shortcut can read the copies that were made for its first convolution.
            if self.copies is None or self.copies[:2] != (layer.source, stride) or self.copies[2] < kernel:
                self.copies = layer.source, stride, kernel
                self.operations.append(
                    [SHIFT, source, per_channel, *size, self.scratch, kernel, stride, rows + 2, columns]
                )
            copied = self.copies[2]
            plane = (rows + 2) * columns
            y, x = np.divmod(np.arange(kernel**2).reshape(kernel, kernel), kernel)
            line, phase = np.divmod(y - kernel // 2, stride)
            taps = ((x + (copied - kernel) // 2) * stride + phase) * plane + (line + 1) * columns
            source, per_channel = self.scratch, copied * stride * plane
            reads = kernel * min(stride, kernel) * (reads + 2 * columns)
        self.operations.append([*self.convolve(index, layer, source, per_channel, taps, reads, 0), vectors])

    def finish(self, activation: int) -> None:
        size = channels, height, width = self.sizes[activation]
        self.operations.append([CLASSIFY, self.places[activation], self.pitch(size), channels, height * width])


class Grouped(Planner):
    """As many images as a vector has lanes. An activation is (channels, height + 2, width + 2, lanes), with a border of
    zeros as padding."""

    def pitch(self, size: Size) -> int:
        """Floats from one channel to the next."""
        return (size[1] + 2) * (size[2] + 2) * self.lanes

    def begin(self) -> None:
        self.operations.append([LOAD, self.places[0], *self.sizes[0]])
        channels = [self.layers[index].weight.shape[1] for index in self.dense]
        self.scratch = self.reserve(scratch_floats(max(channels), self.lanes) if channels else 0)

    def add(self, index: int, layer: Convolution) -> None:
        if index in self.dense and min(self.sizes[layer.target][1:]) >= TILE:
            self.add_dense(layer, self.dense[index])
            return
        kernel, stride, lanes = layer.weight.shape[2], layer.stride, self.lanes
        size = self.sizes[layer.source]
        _, rows, columns = self.sizes[layer.target]
        line = (size[2] + 2) * lanes
        taps = np.add.outer(np.arange(kernel) * line, np.arange(kernel) * lanes)
        source = self.places[layer.source] + (1 - kernel // 2) * (line + lanes)
        reads = (3 * stride + kernel) * ((lanes // 4 - 1) * stride + kernel) * lanes
        row = self.convolve(index, layer, source, self.pitch(size), taps, reads, (columns + 3) * lanes)
        self.operations.append([*row, rows, columns, stride, line])

    def add_dense(self, layer: Convolution, place: int) -> None:
        size, lanes = self.sizes[layer.source], self.lanes
        filters, rows, columns = self.sizes[layer.target]
        line = (columns + 2) * lanes
        inside = line + lanes
        residual = -1 if layer.residual is None else self.places[layer.residual] + inside
        row = [WINOGRAD, self.places[layer.source], self.pitch(size), self.places[layer.target] + inside]
        row += [self.pitch((filters, rows, columns)), residual, int(layer.relu), filters, size[0], place, self.filters]
        self.operations.append([*row, rows, columns, line, self.scratch])
        self.filters += filters
        self.counts.append(np.count_nonzero(layer.weight.reshape(filters, -1), axis=1))

    def finish(self, activation: int) -> None:
        size = channels, height, width = self.sizes[activation]
        first = self.places[activation] + (width + 3) * self.lanes
        self.operations.append([CLASSIFY, first, self.pitch(size), channels, height, width])
