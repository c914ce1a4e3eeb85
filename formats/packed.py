"""Read packed files: a checkpoint without its zeros, for shipping. Reading a file never runs code.

    checkpoint = packed.unpack(path.read_bytes())     # checkpoints.load_checkpoint(path) does this, too

`deployment.packing` writes these files. Version 2, all integers little-endian:

    bytes      content
    8          magic, 89 50 52 55 4E 45 44 0A
    4, 4, 8    version, bytes of the header, bytes of the file
    32         SHA-256 of every other byte of the file
    header     JSON: arch, classes, dtype (fp32, bf16 or fp16), absent (counters that the checkpoint lacks), and parts
               (the compressed bytes of each part)
    5 parts    metadata, others, mask, exponents, mantissas; each is one zlib stream

`metadata` is the rest of the checkpoint in JSON. `mask` has one bit for each weight of the Conv2d and Linear layers, in
the order of the network's state_dict, lowest bit of a byte first. A set bit means that the weight is stored, so -0.0 is
stored and +0.0 is not. A stored weight is rotated left by one bit (exponent first, sign last) and cut into bytes:
`exponents` holds the highest byte of each weight, `mantissas` all their lowest bytes, then all their second lowest, and
so on. Exponents compress well, mantissas do not. `others` holds the remaining float tensors in the same way, lowest
bytes first, and then the int64 tensors, which are counters and indices, not rotated. The header names the network, and
the network defines names, shapes and types.
"""

import hashlib
import itertools
import json
import math
import struct
import zlib
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

import models
import pruning
from models.identification import COUNTER
from utils import Failure

MAGIC = b"\x89PRUNED\n"
VERSION = 2
PREFIX = struct.Struct("<8sIIQ")  # magic, version, bytes of the header, bytes of the file
DIGEST_BYTES = 32
PARTS = 5
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a stored weight
METADATA = (
    "format", "acc", "dense_acc", "pruned_acc", "loss", "zeros", "epoch", "classes", "settings", "history", "mean",
    "std", "test_images", "parent", "fp32_acc", "fp32_loss", "predicted_ms",
    "predicted_for",
)  # fmt: skip
# Limits, so that a few hostile bytes cannot make the reader allocate more than a large network needs.
MAX_CLASSES = 2**16
MAX_METADATA = 2**24  # bytes of JSON


def unpack(content: bytes) -> dict:
    """The checkpoint of a packed file: `net`, its metadata, and `dtype` if its weights were rounded to bf16 or fp16.

    Tensors are contiguous, float32 or int64. They equal the packed ones bit for bit, or what rounding left of them.
    Failure if the file is damaged, cut short, too long, of another version, or crafted: every size is checked before
    memory is allocated, so no file takes more memory than the network that it names.
    """
    try:
        return _decode(*_split(content))
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        zlib.error,
    ) as error:
        # The checksum was right, so this is no accident.
        raise Failure(f"not a packed network, although its checksum is right: {error!s:.80}") from None


def groups(arch: str, classes: int, absent: Collection[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """The names of a network's tensors, but for absent ones, in three groups: weights of its Conv2d and Linear layers,
    other float tensors, int64 tensors."""
    layers = pruning.prunable(models.empty(arch, classes))
    state = {name: value for name, value in models.state(arch, classes).items() if name not in absent}
    weights = [name for name in state if name in layers]
    floats = [name for name, value in state.items() if value.is_floating_point() and name not in layers]
    return weights, floats, [name for name, value in state.items() if not value.is_floating_point()]


def _split(content: bytes) -> tuple[dict, list[bytes]]:
    """The header and the compressed parts, after a check of sizes and checksum."""
    if not content.startswith(MAGIC):
        raise Failure("not a packed network")
    if len(content) < PREFIX.size + DIGEST_BYTES:
        raise Failure(f"cut short: it has only {len(content)} bytes")
    _, version, header_bytes, file_bytes = PREFIX.unpack_from(content)
    if version == 1:
        raise Failure(
            "packed in version 1, which this program no longer reads: pack the checkpoint again with deploy.py"
        )
    if version != VERSION:
        raise Failure(f"packed in version {version}, or damaged: this program reads version {VERSION}")
    if len(content) < file_bytes:
        raise Failure(f"cut short or damaged: it has {len(content)} of {file_bytes} bytes")
    if len(content) > file_bytes:
        raise Failure(f"damaged: it has {len(content)} bytes instead of {file_bytes}")
    prefix, body = content[: PREFIX.size], content[PREFIX.size + DIGEST_BYTES :]
    if hashlib.sha256(prefix + body).digest() != content[PREFIX.size :][:DIGEST_BYTES]:
        raise Failure("damaged: its checksum is wrong")
    header = json.loads(body[:header_bytes])
    sizes = header["parts"]
    if len(sizes) != PARTS or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("wrong list of parts")
    if header_bytes + sum(sizes) != len(body):
        raise ValueError("wrong sizes of the parts")
    ends = itertools.accumulate(sizes, initial=header_bytes)
    return header, [body[start:end] for start, end in itertools.pairwise(ends)]


def _decode(header: dict, parts: list[bytes]) -> dict:
    metadata, others, mask, exponents, mantissas = parts
    arch, classes, dtype, absent = _check_header(header)
    weights, floats, integers = groups(arch, classes, absent)
    shapes = {name: shape for name, shape in models.shapes(arch, classes).items() if name not in absent}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}

    total = sum(sizes[name] for name in weights)
    packed_mask = np.frombuffer(_inflate(mask, -(-total // 8)), np.uint8)
    stored = np.unpackbits(packed_mask, count=total, bitorder="little").view(bool)
    stored_by_layer = np.split(stored, np.cumsum([sizes[name] for name in weights])[:-1])
    counts = [int(np.count_nonzero(layer)) for layer in stored_by_layer]
    planes = _inflate(mantissas, (DTYPES[dtype] - 1) * sum(counts)) + _inflate(exponents, sum(counts))
    values = np.split(_to_floats(_join(planes, DTYPES[dtype]), dtype), np.cumsum(counts)[:-1])
    arrays = {}
    for name, layer, value in zip(weights, stored_by_layer, values):
        arrays[name] = np.zeros(len(layer), "<f4")
        arrays[name][layer] = value

    float_bytes = 4 * sum(sizes[name] for name in floats)
    content = _inflate(others, float_bytes + 8 * sum(sizes[name] for name in integers))
    for names, array in (
        (floats, _to_floats(_join(content[:float_bytes], 4), "fp32")),
        (integers, _join(content[float_bytes:], 8).view("<i8")),
    ):
        arrays |= zip(names, np.split(array, np.cumsum([sizes[name] for name in names])[:-1]))

    net = {name: _tensor(arrays[name], shape) for name, shape in shapes.items()}
    return {**_read_metadata(metadata), **({} if dtype == "fp32" else {"dtype": dtype}), "net": net}


def _check_header(header: dict) -> tuple[str, int, str, set[str]]:
    """Network, number of classes, type of the stored weights, and the names of the counters that are not stored."""
    arch, classes, dtype, absent = (header[key] for key in ("arch", "classes", "dtype", "absent"))
    if not isinstance(arch, str) or dtype not in DTYPES:
        raise ValueError("unknown network or type")
    if type(classes) is not int or not 2 <= classes <= MAX_CLASSES:
        raise ValueError("wrong number of classes")
    if not set(absent) <= {name for name in models.state(arch, classes) if name.endswith(COUNTER)}:
        raise ValueError("missing tensors")
    return arch, classes, dtype, set(absent)


def _read_metadata(part: bytes) -> dict:
    metadata = json.loads(_inflate(part, MAX_METADATA, exact=False))
    if not isinstance(metadata, dict) or not set(metadata) <= set(METADATA):
        raise ValueError("unknown metadata")
    return metadata


def _inflate(part: bytes, size: int, exact: bool = True) -> bytes:
    """The `size` bytes of one zlib stream, or up to as many. Decompression stops there, so a bomb stays small."""
    stream = zlib.decompressobj()
    content = stream.decompress(part, size + 1)
    if len(content) > size or (exact and len(content) < size) or not stream.eof or stream.unused_data:
        raise ValueError("wrong size of a part")
    return content


def _join(planes: bytes, width: int) -> np.ndarray:
    """`width` planes of n bytes, lowest first -> (n,) unsigned integers of `width` bytes."""
    columns = np.frombuffer(planes, np.uint8).reshape(width, -1).T
    return np.ascontiguousarray(columns).view(f"<u{width}").reshape(-1)


def _to_floats(words: np.ndarray, dtype: str) -> np.ndarray:
    """(n,) words, rotated left by one bit -> (n,) float32."""
    words = words >> 1 | words << 8 * words.itemsize - 1
    if dtype == "fp16":
        return words.view("<f2").astype("<f4")
    return (words.astype("<u4") << 16 if dtype == "bf16" else words).view("<f4")


def _tensor(array: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """A tensor with memory of its own: a slice would keep all the others alive."""
    return torch.from_numpy(array.reshape(shape).copy())
