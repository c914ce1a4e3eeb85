"""Write the model file that the engine in C reads: a program without its zeros.

    content = write(program, mean, std, class_names)      # engine/engine.c reads it, on any processor

All numbers are little-endian, u32 or float32. Whatever is not a multiple of 4 bytes long is filled up with zeros.

    8 bytes    magic, 89 45 4E 47 49 4E 45 0A
    u32        CRC-32 of every other byte of the file
    u32        version, 1
    4 u32      height and width of the images, classes, operations
    u32        bytes of the class names
    6 float32  mean and standard deviation of each channel, of pixels from 0 to 1
    u32        what images have behind their transparent pixels: 0 white, 1 black
    names      UTF-8, each followed by a zero byte; no bytes for no names
    operations in the order of execution

Operation i writes value i + 1; value 0 is the images. Pairs are rows, columns.

    3 u32      kind, activation (0 from `concatenate` on), number of inputs; then the inputs
    17 u32     kernel (2), stride (2), padding (4: top, left, bottom, right), dilation (2), groups, ceil_mode,
               count_include_pad, size (2), channels (2)

`convolve` and `affine` go on with their weights, (filters, depth, kernel rows, kernel columns):

    5 u32      filters, depth, nonzeros, encoding, bytes of positions
    6 u32      algorithm for vectors of 4, 8 and 16 floats: one image at a time; then groups of images
    float32    bias of each filter; then the nonzero weights
    positions  encoding 0: none, no weight is left out. 1: one mask bit a weight, lowest bit of a byte first.
               2: before each nonzero one byte, the zeros before it; 255 means 255 zeros and no nonzero
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from deployment.program import ACTIVATIONS, Operation, Program

MAGIC = b"\x89ENGINE\n"
VERSION = 1
KINDS = (
    "convolve", "affine", "activate", "add", "multiply", "concatenate", "max_pool", "average_pool", "adaptive_pool",
    "pad_channels",
)  # fmt: skip
LANES = 4, 8, 16
SPARSE, DENSE, WINOGRAD2, WINOGRAD4 = range(4)
Shape = tuple[int, int, int]  # channels, height, width


def write(
    program: Program,
    mean: Sequence[float] = (0, 0, 0),
    std: Sequence[float] = (1, 1, 1),
    class_names: Sequence[str] = (),
    background: str = "white",
) -> bytes:
    """The model file of a program. `mean` and `std` of pixels from 0 to 1, and the `background` of transparent images,
    "white" or "black", are for whoever prepares the images.

    ValueError for weights that are not float32, and for names that are not as many as the classes.
    """
    sizes = program.shapes()
    parts = [_operation(operation, sizes) for operation in program.operations]
    classes = sizes[program.operations[-1].output][0]
    if class_names and len(class_names) != classes:
        raise ValueError(f"{len(class_names)} class names for {classes} classes")
    names = "".join(f"{name}\0" for name in class_names).encode()
    header = struct.pack("<6I", VERSION, *program.image_size, classes, len(program.operations), len(names))
    header += struct.pack("<6fI", *mean, *std, background == "black")
    content = b"".join([header, _padded(names), *parts])
    return MAGIC + struct.pack("<I", zlib.crc32(content, zlib.crc32(MAGIC))) + content


def _operation(operation: Operation, sizes: list[Shape]) -> bytes:
    kernel = operation.kernel if operation.weight is None or operation.kind == "affine" else operation.weight.shape[2:]
    words = [KINDS.index(operation.kind), list(ACTIVATIONS).index(operation.activation), len(operation.inputs)]
    words += operation.inputs
    words += [*kernel, *operation.stride, *operation.padding, *operation.dilation, operation.groups]
    words += [operation.ceil_mode, operation.count_include_pad, *operation.size, *operation.channels]
    content = struct.pack(f"<{len(words)}I", *words)
    return content if operation.weight is None else content + _weights(operation, sizes)


def _weights(operation: Operation, sizes: list[Shape]) -> bytes:
    if operation.weight.dtype != torch.float32 or (
        operation.bias is not None and operation.bias.dtype != torch.float32
    ):
        raise ValueError(f"the weights of {operation.name or operation.kind} are not float32")
    weight = np.ascontiguousarray(operation.weight.detach().numpy())
    filters, depth = (len(weight), 1) if operation.kind == "affine" else weight.shape[:2]
    bias = np.zeros(filters, np.float32) if operation.bias is None else operation.bias.detach().numpy()
    flat = weight.ravel()
    encoding, positions, values = 0, b"", flat
    mask = flat != 0
    if operation.kind == "convolve" and not mask.all():
        places = np.flatnonzero(mask)
        values = flat[places]
        bits, gaps = np.packbits(mask, bitorder="little").tobytes(), _gaps(places)
        encoding, positions = (1, bits) if len(bits) <= len(gaps) else (2, gaps)
    algorithms = [SPARSE] * 6
    if operation.kind == "convolve":
        places = sizes[operation.output][1:]
        algorithms = [algorithm(operation, *places, lanes, grouped) for grouped in (False, True) for lanes in LANES]
    head = struct.pack("<11I", filters, depth, len(values), encoding, len(positions), *algorithms)
    return b"".join([head, bias.astype("<f4").tobytes(), values.astype("<f4").tobytes(), _padded(positions)])


def _gaps(places: np.ndarray) -> bytes:
    """One byte for each nonzero, and one more for each 255 zeros between two of them."""
    zeros = np.diff(places, prepend=-1) - 1
    long = zeros // 255
    gaps = np.full(len(places) + long.sum(), 255, np.uint8)
    gaps[np.cumsum(long + 1) - 1] = zeros % 255
    return gaps.tobytes()


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 4)


def all_weights(program: Program, lanes: int, grouped: bool) -> list[str]:
    """The names of the convolutions that are computed with all their weights."""
    sizes = program.shapes()
    return [
        operation.name
        for operation in program.operations
        if operation.kind == "convolve" and algorithm(operation, *sizes[operation.output][1:], lanes, grouped) != SPARSE
    ]


def algorithm(operation: Operation, height: int, width: int, lanes: int, grouped: bool) -> int:
    """How a convolution is computed that writes height x width pixels: the way of the lowest estimated cost.

    The cost is the number of multiply-adds for each pair of channels, times what each took in ResNet18's layers on an
    AMD Zen 4, in units of a processor that does nothing else. Small maps fill few vectors, so that sparse tiles wait.
    """
    filters, depth, *kernel = operation.weight.shape
    if operation.groups > 1:
        return SPARSE
    density = (int(operation.weight.count_nonzero()) + 1) / operation.weight.numel()
    vectors = height * width if grouped else -(-height * width // lanes)
    area = kernel[0] * kernel[1] * vectors
    wait = 1.4 if grouped or vectors >= 16 else 1.65 if vectors > 2 else 3.5
    costs = {SPARSE: wait * density * area, DENSE: area * (1.03 if vectors > 2 else 1.15)}
    if height * width == 1 and not grouped:
        costs[DENSE] /= min(lanes, filters) / 2  # its vectors hold filters
    if kernel == [3, 3] and operation.stride == operation.dilation == (1, 1):
        for m, kind in (2, WINOGRAD2), (4, WINOGRAD4):
            tiles = -(-height // m) * -(-width // m)
            if not grouped:
                tiles = -(-tiles // lanes)
            if not grouped or min(height, width) >= m:
                costs[kind] = (1.2 + 10 / depth) * (m + 2) ** 2 * tiles
    return min(costs, key=costs.__getitem__)
