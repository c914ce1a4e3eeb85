"""The packed file: a checkpoint without its zeros, for shipping. Reading it never runs code.

    checkpoint = store.load_checkpoint(path)
    store.write(packed.name(path), packed.pack(checkpoint))         # 90percent_iter_ckpt.packed
    store.load_checkpoint(packed.name(path))                        # the same weights, bit for bit

A file is a fixed prefix (magic, version, sizes, SHA-256), a header in JSON (network, type of the values, sizes of the
parts) and the parts: where the nonzeros of each Conv2d and Linear weight are, their values, all other tensors in
fp32, and the rest of the checkpoint as JSON. Names and shapes are those of the network, which the header only names.

Where the nonzeros are is coded nine bits at a time, which is one 3x3 kernel: the zeros of a kernel come together more
often than chance has it. Values are rotated left by one bit, which puts the exponent into a byte of its own: it
has about two bits of information, and the other bytes are close to random. Kernels and exponents go through an entropy
coder (Duda, Asymmetric numeral systems, 2013), everything else through deflate.
"""

import hashlib
import itertools
import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import entropy_coder
import models
from utils import Failure

MAGIC = b"\x89PRUNED\n"
VERSION = 1
START = struct.Struct("<8sIIQ")  # magic, version, bytes of the header, bytes of the file; its SHA-256 follows
DIGEST = 32
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of a value
FACTS = ("acc", "dense_acc", "pruned_acc", "loss", "zeros", "epoch", "classes", "settings", "history")
FACTS += ("fp32_acc", "fp32_loss")
# So that a few hostile bytes cannot ask for more than a large network takes.
MOST_CLASSES = 2**16
MOST_FACTS = 2**24

PATTERNS = 512  # of nine bits
POPCOUNT = np.array([pattern.bit_count() for pattern in range(PATTERNS)])


def name(path: Path, values: str = "fp32") -> Path:
    """Where the packed form of the checkpoint at `path` goes: x_ckpt.packed, x_ckpt.bf16.packed."""
    return path.with_name(path.stem + ("" if values == "fp32" else f".{values}") + ".packed")


def pack(checkpoint: dict, values: str = "fp32") -> bytes:
    """The bytes of a packed file of a checkpoint from `store.load_checkpoint`.

    `values` fp32 keeps `net` bit for bit. bf16 and fp16 round the weights of Conv2d and Linear layers to nearest,
    except that a nonzero weight becomes the smallest nonzero number rather than zero, so that the zeros are the same.
    Such a file carries its type as `values`, and what was measured before rounding as `fp32_acc` and `fp32_loss`
    instead of `acc` and `loss`.

    Entries other than `net` and those in FACTS are left out. Failure when a tensor is not finite or not that of a
    known network, when a weight is too large for the type, or when the network was rounded to another type before.
    """
    if checkpoint.get("values", values) != values:
        raise Failure(f"the network was rounded to {checkpoint['values']}: it cannot be packed as {values}")
    net = checkpoint["net"]
    try:
        arch = models.identify(net)
    except ValueError as error:
        raise Failure(f"the network {error}") from None
    for key, value in net.items():
        if value.dtype != _dtype(key):
            raise Failure(f"{key} is of {value.dtype}, not of {_dtype(key)}")
        if not value.isfinite().all():
            raise Failure(f"{key} has values that are not finite")
    classes = len(net["linear.weight"])
    if classes > MOST_CLASSES:
        raise Failure(f"a network for {classes} classes cannot be packed, only up to {MOST_CLASSES}")
    shapes = layout(arch, classes)
    weights, others = _weights(shapes), [key for key in shapes if len(shapes[key]) < 2]

    bits = [net[key].contiguous().numpy().reshape(-1).view("<u4") for key in weights]
    masks = [layer != 0 for layer in bits]  # of the bits, so that -0.0 is a value
    words = [_to_words(key, layer[mask].view("<f4"), values) for key, layer, mask in zip(weights, bits, masks)]
    layers, kernels = _pack_masks(masks, weights)
    tables, exponents = _pack_exponents([word >> 8 * (word.itemsize - 1) for word in words])
    mantissas = _planes(np.concatenate(words))[:-1]
    rest = [_planes(net[key].contiguous().numpy().reshape(-1).view("<u4")).tobytes() for key in others if key in net]
    absent = [key for key in others if key not in net]
    parts = [
        zlib.compress(_facts(checkpoint, values), 9),
        zlib.compress(b"".join(rest), 9),
        zlib.compress(layers, 9),
        kernels,
        zlib.compress(tables, 9),
        exponents,
        zlib.compress(mantissas.tobytes(), 1),
    ]
    header = {"arch": arch, "classes": classes, "values": values, "absent": absent, "parts": [len(p) for p in parts]}
    header = json.dumps(header).encode()
    body = b"".join([header, *parts])
    start = START.pack(MAGIC, VERSION, len(header), START.size + DIGEST + len(body))
    return start + hashlib.sha256(start + body).digest() + body


def unpack(content: bytes) -> dict:
    """The checkpoint of a packed file: what `pack` was given, or what rounding left of it, and `values` says to what.

    Failure when the file is damaged, cut short, longer than it should be, or made to harm: sizes are checked before
    memory is asked for, and no more than the network itself takes is.
    """
    try:
        header, parts = _open(content)
        return _read(header, *parts)
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        zlib.error,
    ) as e:
        # The checksum was right: somebody made it so.
        raise Failure(f"no packed network, although its checksum is right: {e!s:.80}") from None


def entropy(net: dict[str, Tensor], values: str = "fp32") -> dict[str, float]:
    """How many bytes a coder of independent symbols needs at least: `mask`, n * H(density) bits for each layer of n
    weights (H: binary entropy), and `values`, the empirical entropy of each byte of the rotated values."""
    shapes = layout(models.identify(net), len(net["linear.weight"]))
    bits = {key: net[key].contiguous().numpy().reshape(-1).view("<u4") for key in _weights(shapes)}
    words = [_to_words(key, layer[layer != 0].view("<f4"), values) for key, layer in bits.items()]
    return {
        "mask": sum(_entropy([np.count_nonzero(layer), np.count_nonzero(layer == 0)]) for layer in bits.values()),
        "values": sum(_entropy(np.bincount(plane)) for plane in _planes(np.concatenate(words))),
    }


def _entropy(counts) -> float:
    """In bytes, of all symbols that were counted."""
    counts = np.array(counts)[np.nonzero(counts)]
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def layout(arch: str, classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a network, in its order."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in models.build(arch, classes).state_dict().items()}


def _weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Those of Conv2d and Linear layers."""
    return {key: shape for key, shape in shapes.items() if len(shape) > 1}


def _dtype(key: str) -> torch.dtype:
    return torch.int64 if key.endswith("num_batches_tracked") else torch.float32


def _facts(checkpoint: dict, values: str) -> bytes:
    facts = {key: checkpoint[key] for key in FACTS if key in checkpoint}
    if values != "fp32":
        facts = {f"fp32_{key}" if key in ("acc", "loss") else key: value for key, value in facts.items()}
    try:
        text = json.dumps(facts, allow_nan=False).encode()
        same = json.loads(text) == facts
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise Failure("the checkpoint says of its network what is neither number, text, list nor dictionary")
    return text


# ---------------------------------------------------------------------------------------------- the file


def _open(content: bytes) -> tuple[dict, list[bytes]]:
    """The header and the parts, once sizes and checksum are right."""
    if not content.startswith(MAGIC):
        raise Failure("not a packed network")
    if len(content) < START.size + DIGEST:
        raise Failure(f"cut short: only {len(content)} bytes are there")
    _, version, header_bytes, total = START.unpack_from(content)
    if version != VERSION:
        raise Failure(f"packed in version {version} or damaged: this program reads version {VERSION}")
    if len(content) < total:
        raise Failure(f"cut short or damaged: {len(content)} of {total} bytes are there")
    if len(content) > total:
        raise Failure(f"damaged: {len(content)} bytes are there instead of {total}")
    start, digest, body = content[: START.size], content[START.size :][:DIGEST], content[START.size + DIGEST :]
    if hashlib.sha256(start + body).digest() != digest:
        raise Failure("damaged: its checksum is wrong")
    header = json.loads(body[:header_bytes])
    sizes = header["parts"]
    if not all(type(size) is int and size >= 0 for size in sizes) or header_bytes + sum(sizes) != len(body):
        raise ValueError("the sizes of its parts")
    ends = header_bytes + np.cumsum([0, *sizes])
    return header, [body[start:end] for start, end in itertools.pairwise(ends)]


def _read(
    header: dict,
    facts: bytes,
    others: bytes,
    layers: bytes,
    kernels: bytes,
    tables: bytes,
    exponents: bytes,
    mantissas: bytes,
) -> dict:
    arch, classes, values, absent = (header[key] for key in ("arch", "classes", "values", "absent"))
    if arch not in models.ARCHITECTURES or values not in BYTES:
        raise ValueError("its network or type is unknown")
    if type(classes) is not int or not 2 <= classes <= MOST_CLASSES:
        raise ValueError("its number of classes")
    if not all(key.endswith("num_batches_tracked") for key in absent):
        raise ValueError("it lacks tensors")
    shapes = {key: shape for key, shape in layout(arch, classes).items() if key not in absent}
    weights = _weights(shapes)

    masks = _unpack_masks(layers, kernels, weights)
    nonzeros = [np.count_nonzero(mask) for mask in masks]
    planes = np.empty((BYTES[values], sum(nonzeros)), np.uint8)
    planes[-1] = _unpack_exponents(tables, exponents, nonzeros)
    planes[:-1] = np.frombuffer(_inflate(mantissas, planes[:-1].size), np.uint8).reshape(planes[:-1].shape)
    words = np.split(_from_planes(planes), np.cumsum(nonzeros)[:-1])
    net = {}
    for (key, shape), mask, word in zip(weights.items(), masks, words):
        weight = np.zeros(len(mask), "<f4")
        weight[mask] = _from_words(word, values)
        net[key] = torch.from_numpy(weight).reshape(shape)

    rest = {key: math.prod(shape) * _dtype(key).itemsize for key, shape in shapes.items() if key not in weights}
    content = np.frombuffer(_inflate(others, sum(rest.values())), np.uint8)
    for key, part in zip(rest, np.split(content, np.cumsum(list(rest.values()))[:-1])):
        net[key] = torch.from_numpy(_from_planes(part.reshape(4, -1))).view(_dtype(key)).reshape(shapes[key])

    checkpoint = json.loads(_inflate(facts, MOST_FACTS, exactly=False))
    if not set(checkpoint) <= set(FACTS):
        raise ValueError("it says more of its network than is known")
    label = {} if values == "fp32" else {"values": values}
    return {**checkpoint, **label, "net": {key: net[key] for key in shapes}}


def _inflate(data: bytes, size: int, exactly: bool = True) -> bytes:
    """`size` bytes, or at most that many: a bomb does not get further."""
    stream = zlib.decompressobj()
    content = stream.decompress(data, size + 1)
    if len(content) > size or (exactly and len(content) < size) or not stream.eof or stream.unused_data:
        raise ValueError("the size of a part")
    return content


# ------------------------------------------------------------------------------------ values as numbers


def _to_words(key: str, weight: np.ndarray, values: str) -> np.ndarray:
    """(n,) float32 -> (n,) words of the type, rotated left by one bit: exponent first, sign last."""
    if values == "fp32":
        word = weight.view("<u4")
    elif values == "bf16":
        word = weight.view("<u4")
        word = ((word.astype(np.uint64) + 0x7FFF + (word >> 16 & 1)) >> 16).astype("<u2")  # to nearest, ties to even
        infinity = 0x7F80
    else:
        with np.errstate(over="ignore"):
            word = weight.astype("<f2").view("<u2")
        infinity = 0x7C00
    if values != "fp32":
        if (word & 0x7FFF >= infinity).any():
            raise Failure(f"{key} has values that are too large for {values}")
        word[(word & 0x7FFF == 0) & (weight != 0)] += 1  # the smallest nonzero number, with its sign
    return word << 1 | word >> 8 * word.itemsize - 1


def _from_words(word: np.ndarray, values: str) -> np.ndarray:
    """The float32 values of what `_to_words` returned."""
    word = word >> 1 | word << 8 * word.itemsize - 1
    if values == "fp16":
        return word.view("<f2").astype("<f4")
    return (word.astype("<u4") << 16 if values == "bf16" else word).view("<f4")


def _planes(words: np.ndarray) -> np.ndarray:
    """(n,) words of b bytes -> (b, n), the lowest bytes first."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, words.itemsize).T)


def _from_planes(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.T).view(f"<u{len(planes)}").reshape(-1)


# ----------------------------------------------------------------- where nonzeros are, and the exponents


def _pack_masks(masks: list[np.ndarray], weights: dict[str, tuple[int, ...]]) -> tuple[bytes, bytes]:
    """The model, then the code. The model: how many kernels of a layer have 0 to 9 nonzeros, and over all
    layers how often each pattern occurs among those with as many nonzeros, the most frequent being 255."""
    symbols = [_patterns(mask) for mask in masks]
    counts = np.array([np.bincount(symbol, minlength=PATTERNS) for symbol in symbols])
    popcounts = np.array([np.bincount(POPCOUNT, count, minlength=10) for count in counts]).astype("<u4")
    total = counts[_are_kernels(weights)].sum(0)
    most = np.array([total[popcount == POPCOUNT].max() for popcount in range(10)])
    shares = -(-255 * total // np.maximum(most, 1)[POPCOUNT]).astype(np.uint8)
    frequencies = _pattern_frequencies(popcounts, shares, weights)
    return popcounts.tobytes() + shares.tobytes(), entropy_coder.encode(symbols, frequencies)


def _unpack_masks(model: bytes, code: bytes, weights: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    model = _inflate(model, 40 * len(weights) + PATTERNS)
    popcounts = np.frombuffer(model, "<u4", 10 * len(weights)).reshape(-1, 10)
    shares = np.frombuffer(model, np.uint8, offset=popcounts.nbytes)
    sizes = [math.prod(shape) for shape in weights.values()]
    lengths = [-(-size // 9) for size in sizes]
    symbols = entropy_coder.decode(code, lengths, _pattern_frequencies(popcounts, shares, weights))
    masks = []
    for size, symbol in zip(sizes, np.split(symbols, np.cumsum(lengths)[:-1])):
        bits = np.unpackbits(symbol.astype("<u2").view(np.uint8).reshape(-1, 2), axis=1, count=9, bitorder="little")
        masks.append(bits.reshape(-1)[:size].astype(bool))
    return masks


def _patterns(mask: np.ndarray) -> np.ndarray:
    """(n,) bool -> (n / 9, rounded up,) numbers below 512."""
    groups = np.pad(mask, (0, -len(mask) % 9)).reshape(-1, 9)
    return np.packbits(groups, axis=1, bitorder="little").view("<u2").reshape(-1)


def _are_kernels(weights: dict[str, tuple[int, ...]]) -> np.ndarray:
    return np.array([shape[2:] == (3, 3) for shape in weights.values()])


def _pattern_frequencies(popcounts: np.ndarray, shares: np.ndarray, weights: dict[str, tuple[int, ...]]) -> np.ndarray:
    """(layers, 512), in whole numbers: they must be the same on every machine."""
    shares = np.where(_are_kernels(weights)[:, None], shares, 1).astype(
        np.int64
    )  # a place means nothing in a 1x1 kernel
    sums = np.array([np.bincount(POPCOUNT, share, minlength=10) for share in shares]).astype(np.int64)
    expected = -(-popcounts.astype(np.int64)[:, POPCOUNT] * shares // np.maximum(sums, 1)[:, POPCOUNT])
    return np.array([entropy_coder.normalise(layer) for layer in expected])


def _pack_exponents(exponents: list[np.ndarray]) -> tuple[bytes, bytes]:
    """The frequencies of each layer, then the code."""
    frequencies = np.array([entropy_coder.normalise(np.bincount(layer, minlength=256)) for layer in exponents])
    return frequencies.astype("<u2").tobytes(), entropy_coder.encode(exponents, frequencies)


def _unpack_exponents(tables: bytes, code: bytes, lengths: list[int]) -> np.ndarray:
    frequencies = np.frombuffer(_inflate(tables, 512 * len(lengths)), "<u2").reshape(-1, 256).astype(np.int64)
    if (frequencies.sum(1) != 1 << entropy_coder.SCALE).any():
        raise ValueError("its frequencies")
    return entropy_coder.decode(code, lengths, frequencies)
